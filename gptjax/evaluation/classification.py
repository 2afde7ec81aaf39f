"""Metrics of a model that picks one of several classes: accuracy, precision, recall, F1, calibration error."""

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import precision_recall_fscore_support

NUM_BINS = 15  # bins of confidence, as in the tables of Guo et al. 2017


def metrics(scores: Sequence[Sequence[float]], gold: Sequence[int]) -> dict[str, float]:
    """Returns acc, precision_macro, recall_macro, f1_macro and ece; a prediction is the class of the largest score.

    Macro averages give equal weight to every class that occurs as an answer or as a prediction. A class without
    predictions has precision 0, as in scikit-learn.

    Args:
      scores: log-likelihoods of the classes by document; documents may differ in their number of classes.
      gold: the correct class by document.
    """
    gold, predicted = np.array(gold), np.array([np.argmax(each) for each in scores])
    right = predicted == gold
    precision, recall, f1, _ = precision_recall_fscore_support(gold, predicted, average="macro", zero_division=0)
    found = {"precision_macro": float(precision), "recall_macro": float(recall), "f1_macro": float(f1)}
    return {"acc": float(right.mean())} | found | {"ece": calibration_error(confidence(scores), right)}


def confidence(scores: Sequence[Sequence[float]]) -> np.ndarray:
    """Returns the probability of the most likely class by document: the largest value of the softmax."""
    return np.array([1 / np.exp(np.array(each) - np.max(each)).sum() for each in scores])


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Returns the expected calibration error (Guo et al. 2017, equation 3).

    The distance between accuracy and confidence in bins of equal width, weighted by the number of documents in a bin.
    """
    bins = np.ceil(confidence * NUM_BINS)  # a bin includes the upper end of its range
    gaps = [abs((right[bins == each] - confidence[bins == each]).sum()) for each in np.unique(bins)]
    return float(sum(gaps) / len(confidence))
