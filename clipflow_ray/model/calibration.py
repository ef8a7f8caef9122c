"""Conformal p-values and thresholds from held-out natural images, and intervals of the rates that they realise.

A score's p-value is (1 + #{calibration >= score}) / (n + 1): under exchangeability at most alpha of natural
images have p <= alpha (Vovk et al.; Bates et al. 2023, arXiv 2104.08279). Given the calibration set, the realised
false-positive rate at alpha is Beta(k, n + 1 - k) with k = floor(alpha * (n + 1)).
"""

import hashlib
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from clipflow_ray.errors import CalibrationError

F32 = NDArray[np.float32]
Verdict = Literal["likely_ai", "inconclusive", "no_ai_signal"]
Reason = Literal["below_alpha", "near_alpha", "above_alpha"]

MIN_STRATUM: Final = 100
# A p-value above alpha and at most this many times alpha is `inconclusive`.
INCONCLUSIVE_FACTOR: Final = 5.0
# What each verdict and each reason means; docs/formats.md shows these sentences.
VERDICTS: Final[dict[Verdict, str]] = {
    "likely_ai": "The p-value is at most alpha. A share alpha of photographs like the calibration's gets it.",
    "inconclusive": f"The p-value is above alpha and at most {INCONCLUSIVE_FACTOR:g} times alpha.",
    "no_ai_signal": f"The p-value is above {INCONCLUSIVE_FACTOR:g} times alpha. This does not prove a photograph.",
}
REASONS: Final[dict[Reason, str]] = {
    "below_alpha": "The p-value is at most alpha.",
    "near_alpha": f"The p-value is above alpha and at most {INCONCLUSIVE_FACTOR:g} times alpha.",
    "above_alpha": f"The p-value is above {INCONCLUSIVE_FACTOR:g} times alpha.",
}
# A p-value is k / (n + 1) rounded to float32, so a comparison with alpha allows for that rounding.
_ROUNDING: Final = 1e-6


@dataclass(frozen=True)
class Calibration:
    """Scores of held-out naturals: float32 [n], ascending, and the stratum of each."""

    scores: F32
    strata: tuple[str, ...]

    @classmethod
    def fit(cls, scores: F32, strata: list[str]) -> "Calibration":
        """Sort scores [n] with the stratum of each. Raises CalibrationError if there are none or one is not finite."""
        if len(scores) == 0 or not np.isfinite(scores).all():
            raise CalibrationError("Calibration needs natural images with finite scores; check the calibration split.")
        order = np.argsort(scores, kind="stable")
        return cls(scores[order].astype(np.float32), tuple(strata[i] for i in order))

    @property
    def calibration_id(self) -> str:
        """16 hex digits over scores and strata."""
        digest = hashlib.sha256(self.scores.tobytes())
        digest.update("\n".join(self.strata).encode())
        return digest.hexdigest()[:16]

    def p_value(self, scores: F32) -> F32:
        """Return pooled conformal p-values, float32 [N]; NaN for a NaN score."""
        return _conformal(self.scores, scores)

    def p_stratum(self, scores: F32, strata: list[str]) -> F32:
        """Return p-values within each image's stratum, float32 [N]; NaN if it has under 100 calibration images."""
        result = np.full(len(scores), np.nan, np.float32)
        names, wanted = np.array(self.strata), np.array(strata)
        for name in sorted(set(strata)):
            own = self.scores[names == name]
            if len(own) >= MIN_STRATUM:
                result[wanted == name] = _conformal(own, scores[wanted == name])
        return result

    def supports(self, alpha: float) -> bool:
        """Whether there are enough scores for `alpha`, that is whether it is at least 1 / (n + 1)."""
        return self._expected(alpha) >= 1

    def threshold(self, alpha: float) -> float:
        """Return the score above which p <= alpha. Raises CalibrationError if alpha is below 1 / (n + 1)."""
        return float(self.scores[len(self.scores) - self._rank(alpha)])

    def false_positive_interval(self, alpha: float) -> tuple[float, float]:
        """Return the 95 % interval of the false-positive rate that `alpha` realises on exchangeable naturals."""
        k, n = self._rank(alpha), len(self.scores)
        low, high = betaincinv(k, n + 1 - k, [0.025, 0.975])
        return float(low), float(high)

    def flagged_interval(self, alpha: float, n_test: int) -> tuple[float, float]:
        """Return the 95 % interval of the flagged share of `n_test` exchangeable naturals (beta-binomial)."""
        k, n = self._rank(alpha), len(self.scores)
        from scipy import stats  # imported here: it takes half a second, and only evaluations need it

        low, high = stats.betabinom.ppf([0.025, 0.975], n_test, k, n + 1 - k)
        return float(low) / n_test, float(high) / n_test

    def _rank(self, alpha: float) -> int:
        if not 0.0 < alpha < 1.0:
            raise CalibrationError(f"alpha {alpha:g} is not between 0 and 1: ask for one such as 0.01.")
        n, k = len(self.scores), self._expected(alpha)
        if k < 1:
            raise CalibrationError(
                f"alpha {alpha:g} is below 1 / (n + 1) = {1 / (n + 1):.2g} for {n} calibration images: "
                f"ask for a larger alpha, or calibrate on at least {np.ceil(1 / alpha) - 1:.0f} natural images."
            )
        return k

    def _expected(self, alpha: float) -> int:
        expected = np.floor(alpha * (len(self.scores) + 1) * (1.0 + _ROUNDING))
        return min(len(self.scores), int(expected))  # an alpha just below 1 would round up to n + 1


def verdict(p_value: float, alpha: float) -> tuple[Verdict, list[Reason]]:
    """Return the verdict at `alpha` and its reasons."""
    if p_value <= alpha * (1.0 + _ROUNDING):
        return "likely_ai", ["below_alpha"]
    if p_value <= INCONCLUSIVE_FACTOR * alpha * (1.0 + _ROUNDING):
        return "inconclusive", ["near_alpha"]
    return "no_ai_signal", ["above_alpha"]


def _conformal(calibration: F32, scores: F32) -> F32:
    n = len(calibration)
    at_least = n - np.searchsorted(calibration, scores, side="left")
    p = (1.0 + at_least) / (n + 1.0)
    return np.where(np.isnan(scores), np.nan, p).astype(np.float32)
