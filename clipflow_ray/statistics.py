"""Statistics that several parts of the package report: AUROC, Wilson intervals and rates of flagged images."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import stats

from clipflow_ray.config import Closed

Floats = NDArray[np.floating[Any]]


def auroc(negative: Floats, positive: Floats) -> float:
    """Area under the ROC curve of scores [N] and [M]; higher scores are more suspicious."""
    ranks = stats.rankdata(np.r_[negative, positive])[len(negative) :]
    return float((ranks.mean() - (len(positive) + 1) / 2) / len(negative))


def wilson(count: int, of: int) -> tuple[float, float]:
    """95 % Wilson interval of the share `count / of`."""
    interval = stats.binomtest(count, of).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


class FlaggedRate(Closed):
    """Number and share of flagged images at one alpha. If no image is scored, the last three fields are null.

    AI-generated images raise the excess over alpha. A domain shift raises it too.
    """

    count: int = Field(description="Images with verdict `likely_ai`.")
    of: int = Field(description="Scored images.")
    share: float | None = Field(description="`count / of`.")
    wilson_95: tuple[float, float] | None = Field(description="95 % Wilson interval of `share`.")
    excess_lower_bound: float | None = Field(
        description="`(low - alpha) / (1 - alpha)`, at least 0; low is the lower end of `wilson_95`."
    )


def flagged_rate(count: int, scored: int, alpha: float) -> FlaggedRate:
    """The rate of `count` flagged images among `scored` ones at `alpha`."""
    if scored == 0:
        return FlaggedRate(count=0, of=0, share=None, wilson_95=None, excess_lower_bound=None)
    low, high = wilson(count, scored)
    return FlaggedRate(
        count=count,
        of=scored,
        share=count / scored,
        wilson_95=(low, high),
        excess_lower_bound=excess_lower_bound(low, alpha),
    )


def excess_lower_bound(low: float, alpha: float) -> float:
    """Lower bound of the excess over `alpha` of a share whose interval begins at `low`; at least 0."""
    return max(0.0, (low - alpha) / (1.0 - alpha))
