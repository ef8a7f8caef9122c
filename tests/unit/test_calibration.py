"""Conformal p-values, thresholds and intervals against brute force and simulation."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipflow_ray.errors import CalibrationError
from clipflow_ray.model.calibration import MIN_STRATUM, VERDICTS, Calibration, verdict

# Few distinct values, so that most scores tie with calibration scores.
tied = st.integers(-6, 6).map(lambda i: i / 4)
scores_lists = st.lists(tied | st.floats(-50, 50, width=32), min_size=1, max_size=60)


def fitted(scores: list[float] | np.ndarray, stratum: str = "jpeg|512-1024") -> Calibration:
    return Calibration.fit(np.asarray(scores, np.float32), [stratum] * len(scores))


def brute_force(calibration: list[float], score: float) -> float:
    return (1 + sum(value >= score for value in calibration)) / (len(calibration) + 1)


@settings(max_examples=50, deadline=None)
@given(calibration=scores_lists, scores=scores_lists)
def test_the_p_value_counts_the_calibration_scores_that_are_no_lower(
    calibration: list[float], scores: list[float]
) -> None:
    p = fitted(calibration).p_value(np.array(scores, np.float32))
    np.testing.assert_allclose(p, [brute_force(calibration, score) for score in scores], rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(calibration=scores_lists, scores=scores_lists, data=st.data())
def test_a_score_is_above_the_threshold_if_and_only_if_its_verdict_is_likely_ai(
    calibration: list[float], scores: list[float], data: st.DataObject
) -> None:
    n = len(calibration)
    fraction = data.draw(st.floats(0.001, 0.999) | st.integers(1, n).map(lambda k: k / (n + 1)), label="alpha")
    alpha = max(fraction, 1 / (n + 1))
    fit = fitted(calibration)
    threshold = fit.threshold(alpha)
    for score, p in zip(scores, fit.p_value(np.array(scores, np.float32)), strict=True):
        exact = 1 + sum(value >= score for value in calibration) <= alpha * (n + 1) + 1e-9
        assert (score > threshold) == exact
        assert (verdict(float(p), alpha)[0] == "likely_ai") == exact


@pytest.mark.parametrize("n", [1, 9, 99, 100, 1000])
def test_an_alpha_that_the_calibration_cannot_support_is_refused_with_the_size_it_needs(n: int) -> None:
    fit = fitted(np.arange(n))
    assert fit.threshold(1 / (n + 1)) == n - 1
    for method in (fit.threshold, fit.false_positive_interval, lambda alpha: fit.flagged_interval(alpha, 10)):
        with pytest.raises(CalibrationError, match="larger alpha, or calibrate on at least") as refusal:
            method(0.9 / (n + 1))
    needed = int(str(refusal.value).split("at least ")[1].split()[0])
    fitted(np.arange(needed)).threshold(0.9 / (n + 1))
    with pytest.raises(CalibrationError):
        fitted(np.arange(needed - 1)).threshold(0.9 / (n + 1))


@pytest.mark.parametrize("n", [1, 19, 99, 100, 370])
def test_a_calibration_supports_an_alpha_if_and_only_if_it_has_a_threshold_for_it(n: int) -> None:
    fit = fitted(list(range(n)))
    for k in range(1, n + 1):
        assert fit.supports(k / (n + 1)) and np.isfinite(fit.threshold(k / (n + 1)))
    assert not fit.supports(0.99 / (n + 1))


@pytest.mark.parametrize("alpha", [0.0, -0.01, float("nan")])
def test_an_alpha_that_is_not_above_zero_is_refused(alpha: float) -> None:
    with pytest.raises(CalibrationError):
        fitted(np.arange(100)).threshold(alpha)


def test_naturals_like_the_calibration_are_flagged_at_most_at_alpha() -> None:
    rng, n, rounds = np.random.default_rng(0), 199, 400
    alphas = np.array([0.01, 0.05, 0.1, 0.5])
    flagged = np.zeros(4)
    for _ in range(rounds):
        # Half of the scores are rounded, so that ties occur. Ties may lower the rate but not raise it.
        draws = rng.standard_t(3, n + 50).astype(np.float32)
        draws[::2] = np.round(draws[::2], 1)
        draws = rng.permutation(draws)
        p = fitted(draws[:n]).p_value(draws[n:])
        flagged += (p[:, None] <= alphas + 1e-6).mean(axis=0) / rounds
    assert (flagged <= alphas + 4 * np.sqrt(alphas / (rounds * 40))).all()
    assert (flagged >= 0.8 * alphas).all()


@pytest.mark.parametrize(("n", "low", "high"), [(1_000, 0.005, 0.017), (10_000, 0.0081, 0.0120)])
def test_the_realised_false_positive_interval_at_one_percent_is_the_published_one(
    n: int, low: float, high: float
) -> None:
    digits = 3 if n == 1_000 else 4
    interval = fitted(np.arange(n)).false_positive_interval(0.01)
    assert tuple(round(end, digits) for end in interval) == (low, high)


def test_the_flagged_interval_holds_in_simulation() -> None:
    rng, n, m, alpha, rounds = np.random.default_rng(1), 200, 300, 0.05, 3000
    low, high = fitted(np.arange(n)).flagged_interval(alpha, m)
    shares = np.empty(rounds)
    for i in range(rounds):
        threshold = np.sort(rng.random(n))[n - int(alpha * (n + 1))]
        shares[i] = (rng.random(m) > threshold).mean()
    outside = ((shares < low).mean(), (shares > high).mean())
    assert max(outside) < 0.035 and min(outside) > 0.01
    assert 0.94 < 1 - sum(outside) < 0.98


def test_the_p_value_within_a_stratum_counts_that_stratum_alone() -> None:
    rng = np.random.default_rng(2)
    strata = ["png|256-512"] * MIN_STRATUM + ["jpeg|256-512"] * 3 * MIN_STRATUM + ["webp|0-256"] * (MIN_STRATUM - 1)
    values = rng.normal(size=len(strata)).astype(np.float32) + np.array([s.startswith("png") for s in strata]) * 2
    order = rng.permutation(len(strata))
    fit = Calibration.fit(values[order].astype(np.float32), [strata[i] for i in order])
    asked = ["webp|0-256", "png|256-512", "gif|0-256", "jpeg|256-512", "png|256-512"]
    scores = np.array([0.5, 2.5, 0.5, 1.0, np.nan], np.float32)
    p = fit.p_stratum(scores, asked)
    own = {name: [v for v, s in zip(values, strata, strict=True) if s == name] for name in set(strata)}
    expected = [np.nan, brute_force(own[asked[1]], 2.5), np.nan, brute_force(own[asked[3]], 1.0), np.nan]
    np.testing.assert_allclose(p, expected, rtol=1e-6)


def test_a_nan_score_has_no_p_value_and_an_infinite_score_has_the_extreme_one() -> None:
    p = fitted([1.0, 2.0, 3.0]).p_value(np.array([np.nan, np.inf, -np.inf, 1e6], np.float32))
    np.testing.assert_allclose(p, [np.nan, 0.25, 1.0, 0.25])


@pytest.mark.parametrize("scores", [[], [1.0, np.nan], [np.inf, 0.0]])
def test_a_calibration_without_scores_or_with_non_finite_scores_is_refused(scores: list[float]) -> None:
    with pytest.raises(CalibrationError, match="calibration split"):
        fitted(scores)


def test_fitting_sorts_scores_and_keeps_each_with_its_stratum() -> None:
    fit = Calibration.fit(np.array([3.0, 1.0, 2.0], np.float32), ["c", "a", "b"])
    assert fit.scores.tolist() == [1.0, 2.0, 3.0] and fit.scores.dtype == np.float32
    assert fit.strata == ("a", "b", "c")


@pytest.mark.parametrize(
    ("p_value", "expected"),
    [
        (0.0005, ("likely_ai", ["below_alpha"])),
        (0.01, ("likely_ai", ["below_alpha"])),
        (0.0101, ("inconclusive", ["near_alpha"])),
        (0.05, ("inconclusive", ["near_alpha"])),
        (0.0501, ("no_ai_signal", ["above_alpha"])),
        (1.0, ("no_ai_signal", ["above_alpha"])),
    ],
)
def test_the_verdict_changes_at_alpha_and_at_five_times_alpha(p_value: float, expected: tuple[str, list[str]]) -> None:
    assert verdict(p_value, 0.01) == expected
    assert expected[0] in VERDICTS


def test_the_calibration_id_follows_scores_and_strata_and_not_their_order() -> None:
    fit = Calibration.fit(np.array([1.0, 2.0, 3.0], np.float32), ["a", "a", "b"])
    shuffled = Calibration.fit(np.array([3.0, 1.0, 2.0], np.float32), ["b", "a", "a"])
    nudged = np.nextafter(fit.scores, np.float32(9))
    others = [dataclasses.replace(fit, scores=nudged), dataclasses.replace(fit, strata=("a", "b", "a")), fitted([1.0])]
    assert fit.calibration_id == shuffled.calibration_id
    assert len({fit.calibration_id, *(other.calibration_id for other in others)}) == 4


def test_the_smallest_alpha_is_refused_with_a_sentence_and_the_largest_has_a_threshold() -> None:
    calibration = Calibration.fit(np.linspace(0.0, 1.0, 200, dtype=np.float32), ["jpeg|0-256"] * 200)
    with pytest.raises(CalibrationError, match="ask for a larger alpha"):
        calibration.threshold(5e-324)
    low, high = calibration.false_positive_interval(1.0 - 2**-53)
    assert calibration.threshold(1.0 - 2**-53) == 0.0 and 0.9 < low < high <= 1.0
