"""Turns labels and logits into exact AUC and log loss, in numpy, in one process."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def auc(labels: NDArray[Any], scores: NDArray[Any]) -> float:
    """Return the exact area under the ROC curve; a tied pair counts one half.

    labels 0/1 [n] and scores [n] (logits do as well: only their order counts). NaN when one class
    is absent.
    """
    positive = np.asarray(labels) > 0.5
    _, level = np.unique(scores, return_inverse=True)
    levels = int(level.max()) + 1 if len(level) else 0
    positives = np.bincount(level[positive], minlength=levels).astype(np.float64)
    negatives = np.bincount(level[~positive], minlength=levels).astype(np.float64)
    pairs = positives.sum() * negatives.sum()
    if pairs == 0:
        return float("nan")
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + negatives / 2)).sum() / pairs)


def log_loss(labels: NDArray[Any], logits: NDArray[Any]) -> float:
    """Return the mean of -log p(label) over n rows, from logits, without overflow.

    NaN when there is no row.
    """
    if not len(labels):
        return float("nan")
    logits64 = np.asarray(logits, np.float64)
    return float(np.mean(np.logaddexp(0, logits64) - np.asarray(labels, np.float64) * logits64))
