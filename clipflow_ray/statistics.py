"""Statistics that several parts of the package report: AUROC, Wilson intervals, and the share that is flagged."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score

Floats = NDArray[np.floating[Any]]


def auroc(negative: Floats, positive: Floats) -> float:
    """Area under the ROC curve of scores [N] and [M]; higher scores are more suspicious."""
    labels = np.repeat([0, 1], [len(negative), len(positive)])
    return float(roc_auc_score(labels, np.r_[negative, positive]))


def wilson(count: int, of: int) -> tuple[float, float]:
    """95 % Wilson interval of the share `count / of`."""
    interval = stats.binomtest(count, of).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def flagged_rate(count: int, scored: int, alpha: float) -> dict[str, Any]:
    """Share of scored images with verdict likely_ai, its 95 % Wilson interval, and the excess over alpha.

    `excess_lower_bound` is (low - alpha) / (1 - alpha), at least 0. AI-generated images raise it, and so does a shift
    of domain. Without scored images the last three are None.
    """
    if scored == 0:
        return {"count": 0, "of": 0, "share": None, "wilson_95": None, "excess_lower_bound": None}
    low, high = wilson(count, scored)
    return {
        "count": count,
        "of": scored,
        "share": count / scored,
        "wilson_95": [low, high],
        "excess_lower_bound": max(0.0, (low - alpha) / (1.0 - alpha)),
    }
