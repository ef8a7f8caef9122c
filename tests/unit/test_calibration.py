"""Conformal p-values, thresholds and intervals against brute force and simulation."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from clipflow_ray.errors import CalibrationError
from clipflow_ray.model.calibration import (
    MIN_SOURCES,
    MIN_STRATUM,
    PRONE_FACTOR,
    PRONE_MIN_IMAGES,
    VERDICTS,
    Calibration,
    Reason,
    Rule,
)

# Few distinct values, so that most scores tie with calibration scores.
tied = st.integers(-6, 6).map(lambda i: i / 4)
scores_lists = st.lists(tied | st.floats(-50, 50, width=32), min_size=1, max_size=60)


def fitted(scores: list[float] | np.ndarray, stratum: str = "jpeg|512-1024") -> Calibration:
    return Calibration.fit(np.asarray(scores, np.float32), [stratum] * len(scores))


def judge(p_value: float, alpha: float) -> tuple[str, list[Reason]]:
    return Rule(alpha, frozenset(), cap=True).verdict(p_value, "jpeg|512-1024")


def before_sources(calibration: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The conformal p-values of a release that knew no sources, to the bit."""
    n = len(calibration)
    at_least = n - np.searchsorted(np.sort(calibration), scores, side="left")
    p = (1.0 + at_least) / (n + 1.0)
    return np.where(np.isnan(scores), np.nan, p).astype(np.float32)


def pooled(scores: list[float], sources: list[int], weights: dict[str | int, float], score: float) -> float:
    """(1 + n Q) / (n + 1), with Q the weighted mean over sources of the share of their scores that are no lower."""
    n, total = len(scores), sum(weights[source] for source in set(sources))
    q = 0.0
    for source in set(sources):
        own = [value for value, at in zip(scores, sources, strict=True) if at == source]
        q += weights[source] / total * sum(value >= score for value in own) / len(own)
    return (1 + n * q) / (n + 1)


def simulated(rng: np.random.Generator, count: int, spread: float = 1.0) -> tuple[np.ndarray, list[int]]:
    """Scores of `count` sources of 5 to 40 images; each source has a mean of its own."""
    sizes = rng.integers(5, 41, count)
    sources = np.repeat(np.arange(count), sizes)
    return (rng.normal(size=len(sources)) + spread * rng.normal(size=count)[sources]).astype(np.float32), list(sources)


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
        assert (judge(float(p), alpha)[0] == "likely_ai") == exact


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
    assert judge(p_value, 0.01) == expected
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


@settings(max_examples=50, deadline=None)
@given(each=st.integers(1, 5), count=st.integers(1, 12), data=st.data())
def test_sources_of_equal_sizes_give_the_p_values_of_one_source_to_the_bit(
    each: int, count: int, data: st.DataObject
) -> None:
    n = each * count
    values = np.array(data.draw(st.lists(tied, min_size=n, max_size=n)), np.float32)
    scores = np.array([*data.draw(scores_lists), np.nan], np.float32)
    fit = Calibration.fit(values, [""] * n, [at % count for at in range(n)])
    assert fit.p_value(scores).tobytes() == before_sources(values, scores).tobytes()
    one = Calibration.fit(values, [""] * n)
    for alpha in (1 / (n + 1), 0.3, 0.9):
        if one.supports(alpha):
            assert fit.threshold(alpha) == one.threshold(alpha)
            assert fit.false_positive_interval(alpha) == one.false_positive_interval(alpha)
            assert fit.flagged_interval(alpha, 40) == one.flagged_interval(alpha, 40)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_with_sources_of_any_size_and_weight_p_is_pooled_and_ordered_and_has_a_floor(data: st.DataObject) -> None:
    values = data.draw(scores_lists)
    sources = data.draw(st.lists(st.integers(0, 4), min_size=len(values), max_size=len(values)))
    weights: dict[str | int, float] = {source: data.draw(st.floats(0.1, 10)) for source in set(sources)}
    weighted = data.draw(st.booleans())
    scores = np.sort(np.array(data.draw(scores_lists), np.float32))
    fit = Calibration.fit(np.array(values, np.float32), [""] * len(values), sources, weights if weighted else None)
    p = fit.p_value(scores)
    used = weights if weighted else dict.fromkeys(weights, 1.0)
    np.testing.assert_allclose(p, [pooled(values, sources, used, score) for score in scores], rtol=1e-6)
    assert (np.diff(p) <= 0).all()
    assert np.float32(fit.floor) <= p.min() and p.max() <= 1.0
    assert fit.p_value(np.array([np.inf, -np.inf], np.float32)).tolist() == [np.float32(fit.floor), 1.0]
    alpha = data.draw(st.floats(fit.floor, 0.999) | st.sampled_from([float(value) for value in p]))
    if fit.supports(alpha) and alpha < 1.0:
        threshold = fit.threshold(alpha)
        assert [score > threshold for score in scores] == [judge(float(v), alpha)[0] == "likely_ai" for v in p]
        low, high = fit.false_positive_interval(alpha)
        assert 0.0 <= low <= high <= 1.0


