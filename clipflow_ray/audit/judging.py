"""Verdicts and q-values of an audit, by p-value.

n calibration scores allow only n + 1 different p-values. So a q-value depends on how often each of them occurs, and
what is to be said of a p-value is looked up in a table.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clipflow_ray.columns import Values
from clipflow_ray.model.calibration import Rule

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


class PValues:
    """How often each p-value occurs: `values` ascending, float32 [M], and `counts`, int64 [M]."""

    def __init__(self) -> None:
        self.values: F32 = np.empty(0, np.float32)
        self.counts: I64 = np.empty(0, np.int64)

    def add(self, values: F32, sign: int = 1) -> None:
        """Count p-values [N], without those that are NaN. With `sign` -1 they count no more."""
        values, counts = np.unique(values[~np.isnan(values)], return_counts=True)
        self.values, place = np.unique(np.r_[self.values, values], return_inverse=True)
        counts = np.r_[self.counts, sign * counts]
        self.counts = np.zeros(len(self.values), np.int64)
        np.add.at(self.counts, place, counts)

    def q_values(self) -> F32:
        """Benjamini-Hochberg q-value of each value, float32 [M]; NaN for a value that occurs no more."""
        p, ranks = self.values.astype(np.float64), np.cumsum(self.counts)
        q = np.full(len(p), np.nan)
        here = self.counts > 0
        raised = p[here] * ranks[-1:] / ranks[here]
        q[here] = np.minimum(1.0, np.minimum.accumulate(raised[::-1])[::-1])
        return q.astype(np.float32)


class Judge:
    """What `rule` says of rows whose p-values are all among `p_values`."""

    def __init__(self, rule: Rule, p_values: PValues) -> None:
        self._prone = pa.array(sorted(rule.prone), pa.string())
        self._p, self._q = p_values.values, p_values.q_values()
        some = next(iter(rule.prone), "")
        by_rule = [(replace(rule, prone=frozenset()), ""), (rule, some)]  # on other strata, and on prone ones
        said = [[each.verdict(p, stratum) for p in self._p.tolist()] for each, stratum in by_rule]
        names = sorted({(verdict, tuple(reasons)) for row in said for verdict, reasons in row})
        number = {outcome: at for at, outcome in enumerate(names)}
        self._outcome: I64 = np.array(
            [[number[verdict, tuple(reasons)] for verdict, reasons in row] for row in said], np.int64
        ).reshape(2, -1)
        self._verdicts = pa.array([verdict for verdict, _ in names], pa.string())
        self._reasons = pa.array([reasons for _, reasons in names], pa.list_(pa.string()))

    def columns(self, p_values: F32, strata: pa.ChunkedArray) -> dict[str, Values]:
        """q_value, verdict and verdict_reasons of rows [N] with these p-values and strata; null if a p-value is NaN."""
        none = np.isnan(p_values)
        place = np.where(none, 0, np.searchsorted(self._p, p_values))
        prone = pc.is_in(pc.fill_null(strata, ""), self._prone).to_numpy().astype(np.int64)
        if len(self._p) == 0:
            outcome, q = np.zeros(len(none), np.int64), np.full(len(none), np.nan, np.float32)
        else:
            outcome, q = self._outcome[prone, place], np.where(none, np.float32(np.nan), self._q[place])
        outcomes = pa.array(outcome, mask=none)
        return {
            "q_value": q,
            "verdict": self._verdicts.take(outcomes),
            "verdict_reasons": self._reasons.take(outcomes),
        }
