"""Raw embeddings -> scores: the flow and the calibration of one checkpoint, without its encoder."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from clipflow_ray.errors import CalibrationError
from clipflow_ray.model.calibration import Calibration
from clipflow_ray.model.checkpoint import Checkpoint
from clipflow_ray.model.extractor import F32
from clipflow_ray.model.finding import Numbers

SCORE_LIMIT: Final = 1e6


@dataclass(frozen=True)
class Scores:
    """float32 [N] each. `score` is the sum of the segments' standardised negative log-likelihoods.

    A higher score is more suspicious. It saturates at 1e6. `log_likelihood` is the sum of `log_base` and `log_det`, all
    in nats. An embedding that is not finite or is all zeros gives NaN in every field.
    """

    log_likelihood: F32
    log_base: F32
    log_det: F32
    score: F32
    p_value: F32

    def rows(self) -> list[Numbers]:
        """The numbers of each image, in order."""
        columns = (self.log_likelihood, self.score, self.p_value)
        return [Numbers(float(a), float(b), float(c)) for a, b, c in zip(*columns, strict=True)]


class Scorer:
    """Flow and calibration of a checkpoint, on a torch `device`.

    Rounding depends on the number of rows. In double precision, the default, it is far below the float32 rounding of a
    score. In single precision the flow takes half the time. Raises CalibrationError if the checkpoint has no
    calibration.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, precision: torch.dtype = torch.float64) -> None:
        if checkpoint.calibration is None:
            raise CalibrationError("The checkpoint has no calibration; train it with a calibration split.")
        self.calibration: Calibration = checkpoint.calibration
        self._device, self._precision = device, precision
        self._flow = checkpoint.flow().to(device, precision)

    def __call__(self, embeddings: F32) -> Scores:
        """float32 [N, D] raw embeddings, the segments' one after the other -> Scores."""
        with torch.inference_mode():
            result = self._flow(torch.tensor(embeddings, dtype=self._precision, device=self._device))
            log_base, log_det, raw = (part.cpu().numpy() for part in (result.log_base, result.log_det, result.score))
        usable = np.isfinite(embeddings).all(axis=1) & (np.abs(embeddings).max(axis=1) > 0)
        with np.errstate(invalid="ignore", over="ignore"):
            total = np.where(usable, log_base + log_det, np.nan)
            score = np.clip(np.where(usable, raw, np.nan), -SCORE_LIMIT, SCORE_LIMIT).astype(np.float32)
            total = np.clip(total, -SCORE_LIMIT * result.dim, SCORE_LIMIT * result.dim).astype(np.float32)
            log_base, log_det = (
                np.where(np.isnan(score), np.nan, part).astype(np.float32) for part in (log_base, log_det)
            )
        return Scores(total, log_base, log_det, score, self.calibration.p_value(score))