def test_a_large_source_does_not_decide_the_threshold() -> None:
    rng = np.random.default_rng(3)
    large, small = rng.normal(0.0, 1.0, 900), [rng.normal(2.0, 1.0, 10) for _ in range(9)]
    scores = np.r_[large, *small].astype(np.float32)
    sources = ["large"] * 900 + [f"small {at}" for at in range(9) for _ in range(10)]
    by_source, by_image = (Calibration.fit(scores, [""] * len(scores), given) for given in (sources, None))
    ranges = [fit.false_positive_interval(0.1) for fit in (by_source, by_image)]
    assert by_source.threshold(0.1) > by_image.threshold(0.1) + 0.5
    assert ranges[0][1] - ranges[0][0] > 2 * (ranges[1][1] - ranges[1][0]), "ninety images carry nine tenths"
    halves: dict[str | int, float] = {"large": 9.0, **{f"small {at}": 1.0 for at in range(9)}}
    half = Calibration.fit(scores, [""] * len(scores), sources, halves)
    assert by_image.threshold(0.1) < half.threshold(0.1) < by_source.threshold(0.1)


def test_new_images_of_the_same_sources_are_flagged_within_the_interval() -> None:
    rng, rounds, alpha, count = np.random.default_rng(4), 600, 0.05, 10
    inside = 0
    for _ in range(rounds):
        means, sizes = rng.normal(size=count), rng.integers(5, 60, count)
        drawn = [rng.normal(mean, 1.0, size) for mean, size in zip(means, sizes, strict=True)]
        fit = Calibration.fit(
            np.concatenate(drawn).astype(np.float32), [""] * sizes.sum(), np.repeat(np.arange(count), sizes).tolist()
        )
        realised = norm.sf(fit.threshold(alpha) - means).mean()
        low, high = fit.false_positive_interval(alpha)
        inside += low <= realised <= high
    assert 0.92 < inside / rounds < 0.995


def test_the_range_of_a_source_never_seen_is_that_of_a_calibration_on_the_others() -> None:
    scores, sources = simulated(np.random.default_rng(5), 12)
    fit = Calibration.fit(scores, [""] * len(scores), sources)
    numbers = np.array(sources)
    for alpha in (0.02, 0.1, fit.floor):
        rates = []
        for source in range(12):
            others = Calibration.fit(
                scores[numbers != source], [""] * (numbers != source).sum(), numbers[numbers != source].tolist()
            )
            rates.append((scores[numbers == source] > others.threshold(max(alpha, others.floor))).mean())
        found = fit.unseen_source(alpha)
        assert found is not None and found.sources == 12
        assert found.mean == pytest.approx(np.mean(rates)) and found.median == pytest.approx(np.median(rates))
        assert (found.low, found.high) == pytest.approx((min(rates), max(rates))), "under 19 sources it is all of them"


def test_left_out_sources_realise_alpha_on_average_and_a_new_source_falls_in_the_range() -> None:
    rng, rounds, alpha = np.random.default_rng(6), 120, 0.1
    means, inside = [], 0
    for _ in range(rounds):
        scores, sources = simulated(rng, 40, spread=0.7)
        fit = Calibration.fit(scores, [""] * len(scores), sources)
        found = fit.unseen_source(alpha)
        assert found is not None
        means.append(found.mean)
        new = rng.normal(0.7 * rng.normal(), 1.0, rng.integers(5, 41))
        inside += found.low <= (new > fit.threshold(alpha)).mean() <= found.high
    assert abs(np.mean(means) - alpha) < 0.015
    assert inside / rounds > 0.85


@pytest.mark.parametrize("count", [1, MIN_SOURCES - 1])
def test_with_few_sources_the_range_of_another_source_is_unknown_and_the_sentences_say_so(count: int) -> None:
    scores, sources = simulated(np.random.default_rng(7), count)
    fit = Calibration.fit(scores, [""] * len(scores), sources)
    assert fit.unseen_source(0.2) is None
    like, another, floor = fit.in_words(0.2)
    assert "(95 % range)" in like and "another source are flagged is unknown" in another
    assert ("does not know its sources" in another) == (count == 1)
    n = len(scores)
    assert floor == f"p cannot be below {1 / (n + 1):.2g}: 1 / (n + 1) of {n} calibration photographs."


def test_the_sentences_tell_photographs_like_these_from_a_source_never_seen() -> None:
    scores, sources = simulated(np.random.default_rng(8), 40)
    fit = Calibration.fit(scores, [""] * len(scores), sources)
    like, another, _ = fit.in_words(0.05)
    found = fit.unseen_source(0.05)
    assert found is not None and found.high > 0.1
    assert like.startswith(f"On photographs from the same 40 sources as the {len(scores)} of the calibration, between")
    assert another.startswith("On photographs from a source like these 40, but never seen, between")
    assert f"{100 * found.high:.0f} % are flagged at alpha 5 % (90 % range); " in another


