"""Distributions counted in batches, compared with the same statistics of all values at once."""

import numpy as np
import pytest
from scipy import stats

from clipflow_ray.audit.distribution import Distribution
from clipflow_ray.model.calibration import Calibration

RNG = np.random.default_rng(0)
CALIBRATION = np.sort(RNG.normal(size=500)).astype(np.float32)
SCORES = (RNG.normal(size=3000) * 1.2 + 0.3).astype(np.float32)


def one_source(scores: np.ndarray) -> Calibration:
    return Calibration.fit(scores, ["jpeg|0-256"] * len(scores))


@pytest.mark.parametrize("decimals", [6, 1])
def test_distance_and_histograms_equal_those_of_all_scores_at_once(decimals: int) -> None:
    calibration, scores = np.round(CALIBRATION, decimals), np.round(SCORES, decimals)
    p = RNG.uniform(size=len(scores)).astype(np.float32)
    counted = Distribution(one_source(calibration))
    for some, some_p in zip(np.array_split(scores, 7), np.array_split(p, 7), strict=True):
        counted.add(some, some_p)
    expected = stats.ks_2samp(scores, calibration, method="asymp")
    assert counted.distance() == pytest.approx((expected.statistic, expected.pvalue))
    edges = np.array(counted.histogram().edges)
    clipped = np.histogram(np.clip(scores, edges[0], edges[-1]), edges)[0]
    np.testing.assert_allclose(counted.histogram().audit, clipped / len(scores))
    assert sum(counted.histogram().calibration) == pytest.approx(1.0)
    assert counted.p_values() == tuple(np.histogram(p, 20, (0.0, 1.0))[0].tolist())


@pytest.mark.parametrize("shift", [-50.0, 0.0, 3.0])
def test_the_median_is_accurate_to_half_a_percent(shift: float) -> None:
    counted = Distribution(one_source(CALIBRATION))
    assert counted.median() is None
    for some in np.array_split(SCORES + np.float32(shift), 5):
        counted.add(some, np.full(len(some), 0.5, np.float32))
    assert counted.median() == pytest.approx(float(np.median(SCORES + np.float32(shift))), rel=0.005, abs=0.002)


def test_a_source_with_copies_of_its_images_weighs_as_without_them() -> None:
    """One source of 100 images and one of 300, against the same with the 100 copied three times."""
    few, many = RNG.normal(1.0, 1.0, 100).astype(np.float32), RNG.normal(0.0, 1.0, 300).astype(np.float32)
    copied = np.repeat(few, 3)
    unequal, equal = (
        Distribution(Calibration.fit(np.r_[own, many], [""] * (len(own) + 300), [0] * len(own) + [1] * 300))
        for own in (few, copied)
    )
    for counted in (unequal, equal):
        counted.add(SCORES, np.full(len(SCORES), 0.5, np.float32))
    expected = stats.ks_2samp(SCORES, np.r_[copied, many]).statistic
    assert unequal.distance()[0] == pytest.approx(expected) == equal.distance()[0]
    assert unequal.distance()[1] > equal.distance()[1], "fewer images say less"
    assert unequal.calibration_median() == equal.calibration_median() == pytest.approx(np.median(np.r_[copied, many]))
    assert sum(unequal.histogram().calibration) == pytest.approx(1.0)
