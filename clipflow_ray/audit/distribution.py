"""Distribution of an audit's scores and p-values beside that of the calibration, counted in constant memory.

The calibration's scores weigh as they do in p-values: each source the same, unless its checkpoint says otherwise.
"""

from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from clipflow_ray.audit.record import ScoreHistogram
from clipflow_ray.model.calibration import Calibration

_BINS: Final = 30
_P_BINS: Final = 20


class Distribution:
    """Counts of scores and p-values over bins, and of scores between the ascending scores of the calibration."""

    def __init__(self, calibration: Calibration) -> None:
        self._calibration, self._weights = calibration.scores, calibration.image_weights
        low, high = np.quantile(self._calibration, [0.02, 0.9])
        width = max(float(high - low), 1e-6)
        self._edges = np.linspace(float(low) - 0.5 * width, float(high) + 1.5 * width, _BINS + 1)
        self._scores = np.zeros(_BINS, np.int64)
        self._coarse = np.zeros(2**16, np.int64)
        self._p_values = np.zeros(_P_BINS, np.int64)
        self._at_most = np.zeros(len(self._calibration) + 1, np.int64)  # by the number of smaller calibration scores
        self._below = np.zeros(len(self._calibration) + 1, np.int64)  # by the number of smaller or equal ones

    def add(self, scores: NDArray[np.float32], p_values: NDArray[np.float32]) -> None:
        """Count a batch: scores and p-values, float32 [N] each, without NaN."""
        self._scores += self._binned(scores).astype(np.int64)
        self._coarse += np.bincount(_ordered(scores) >> 16, minlength=2**16)
        self._p_values += np.histogram(p_values, bins=_P_BINS, range=(0.0, 1.0))[0]
        smaller = np.searchsorted(self._calibration, scores, side="left")
        self._at_most += np.bincount(smaller, minlength=len(self._at_most))
        not_larger = np.searchsorted(self._calibration, scores, side="right")
        self._below += np.bincount(not_larger, minlength=len(self._below))

    def p_values(self) -> tuple[int, ...]:
        """Counts of p-values over 20 equal bins from 0 to 1."""
        return tuple(int(count) for count in self._p_values)

    def histogram(self) -> ScoreHistogram:
        """Shares of audit and calibration over the same bins; scores beyond the outer edges count in the end bins."""
        own, theirs = self._scores, self._binned(self._calibration, self._weights)
        return ScoreHistogram(
            edges=tuple(self._edges.tolist()),
            audit=tuple((own / max(1, own.sum())).tolist()),
            calibration=tuple((theirs / theirs.sum()).tolist()),
        )

    def median(self) -> float | None:
        """The median score, accurate to half a percent; None if there are no scores.

        It comes from counts of the upper 16 bits of the scores: sign, exponent and seven bits of the mantissa.
        """
        count = int(self._coarse.sum())
        if count == 0:
            return None
        sums = np.cumsum(self._coarse)
        place = int(np.searchsorted(sums, count / 2.0))
        low, high = _from_ordered(np.array([place << 16, (place << 16) | 0xFFFF], np.uint32))
        before = int(sums[place] - self._coarse[place])
        return float(low + (high - low) * (count / 2.0 - before) / self._coarse[place])

    def calibration_median(self) -> float:
        """The weighted median score of the calibration; that of the plain scores if all weigh the same."""
        around = np.array([0.5 - 1e-9, 0.5 + 1e-9])  # two scores if exactly half of the weight lies on each side
        return float(np.quantile(self._calibration, around, weights=self._weights, method="inverted_cdf").mean())

    def distance(self) -> tuple[float, float]:
        """Kolmogorov-Smirnov distance from the calibration and its asymptotic p-value.

        The two distribution functions differ most at a calibration score or right below one, so counts between the
        calibration scores are enough. Unequal weights lower the effective number of calibration scores.
        """
        n, count = len(self._calibration) ** 2 / float((self._weights**2).sum()), int(self._at_most.sum())
        below = np.r_[0.0, np.cumsum(self._weights)] / len(self._weights)
        largest = 0.0
        sides: tuple[Literal["right", "left"], ...] = ("right", "left")
        for counts, side in zip((self._at_most, self._below), sides, strict=True):
            theirs = below[np.searchsorted(self._calibration, self._calibration, side=side)]
            largest = max(largest, float(np.abs(np.cumsum(counts)[:-1] / count - theirs).max()))
        return largest, float(stats.kstwo.sf(largest, round(n * count / (n + count))))

    def _binned(
        self, scores: NDArray[np.float32], weights: NDArray[np.float64] | None = None
    ) -> NDArray[np.int64] | NDArray[np.float64]:
        return np.histogram(np.clip(scores, self._edges[0], self._edges[-1]), bins=self._edges, weights=weights)[0]


def _ordered(scores: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Integers that sort as the floats do."""
    bits = np.ascontiguousarray(scores, np.float32).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _from_ordered(numbers: NDArray[np.uint32]) -> NDArray[np.float64]:
    """The floats that `_ordered` turns into these integers."""
    bits = np.where(numbers >> 31, numbers & np.uint32(0x7FFFFFFF), ~numbers)
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)