def prone_example(flagged: int, images: int, sources: int) -> Calibration:
    """Eleven sources of 30 plain images, and `images` PNGs of `sources` of them, `flagged` of which score highest."""
    rng = np.random.default_rng(9)
    plain = rng.random(330)
    png = np.r_[2.0 + np.arange(flagged), np.zeros(images - flagged)]
    groups = [*np.repeat(np.arange(11), 30).tolist(), *[at % sources for at in range(images)]]
    strata = ["jpeg|512-1024"] * 330 + ["png|0-256"] * images
    return Calibration.fit(np.r_[plain, png].astype(np.float32), strata, groups)


@pytest.mark.parametrize(
    ("flagged", "images", "sources", "prone"),
    [
        (6, PRONE_MIN_IMAGES, 2, True),
        (2, PRONE_MIN_IMAGES, 2, False),
        (6, PRONE_MIN_IMAGES - 1, 2, False),
        (6, PRONE_MIN_IMAGES, 1, False),
    ],
)
def test_a_stratum_is_prone_if_held_out_sources_flag_it_three_times_as_often_as_alpha(
    flagged: int, images: int, sources: int, prone: bool
) -> None:
    fit = prone_example(flagged, images, sources)
    rule = fit.rule(0.05, cap=True)
    assert rule.prone == ({"png|0-256"} if prone else frozenset())
    assert bool(rule.in_words()) == prone and all("png|0-256" in sentence for sentence in rule.in_words())
    assert fit.prone_strata(0.3) == frozenset(), f"nothing is flagged {PRONE_FACTOR:g} times as often as 30 %"


@pytest.mark.parametrize(
    ("p_value", "capped", "uncapped", "reason"),
    [
        (0.01, "inconclusive", "likely_ai", "below_alpha"),
        (0.05, "inconclusive", "inconclusive", "near_alpha"),
        (0.06, "no_ai_signal", "no_ai_signal", "above_alpha"),
    ],
)
def test_on_a_prone_stratum_the_verdict_is_at_most_inconclusive_unless_configured(
    p_value: float, capped: str, uncapped: str, reason: str
) -> None:
    for cap, expected in ((True, capped), (False, uncapped)):
        rule = Rule(0.01, frozenset({"png|0-256"}), cap)
        assert rule.verdict(p_value, "png|0-256") == (expected, [reason, "stratum_prone"])
        assert rule.verdict(p_value, "jpeg|0-256") == (uncapped, [reason])


def test_sources_are_numbered_without_their_names_and_whatever_their_order() -> None:
    values, names = np.arange(6, dtype=np.float32), ["lake", "tower", "lake", "harbour", "tower", "lake"]
    fit = Calibration.fit(values, ["a"] * 6, names)
    assert fit.sources.dtype == np.int32 and sorted(set(fit.sources.tolist())) == [0, 1, 2] and fit.source_count == 3
    assert [fit.sources[0] == fit.sources[at] for at in range(6)] == [name == "lake" for name in names]
    backwards = Calibration.fit(values[::-1], ["a"] * 6, names[::-1])
    assert backwards.sources.tolist() == fit.sources.tolist() and backwards.calibration_id == fit.calibration_id


def test_the_calibration_id_follows_sources_and_weights_but_not_that_of_one_source() -> None:
    values = np.arange(6, dtype=np.float32)
    one, named = Calibration.fit(values, ["a"] * 6), Calibration.fit(values, ["a"] * 6, ["lake"] * 6)
    two, other = (Calibration.fit(values, ["a"] * 6, given) for given in ([0, 1] * 3, [0, 0, 0, 1, 1, 1]))
    weighted = Calibration.fit(values, ["a"] * 6, [0, 1] * 3, {0: 1.0, 1: 2.0})
    assert one.calibration_id == named.calibration_id
    assert len({fit.calibration_id for fit in (one, two, other, weighted)}) == 4
    assert Calibration.fit(values, ["a"] * 6, [0, 1] * 3, {0: 2.0, 1: 2.0}).weights is None


@pytest.mark.parametrize("weights", [{0: 1.0}, {0: 1.0, 1: 0.0}, {0: 1.0, 1: -1.0}, {0: 1.0, 1: np.inf}])
def test_a_source_without_a_positive_weight_is_refused(weights: dict[str | int, float]) -> None:
    with pytest.raises(CalibrationError, match="positive weight"):
        Calibration.fit(np.arange(4, dtype=np.float32), ["a"] * 4, [0, 0, 1, 1], weights)


def test_the_p_value_within_a_stratum_pools_the_sources_that_it_has() -> None:
    rng = np.random.default_rng(10)
    sources = [0] * 80 + [1] * 30 + [2] * 200
    strata = ["png|0-256"] * 110 + ["jpeg|0-256"] * 200
    values = rng.normal(size=310).astype(np.float32)
    fit = Calibration.fit(values, strata, sources, {0: 1.0, 1: 3.0, 2: 5.0})
    expected = pooled(values[:110].tolist(), sources[:110], {0: 1.0, 1: 3.0}, 0.5)
    assert fit.p_stratum(np.array([0.5], np.float32), ["png|0-256"])[0] == pytest.approx(expected)
