"""How well a model picks one of several classes: precision, recall, F1, and whether it is as sure as it is right."""

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import precision_recall_fscore_support

NUM_BINS = 15  # of confidence, as Guo et al. 2017 have them in their tables


def metrics(scores: Sequence[Sequence[float]], gold: Sequence[int]) -> dict[str, float]:
    """acc, precision_macro, recall_macro, f1_macro and ece of predictions that are each the class of the largest score.

    The macro averages count each class the same that is right or predicted somewhere; without any prediction of a class
    its precision is 0, as it is in scikit-learn.

    Args:
      scores: log-likelihoods of the classes, by document; documents may have different numbers of them. gold: the class
        that is right.
    """
    gold, predicted = np.array(gold), np.array([np.argmax(each) for each in scores])
    right = predicted == gold
    precision, recall, f1, _ = precision_recall_fscore_support(gold, predicted, average="macro", zero_division=0)
    found = {"precision_macro": float(precision), "recall_macro": float(recall), "f1_macro": float(f1)}
    return {"acc": float(right.mean())} | found | {"ece": calibration_error(confidence(scores), right)}


def confidence(scores: Sequence[Sequence[float]]) -> np.ndarray:
    """The probability of the most likely class by document: the largest of the softmax."""
    return np.array([1 / np.exp(np.array(each) - np.max(each)).sum() for each in scores])


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """The expected calibration error (Guo et al. 2017, equation 3): how far accuracy is from confidence, in bins of
    equal width, weighted by what is in them."""
    bins = np.ceil(confidence * NUM_BINS)  # a bin has its upper end
    gaps = [abs((right[bins == each] - confidence[bins == each]).sum()) for each in np.unique(bins)]
    return float(sum(gaps) / len(confidence))
