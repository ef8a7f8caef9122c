import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from clipflow_ray.evaluate import metrics
from clipflow_ray.evaluate.record import Comparison
from clipflow_ray.statistics import auroc, wilson

scores = st.lists(st.integers(-5, 5), min_size=2, max_size=30).map(lambda values: np.array(values, float))


@settings(max_examples=50, deadline=None)
@given(scores, scores)
def test_auroc_is_the_share_of_pairs_in_the_right_order_and_counts_ties_half(
    negative: np.ndarray, positive: np.ndarray
) -> None:
    pairs = np.sign(positive[:, None] - negative[None, :])
    assert auroc(negative, positive) == pytest.approx((pairs.mean() + 1) / 2)


@settings(max_examples=50, deadline=None)
@given(scores, scores, st.integers(2, 5))
def test_balanced_average_precision_does_not_change_when_one_class_is_repeated(
    negative: np.ndarray, positive: np.ndarray, times: int
) -> None:
    repeated = metrics.average_precision(np.tile(negative, times), positive)
    assert repeated == pytest.approx(metrics.average_precision(negative, positive))


@settings(max_examples=50, deadline=None)
@given(scores, scores, st.sampled_from([0.0, 0.05, 0.3]))
def test_the_oracle_rate_is_the_best_recall_whose_false_positives_stay_within_the_rate(
    negative: np.ndarray, positive: np.ndarray, rate: float
) -> None:
    thresholds = np.r_[np.inf, np.unique(np.r_[negative, positive])]
    allowed = [(positive >= t).mean() for t in thresholds if (negative >= t).mean() <= rate]
    assert metrics.oracle_tpr(negative, positive, rate) == pytest.approx(max(allowed))


def test_the_wilson_interval_is_the_textbook_formula() -> None:
    z, k, n = stats.norm.ppf(0.975), 7, 40
    centre = (k / n + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(k / n * (1 - k / n) / n + z**2 / (4 * n**2))
    assert wilson(k, n) == pytest.approx((centre - half, centre + half))


def test_uniform_p_values_are_near_uniform_and_small_ones_are_not() -> None:
    assert metrics.uniformity(np.arange(1, 101) / 101).ks_distance < 0.02
    assert metrics.uniformity(np.full(100, 0.01)).ks_distance > 0.9


def test_the_bootstrap_interval_holds_the_auroc_and_shrinks_with_more_images() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for n in (30, 300):
        negative, positive = rng.normal(0, 1, n), rng.normal(1, 1, n)
        low, high = metrics.interval_95(metrics.resampled_auroc(negative, positive, draws=300))
        assert low < auroc(negative, positive) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_the_bootstrap_resamples_each_class_and_counts_ties_half() -> None:
    negative, positive, rng = np.array([0.0, 1, 1, 3]), np.array([1.0, 2, 3]), np.random.default_rng(0)
    drawn = [auroc(rng.choice(negative, 4), rng.choice(positive, 3)) for _ in range(100)]
    assert metrics.resampled_auroc(negative, positive, 100) == pytest.approx(drawn)
    assert metrics.interval_95(np.array(drawn)) == pytest.approx(np.percentile(drawn, [2.5, 97.5]))


def two_detectors(shift: float, n: int = 150) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Scores of natural and generated images by two detectors with much noise in common; `shift` helps the first."""
    rng = np.random.default_rng(0)
    natural, generated = rng.normal(0, 1, n), rng.normal(1, 1, n)
    worse = natural + rng.normal(0, 0.1, n), generated + rng.normal(0, 0.1, n)
    return (natural, generated + shift), worse


def compared(
    flow: tuple[np.ndarray, np.ndarray], baseline: tuple[np.ndarray, np.ndarray], draws: int = 300
) -> Comparison:
    resamples = (metrics.resampled_auroc(*pair, draws) for pair in (flow, baseline))
    return metrics.compared(auroc(*flow) - auroc(*baseline), *resamples)


def test_a_difference_beyond_the_noise_is_named_and_one_inside_is_not() -> None:
    better, worse = two_detectors(0.3)
    higher, lower = compared(better, worse), compared(worse, better)
    assert (higher.outcome, lower.outcome) == ("higher", "lower")
    assert 0 < higher.difference_95[0] < higher.auroc_difference < higher.difference_95[1]
    equal = compared(*two_detectors(0.0))
    assert equal.difference_95[0] < 0 < equal.difference_95[1]
    assert equal.outcome == "no difference beyond the noise"
    assert compared(better, better).outcome == "no difference beyond the noise"


def test_a_comparison_draws_the_same_images_for_both_detectors() -> None:
    better, worse = two_detectors(0.3)
    low, high = compared(better, worse).difference_95
    alone = metrics.interval_95(metrics.resampled_auroc(*better, draws=300))
    assert high - low < (alone[1] - alone[0]) / 3  # what both see alike cancels
    rng, pairs = np.random.default_rng(0), []
    for _ in range(50):
        drawn = [rng.choice(len(side), len(side)) for side in better]
        pairs.append(auroc(better[0][drawn[0]], better[1][drawn[1]]) - auroc(worse[0][drawn[0]], worse[1][drawn[1]]))
    assert compared(better, worse, 50).difference_95 == pytest.approx(np.percentile(pairs, [2.5, 97.5]))


def test_metadata_alone_separates_classes_only_if_it_differs() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2 == 0
    same, numbers = np.array(["JPEG"] * 200), rng.normal(size=(200, 2))

    def separation(formats: np.ndarray) -> float:
        suspicion = metrics.metadata_scores(formats, numbers, labels)
        return auroc(suspicion[~labels], suspicion[labels])

    assert separation(np.where(labels, "PNG", "JPEG")) > 0.99
    assert 0.3 < separation(same) < 0.7
