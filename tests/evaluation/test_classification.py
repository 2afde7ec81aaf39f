import numpy as np
import pytest

from gptjax.evaluation import bias_pairs, classification


def test_metrics_are_those_by_hand():
    # Predicted 0, 0, 1, 1, 0; right are 0, 1, 1, 1, 2.
    scores = [[-1, -2, -9], [-1, -2, -9], [-5, -4, -9], [-5, -4, -9], [-1, -3, -2]]
    found = classification.metrics(scores, [0, 1, 1, 1, 2])
    assert found["acc"] == 3 / 5
    assert found["precision_macro"] == pytest.approx((1 / 3 + 2 / 2 + 0) / 3)
    assert found["recall_macro"] == pytest.approx((1 / 1 + 2 / 3 + 0) / 3)
    assert found["f1_macro"] == pytest.approx((1 / 2 + 4 / 5 + 0) / 3)


def test_calibration_error_is_that_by_hand():
    # Among the 15 bins, the 12th is (0.733, 0.8] and has two at 0.75, one right; the 6th has 0.4, wrong.
    confidence, right = np.array([0.75, 0.75, 0.4, 1.0]), np.array([True, False, False, True])
    assert classification.calibration_error(confidence, right) == pytest.approx((2 * 0.25 + 0.4 + 0) / 4)


def test_confidence_is_the_softmax():
    for scores in ([np.log(0.2), np.log(0.3), np.log(0.5)], [-1000 + np.log(0.5), -1000 + np.log(0.5)]):
        assert classification.confidence([scores]) == pytest.approx(0.5)


def test_a_classifier_that_knows_how_sure_it_is():
    chance = np.random.default_rng(0)
    p = chance.uniform(0.05, 0.95, 20_000)
    gold = (chance.uniform(size=p.size) < p).astype(int)
    scores = np.log(np.stack((1 - p, p), axis=1))
    assert classification.metrics(scores, gold)["ece"] < 0.02
    assert classification.metrics(5 * scores, gold)["ece"] > 0.1  # five times as sure


def test_pairs_differ_in_their_subject_only():
    documents = bias_pairs.documents("gender")["test"]
    assert len(documents) == len({(each["first"], each["rest"]) for each in documents}) > 50
    found = bias_pairs.scores({"rest": " works."}, [(-7 * np.log(2), True), (-14 * np.log(2), False)])
    assert found == {"first_likelier": 1.0, "difference": pytest.approx(1.0)}
    assert bias_pairs.scores({"rest": " works."}, [(-3.0, True)] * 2) == {"first_likelier": 0.5, "difference": 0.0}
