"""Figures of merit on labelled scores. Higher scores are more suspicious; `positive` is the AI-generated class."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_curve
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from clipflow_ray.evaluate.record import Uniformity

Floats = NDArray[np.floating[Any]]
Names = NDArray[np.str_]


def average_precision(negative: Floats, positive: Floats) -> float:
    """Return the average precision with both classes weighted alike, so it does not depend on the class counts."""
    labels = _labels(negative, positive)
    weights = np.where(labels == 1, 1.0 / len(positive), 1.0 / len(negative))
    return float(average_precision_score(labels, np.r_[negative, positive], sample_weight=weights))


def oracle_tpr(negative: Floats, positive: Floats, rate: float) -> float:
    """Return the recall at a threshold set on these same negatives for a false-positive rate of at most `rate`."""
    false, true, _ = roc_curve(_labels(negative, positive), np.r_[negative, positive], drop_intermediate=False)
    return float(true[np.searchsorted(false, rate, side="right") - 1])


def uniformity(p_values: Floats) -> Uniformity:
    """Return the Kolmogorov-Smirnov distance of p-values from uniform, and its p-value."""
    result = stats.kstest(p_values, "uniform")
    return Uniformity(ks_distance=float(result.statistic), p=float(result.pvalue))


def bootstrap_auroc(negative: Floats, positive: Floats, draws: int = 1000) -> tuple[float, float]:
    """Return the 95 % bootstrap percentile interval of the AUROC; the seed of the resampling is fixed."""
    rng = np.random.default_rng(0)
    _, place = np.unique(np.r_[negative, positive], return_inverse=True)
    places, size = (place[: len(negative)], place[len(negative) :]), place.max() + 1
    values = []
    for _ in range(draws):
        n, p = (np.bincount(rng.choice(own, len(own)), minlength=size) for own in places)
        values.append(p @ (np.cumsum(n) - n / 2) / (len(negative) * len(positive)))  # ties count half
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def metadata_scores(formats: Names, numbers: Floats, labels: NDArray[np.bool_]) -> Floats:
    """Return the suspicion [N] by metadata alone, from a cross-validated logistic probe.

    `formats` [N] and `numbers` [N, K] are the metadata. The probe is trained on `labels`, which hold at least two
    images of each class, so its AUROC shows how far a benchmark can be solved without the pixels.
    """
    features = np.c_[OneHotEncoder(sparse_output=False).fit_transform(formats[:, None]), numbers]
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    folds = StratifiedKFold(min(5, int(labels.sum()), int((~labels).sum())), shuffle=True, random_state=0)
    scores: Floats = cross_val_predict(model, features, labels, cv=folds, method="decision_function")
    return scores


def _labels(negative: Floats, positive: Floats) -> NDArray[np.int64]:
    return np.repeat(np.array([0, 1], np.int64), [len(negative), len(positive)])
