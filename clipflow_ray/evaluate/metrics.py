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

from clipflow_ray.evaluate.record import Comparison, Outcome, Uniformity

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


def resampled_auroc(negative: Floats, positive: Floats, draws: int = 1000) -> Floats:
    """Return the AUROC of each bootstrap resample, [draws]; each class is resampled on its own.

    The seed is fixed. The resamples depend on the number of images alone, so two detectors of the same images, in the
    same order, get the same resamples, and their AUROCs are paired.
    """
    rng = np.random.default_rng(0)
    _, place = np.unique(np.r_[negative, positive], return_inverse=True)
    places, size = (place[: len(negative)], place[len(negative) :]), place.max() + 1
    values = []
    for _ in range(draws):
        n, p = (np.bincount(rng.choice(own, len(own)), minlength=size) for own in places)
        values.append(p @ (np.cumsum(n) - n / 2) / (len(negative) * len(positive)))  # ties count half
    return np.array(values)


def interval_95(values: Floats) -> tuple[float, float]:
    """Return the 95 % percentile interval of resampled values [draws]."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def compared(difference: float, flow: Floats, baseline: Floats) -> Comparison:
    """Compare the flow with a baseline by a paired bootstrap of their AUROCs.

    `difference` is the flow's AUROC minus the baseline's. `flow` and `baseline` are their `resampled_auroc` [draws] on
    the same images in the same order.
    """
    low, high = interval_95(flow - baseline)
    outcome: Outcome = "higher" if low > 0 else "lower" if high < 0 else "no difference beyond the noise"
    return Comparison(auroc_difference=difference, difference_95=(low, high), outcome=outcome)


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
