"""Conformal p-values and thresholds from held-out natural images of several sources, and the rates that they realise.

Each source weighs the same, or as its weight says: Q(s) is the weighted mean over sources of the share of a source's
calibration scores that are at least s (CDF pooling: Dunn, Wasserman and Ramdas, arXiv 1809.07441; Lee, Barber and
Willett, arXiv 2306.06342). The p-value of a score is (1 + n Q) / (n + 1). With one source, or with sources of equal
sizes, it is the conformal p-value (1 + #{calibration >= score}) / (n + 1): under exchangeability at most alpha of
natural images have p <= alpha (Vovk et al.; Bates et al. 2023, arXiv 2104.08279). Given such a calibration set, the
realised false-positive rate at alpha is Beta(k, n + 1 - k) with k = floor(alpha * (n + 1)).

Two ranges answer two questions. `false_positive_interval` is for photographs that are drawn as the calibration's were.
`unseen_source` is for all photographs of a source that the calibration does not hold; it is wider.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import betaincinv

from clipflow_ray.config import Closed
from clipflow_ray.errors import CalibrationError

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
Mask = NDArray[np.bool_]
Verdict = Literal["likely_ai", "inconclusive", "no_ai_signal"]
Reason = Literal["below_alpha", "near_alpha", "above_alpha", "stratum_prone"]

MIN_STRATUM: Final = 100
# With fewer sources, leaving one out says little about a source that was never seen.
MIN_SOURCES: Final = 5
# A stratum is prone to false alarms if held-out sources show this many times alpha, on this many images and sources.
PRONE_FACTOR: Final = 3.0
PRONE_MIN_IMAGES: Final = 20
PRONE_MIN_SOURCES: Final = 2
PRONE_MIN_FLAGGED: Final = 2  # one flagged image among 20 is common by chance
# A p-value above alpha and at most this many times alpha is `inconclusive`.
INCONCLUSIVE_FACTOR: Final = 5.0
# What each verdict and each reason means; docs/formats.md shows these sentences.
VERDICTS: Final[dict[Verdict, str]] = {
    "likely_ai": "The p-value is at most alpha. A share alpha of photographs like the calibration's gets it.",
    "inconclusive": (
        f"The p-value is above alpha and at most {INCONCLUSIVE_FACTOR:g} times alpha, or it is at most alpha and the "
        "reason `stratum_prone` forbids more."
    ),
    "no_ai_signal": f"The p-value is above {INCONCLUSIVE_FACTOR:g} times alpha. This does not prove a photograph.",
}
REASONS: Final[dict[Reason, str]] = {
    "below_alpha": "The p-value is at most alpha.",
    "near_alpha": f"The p-value is above alpha and at most {INCONCLUSIVE_FACTOR:g} times alpha.",
    "above_alpha": f"The p-value is above {INCONCLUSIVE_FACTOR:g} times alpha.",
    "stratum_prone": (
        f"Calibration photographs of this format and size are flagged at least {PRONE_FACTOR:g} times as often as "
        "alpha, measured on held-out sources. Unless `cap_prone_strata` is off, the verdict is at most `inconclusive`."
    ),
}
# A p-value is rounded to float32, so a comparison with alpha allows for a little more.
_SLACK: Final = 1.0 + 1e-6


class SourceRange(Closed):
    """Flagged shares of whole sources at one alpha, each source judged by a calibration on all the others.

    Every source counts once, whatever its size and weight.
    """

    sources: int = Field(description="Number of calibration sources.")
    median: float = Field(description="Half of the sources have at most this flagged share.")
    mean: float = Field(description="Mean of the flagged shares.")
    low: float = Field(description="Lower end of the 90 % range of the flagged share of a source never seen.")
    high: float = Field(
        description="Upper end of that range. With fewer than 19 sources the ends are the smallest and largest share."
    )


@dataclass(frozen=True)
class Rule:
    """What turns a p-value into a verdict. Detector, audit and endpoint all judge by it.

    `prone` are the strata of format and size whose photographs are flagged too often at `alpha`; see
    `Calibration.prone_strata`. With `cap`, an image of such a stratum is at most `inconclusive`.
    """

    alpha: float
    prone: frozenset[str]
    cap: bool

    def verdict(self, p_value: float, stratum: str) -> tuple[Verdict, list[Reason]]:
        """Return the verdict on an image with this p-value and stratum, and its reasons."""
        prone: list[Reason] = ["stratum_prone"] if stratum in self.prone else []
        if p_value <= self.alpha * _SLACK:
            return "inconclusive" if prone and self.cap else "likely_ai", ["below_alpha", *prone]
        if p_value <= INCONCLUSIVE_FACTOR * self.alpha * _SLACK:
            return "inconclusive", ["near_alpha", *prone]
        return "no_ai_signal", ["above_alpha", *prone]

    def in_words(self) -> tuple[str, ...]:
        """Return a sentence on the prone strata for people; nothing if there are none."""
        if not self.prone:
            return ()
        cap = "their verdict is at most inconclusive" if self.cap else "their verdicts are not capped, as configured"
        return (
            f"Photographs of these formats and sizes are flagged at least {PRONE_FACTOR:g} times as often as alpha "
            f"{_percent(self.alpha)}, so {cap}: {', '.join(sorted(self.prone))}.",
        )


@dataclass(frozen=True)
class Calibration:
    """Scores of held-out naturals: float32 [n], ascending, with the stratum and the source of each.

    `sources` are numbers from 0 to K - 1, int32 [n]. They say which images share a source, and nothing else about it.
    `weights` are those of the sources: float64 [K], positive, with sum 1. None means that each weighs the same.
    """

    scores: F32
    strata: tuple[str, ...]
    sources: I32
    weights: F64 | None = None

    @classmethod
    def fit(
        cls,
        scores: F32,
        strata: Sequence[str],
        sources: Sequence[str | int] | None = None,
        weights: Mapping[str | int, float] | None = None,
    ) -> "Calibration":
        """Sort scores [n] with the stratum and the source of each.

        `sources` holds a name or a number for each score. Only numbers in the order of a hash of the names are kept.
        None stands for images of unknown sources; they count as one source. `weights` holds a positive number for
        each source, in any unit. Without it each source weighs the same. Raises CalibrationError if there are no
        scores, if one is not finite, or if a weight is missing or not positive.
        """
        if len(scores) == 0 or not np.isfinite(scores).all():
            raise CalibrationError("Calibration needs natural images with finite scores; check the calibration split.")
        names = [""] * len(scores) if sources is None else [str(name) for name in sources]
        ranked = sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        number = {name: at for at, name in enumerate(ranked)}
        order = np.argsort(scores, kind="stable")
        return cls(
            scores[order].astype(np.float32),
            tuple(strata[i] for i in order),
            np.array([number[names[i]] for i in order], np.int32),
            None if weights is None else _shares(ranked, weights),
        )

    @property
    def calibration_id(self) -> str:
        """16 hex digits over scores and strata, and over sources and weights if there are several sources."""
        digest = hashlib.sha256(self.scores.tobytes())
        digest.update("\n".join(self.strata).encode())
        if self.source_count > 1:
            digest.update(self.sources.astype("<i4").tobytes())
            digest.update(b"" if self.weights is None else self.weights.astype("<f8").tobytes())
        return digest.hexdigest()[:16]

    @property
    def source_count(self) -> int:
        """Number of sources K. Images of unknown sources count as one source."""
        return int(self.sources.max()) + 1

    @property
    def floor(self) -> float:
        """The smallest p-value that there is: 1 / (n + 1), rounded to float32 as p-values are."""
        return float(self._p_by_place[-1])

    @cached_property
    def image_weights(self) -> F64:
        """Weight of each score, float64 [n], with mean 1. All are 1 if the sources are of equal sizes and weights."""
        return _image_weights(self.sources, self.weights)

    @cached_property
    def held_out_p(self) -> F32:
        """p-value of each calibration image by a calibration on all other sources, float32 [n]; NaN with one source."""
        result = np.full(len(self.scores), np.nan, np.float32)
        for source in range(self.source_count if self.source_count > 1 else 0):
            own = self.sources == source
            result[own] = self._p_among(~own, self.scores[own])
        return result

    def p_value(self, scores: F32) -> F32:
        """Return pooled p-values, float32 [N], from 1 / (n + 1) to 1; NaN for a NaN score."""
        return _p_values(self.scores, self._p_by_place, scores)

    def p_stratum(self, scores: F32, strata: list[str]) -> F32:
        """Return p-values within each image's stratum, float32 [N]; NaN if it has under 100 calibration images.

        The sources that have images in the stratum are pooled as all sources are for `p_value`.
        """
        result = np.full(len(scores), np.nan, np.float32)
        names, wanted = np.array(self.strata), np.array(strata)
        for name in sorted(set(strata)):
            own = names == name
            if own.sum() >= MIN_STRATUM:
                result[wanted == name] = self._p_among(own, scores[wanted == name])
        return result

    def supports(self, alpha: float) -> bool:
        """Whether there are enough scores for `alpha`, that is whether it is at least 1 / (n + 1)."""
        return self._places(alpha) >= 1

    def threshold(self, alpha: float) -> float:
        """Return the score above which p <= alpha. Raises CalibrationError if alpha is below 1 / (n + 1)."""
        return float(self.scores[len(self.scores) - self._rank(alpha)])

    def rule(self, alpha: float, cap: bool) -> Rule:
        """Return the rule of verdicts at `alpha`; `cap` limits those on prone strata. Raises as `threshold` does."""
        return Rule(alpha, self.prone_strata(alpha), cap)

    def false_positive_interval(self, alpha: float) -> tuple[float, float]:
        """Return the 95 % interval of the false-positive rate that `alpha` realises on exchangeable naturals.

        These are photographs that are drawn as the calibration's were: from the same sources, in the proportions of
        their weights. For a new source see `unseen_source`. Sources of unequal sizes or weights lower the effective
        number of images, n_eff = 1 / sum(w^2) over the images' weights w (which sum to 1), and so widen the interval.
        """
        low, high = betaincinv(*self._beta(alpha), [0.025, 0.975])
        return float(low), float(high)

    def flagged_interval(self, alpha: float, n_test: int) -> tuple[float, float]:
        """Return the 95 % interval of the flagged share of `n_test` exchangeable naturals (beta-binomial)."""
        from scipy import stats  # imported here: it takes half a second, and only evaluations need it

        low, high = stats.betabinom.ppf([0.025, 0.975], n_test, *self._beta(alpha))
        return float(low) / n_test, float(high) / n_test

    def unseen_source(self, alpha: float) -> SourceRange | None:
        """Return the flagged shares of sources that the calibration does not hold; None below 5 sources.

        Each source in turn is left out and judged by the others at `alpha`, or at the smallest p-value that the others
        give if `alpha` is below it. The 90 % range is between order statistics: if the sources and a new one are
        exchangeable, the new one's share lies inside with that probability. Raises as `threshold` does.
        """
        flagged = self._held_out_flagged(alpha)
        if self.source_count < MIN_SOURCES:
            return None
        rates = np.bincount(self.sources, weights=flagged) / np.bincount(self.sources)
        low, median, high = np.quantile(rates, [0.05, 0.5, 0.95], method="weibull").tolist()
        return SourceRange(sources=len(rates), median=median, mean=float(rates.mean()), low=low, high=high)

    def prone_strata(self, alpha: float) -> frozenset[str]:
        """Return the strata whose photographs are flagged at least three times as often as `alpha`.

        This is the share of a stratum's calibration images that are flagged when their own source is left out. A
        stratum with under 20 images, with images of one source only, or with a single flagged image is not named.
        Raises as `threshold` does.
        """
        names, place, known = self._stratum_facts
        of, hits = np.bincount(place), np.bincount(place, weights=self._held_out_flagged(alpha))
        prone = known & (hits >= PRONE_MIN_FLAGGED) & (hits * _SLACK >= PRONE_FACTOR * alpha * of)
        return frozenset(names[prone].tolist())

    def in_words(self, alpha: float) -> tuple[str, ...]:
        """Return what `alpha` and a p-value mean with this calibration, as sentences for people.

        Raises as `threshold` does.
        """
        n, count, at = len(self.scores), self.source_count, f"are flagged at alpha {_percent(alpha)}"
        low, high = map(_percent, self.false_positive_interval(alpha))
        like = f"from the same {count} sources as the {n:,}" if count > 1 else f"like the {n:,}"
        unseen, unknown = self.unseen_source(alpha), "how many of another source are flagged is unknown"
        if unseen is not None:
            most = f"half of the sources at most {_percent(unseen.median)}" if unseen.median else "most often none"
            another = (
                f"On photographs from a source like these {count}, but never seen, between {_percent(unseen.low)} and "
                f"{_percent(unseen.high)} {at} (90 % range); {most}, on "
                f"average {_percent(unseen.mean)}."
            )
        elif count > 1:
            another = f"The calibration has only {count} sources: {unknown}."
        else:
            another = f"The calibration of this checkpoint does not know its sources, or has only one: {unknown}."
        return (
            f"On photographs {like} of the calibration, between {low} and {high} {at} (95 % range).",
            another,
            floor_in_words(n),
        )

    @cached_property
    def _tail(self) -> F64:
        """Total weight of the scores from each place on, float64 [n + 1], from n down to 0."""
        return _tail(self.image_weights)

    @cached_property
    def _p_by_place(self) -> F32:
        return _p_by_place(self._tail)

    @cached_property
    def _stratum_facts(self) -> tuple[NDArray[np.str_], NDArray[np.int64], Mask]:
        """The distinct strata, the place of each image's among them, and which have enough images and sources."""
        names, place, of = np.unique(np.array(self.strata), return_inverse=True, return_counts=True)
        pairs = np.unique(place.astype(np.int64) * self.source_count + self.sources)
        kinds = np.bincount(pairs // self.source_count)
        return names, place, (of >= PRONE_MIN_IMAGES) & (kinds >= PRONE_MIN_SOURCES)

    def _p_among(self, chosen: Mask, scores: F32) -> F32:
        """p-values of `scores` by the chosen calibration images alone, with the weights of their sources."""
        weights = _image_weights(self.sources[chosen], self.weights)
        return _p_values(self.scores[chosen], _p_by_place(_tail(weights)), scores)

    def _held_out_flagged(self, alpha: float) -> Mask:
        """Which calibration images the other sources flag at `alpha`, bool [n]; none with one source."""
        self._rank(alpha)
        size = np.bincount(self.sources)[self.sources]
        smallest = 1.0 / (len(self.scores) - size + 1)
        flagged: Mask = self.held_out_p.astype(np.float64) <= np.maximum(alpha, smallest) * _SLACK
        return flagged

    def _beta(self, alpha: float) -> tuple[float, float]:
        """Parameters of the Beta distribution of the rate that `alpha` realises on exchangeable naturals."""
        n, rank = len(self.scores), self._rank(alpha)
        effective = n**2 / float((self.image_weights**2).sum())
        k = (1.0 + float(self._tail[n - rank + 1])) * (effective + 1.0) / (n + 1.0)
        return k, effective + 1.0 - k

    def _rank(self, alpha: float) -> int:
        if not 0.0 < alpha < 1.0:
            raise CalibrationError(f"alpha {alpha:g} is not between 0 and 1: ask for one such as 0.01.")
        n, rank = len(self.scores), self._places(alpha)
        if rank < 1:
            raise CalibrationError(
                f"alpha {alpha:g} is below 1 / (n + 1) = {1 / (n + 1):.2g} for {n} calibration images: "
                f"ask for a larger alpha, or calibrate on at least {np.ceil(1 / alpha) - 1:.0f} natural images."
            )
        return rank

    def _places(self, alpha: float) -> int:
        """Number of places among the scores, from the top, at which a score has p <= alpha; at most n."""
        low_enough = self._p_by_place.astype(np.float64) <= alpha * _SLACK
        return min(len(self.scores), int(low_enough.sum()))  # an alpha just below 1 would count all n + 1 places


def floor_in_words(n: int) -> str:
    """Return the smallest p-value with n calibration images, as a sentence for people."""
    return f"p cannot be below {1.0 / (n + 1):.2g}: 1 / (n + 1) of {n:,} calibration photographs."


def _shares(names: Sequence[str], weights: Mapping[str | int, float]) -> F64 | None:
    """Weights of `names` with sum 1; None if they are all equal."""
    given = {str(name): weight for name, weight in weights.items()}
    values = np.array([given.get(name, 0.0) for name in names], np.float64)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise CalibrationError("Each calibration source needs a positive weight; name one for every source.")
    return None if (values == values[0]).all() else values / values.sum()


def _image_weights(sources: I32, weights: F64 | None) -> F64:
    """Weights of images with mean 1, from those of the sources that occur; exactly 1 for sources of equal sizes."""
    present, place, size = np.unique(sources, return_inverse=True, return_counts=True)
    if weights is None:
        each = len(sources) / (len(present) * size)
    else:
        each = len(sources) * weights[present] / weights[present].sum() / size
    spread: F64 = each[place]
    return spread


def _tail(image_weights: F64) -> F64:
    sums = np.r_[np.cumsum(image_weights[::-1])[::-1], 0.0]
    tail: F64 = np.minimum(sums, len(image_weights))
    return tail


def _p_by_place(tail: F64) -> F32:
    """p-value of a score by the number of smaller calibration scores, float32 [n + 1]."""
    return ((1.0 + tail) / len(tail)).astype(np.float32)


def _p_values(calibration: F32, p_by_place: F32, scores: F32) -> F32:
    smaller = np.searchsorted(calibration, scores, side="left")
    return np.where(np.isnan(scores), np.float32(np.nan), p_by_place[smaller])


def _percent(share: float) -> str:
    value = 100.0 * share
    return f"{value:.0f} %" if value >= 10 else f"{value:.2g} %"
