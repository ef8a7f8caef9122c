"""How an audit's scores and p-values are distributed, against the calibration's; in memory that does not grow."""

from typing import Any, Final, Literal

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as pads
from numpy.typing import NDArray
from pyarrow import acero
from scipy import stats

_BINS: Final = 30
_P_BINS: Final = 20


class Distribution:
    """Counts of scores and p-values of scored images, over bins and between the calibration's scores (ascending)."""

    def __init__(self, calibration: NDArray[np.float32]) -> None:
        self._calibration = calibration
        low, high = np.quantile(calibration, [0.02, 0.9])
        width = max(float(high - low), 1e-6)
        self._edges = np.linspace(float(low) - 0.5 * width, float(high) + 1.5 * width, _BINS + 1)
        self._scores = np.zeros(_BINS, np.int64)
        self._p_values = np.zeros(_P_BINS, np.int64)
        self._at_most = np.zeros(len(calibration) + 1, np.int64)  # by the calibration scores that are smaller
        self._below = np.zeros(len(calibration) + 1, np.int64)  # by those that are smaller or equal

    def add(self, scores: NDArray[np.float32], p_values: NDArray[np.float32]) -> None:
        """Count a batch."""
        self._scores += self._binned(scores)
        self._p_values += np.histogram(p_values, bins=_P_BINS, range=(0.0, 1.0))[0]
        smaller = np.searchsorted(self._calibration, scores, side="left")
        self._at_most += np.bincount(smaller, minlength=len(self._at_most))
        not_larger = np.searchsorted(self._calibration, scores, side="right")
        self._below += np.bincount(not_larger, minlength=len(self._below))

    def p_values(self) -> list[int]:
        """Counts over 20 equal bins."""
        return [int(count) for count in self._p_values]

    def histogram(self) -> dict[str, Any]:
        """Densities over shared bins around the bulk of the calibration; what lies beyond is in the end bins."""
        own, theirs = self._scores, self._binned(self._calibration)
        return {
            "edges": self._edges.tolist(),
            "audit": (own / max(1, own.sum())).tolist(),
            "calibration": (theirs / theirs.sum()).tolist(),
        }

    def distance(self) -> tuple[float, float]:
        """Kolmogorov-Smirnov distance from the calibration and its asymptotic p-value.

        The two distribution functions differ most at a calibration score or right below it, so counts between those
        are all it takes.
        """
        n, count = len(self._calibration), int(self._at_most.sum())
        largest = 0.0
        sides: tuple[Literal["right", "left"], ...] = ("right", "left")
        for counts, side in zip((self._at_most, self._below), sides, strict=True):
            theirs = np.searchsorted(self._calibration, self._calibration, side=side) / n
            largest = max(largest, float(np.abs(np.cumsum(counts)[:-1] / count - theirs).max()))
        return largest, float(stats.kstwo.sf(largest, round(n * count / (n + count))))

    def _binned(self, scores: NDArray[np.float32]) -> NDArray[np.int64]:
        return np.histogram(np.clip(scores, self._edges[0], self._edges[-1]), bins=self._edges)[0].astype(np.int64)


def median(rows: pads.Dataset, column: str, only: pc.Expression) -> float | None:
    """The median of a column by t-digest, within about a thousandth of the ranks; None where there is no row."""
    plan = acero.Declaration.from_sequence(
        [
            acero.Declaration("scan", acero.ScanNodeOptions(rows, columns=[column, "status"], filter=only)),
            acero.Declaration("filter", acero.FilterNodeOptions(only)),
            acero.Declaration(
                "aggregate", acero.AggregateNodeOptions([(column, "approximate_median", None, "median")])
            ),
        ]
    )
    value = plan.to_table()["median"][0].as_py()
    return None if value is None else float(value)
