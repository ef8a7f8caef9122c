"""The only scoring path: bytes -> Finding. Audits and servers call the same methods on the same views."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, overload

import numpy as np
import torch

from clipflow_ray import sandbox
from clipflow_ray.config import CAP_PRONE_STRATA
from clipflow_ray.errors import CalibrationError, EncoderMismatchError, ItemError
from clipflow_ray.images import DecodedImage
from clipflow_ray.model.calibration import Calibration, Rule
from clipflow_ray.model.checkpoint import Checkpoint, load_checkpoint
from clipflow_ray.model.encoder import Encoder, device_for
from clipflow_ray.model.extractor import F32, Extractor, Images, joined
from clipflow_ray.model.finding import FileFacts, Finding, Numbers, judged, refused

SCORE_LIMIT: Final = 1e6
_BATCH: Final = 32


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


class Detector:
    """Encoder, flow and calibration of one checkpoint.

    `threads` is passed to the encoder. Detectors whose checkpoints have the same encoder can share one: pass it as
    `encoder`. Raises EncoderMismatchError if the encoder differs from the one that the checkpoint was made with, and
    CalibrationError if the checkpoint has no calibration.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str | None = None,
        threads: int | None = None,
        encoder: Extractor | None = None,
    ) -> None:
        if checkpoint.calibration is None:
            raise CalibrationError("The checkpoint has no calibration; train it with a calibration split.")
        self.checkpoint = checkpoint
        self.calibration: Calibration = checkpoint.calibration
        self.encoder: Extractor = encoder or Encoder(checkpoint.encoder, checkpoint.segments, device, threads)
        if self.encoder.fingerprint != checkpoint.encoder_fingerprint:
            raise EncoderMismatchError(
                f"The checkpoint was made with encoder {checkpoint.encoder_fingerprint}, "
                f"this one is {self.encoder.fingerprint}: its weights or preprocessing differ. Use the same weights."
            )
        given = dict(zip(self.encoder.names, self.encoder.widths, strict=True))
        wanted = {each.output: width for each, width in zip(checkpoint.segments, checkpoint.widths, strict=True)}
        if any(given.get(name) != width for name, width in wanted.items()):
            raise EncoderMismatchError(f"The checkpoint needs the outputs {wanted}, this encoder gives {given}.")
        self._device = device_for(device)
        # Rounding depends on the number of rows. In double precision, it is far below the float32 rounding of a score.
        self._flow = checkpoint.flow().to(self._device).double()

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str | None = None) -> "Detector":
        """Load a checkpoint directory and its encoder weights (fetched once per machine)."""
        return cls(load_checkpoint(path), device)

    @overload
    def detect(self, data: bytes, alpha: float = 0.01, cap_prone_strata: bool = CAP_PRONE_STRATA) -> Finding: ...
    @overload
    def detect(
        self, data: Sequence[bytes], alpha: float = 0.01, cap_prone_strata: bool = CAP_PRONE_STRATA
    ) -> list[Finding]: ...
    def detect(
        self, data: bytes | Sequence[bytes], alpha: float = 0.01, cap_prone_strata: bool = CAP_PRONE_STRATA
    ) -> Finding | list[Finding]:
        """Judge encoded images at the false-positive rate `alpha`.

        With `cap_prone_strata`, an image whose format and size is prone to false alarms at `alpha` is at most
        `inconclusive`; see `Calibration.prone_strata`. A bad image gives a Finding with status `error`, never an
        exception. Raises CalibrationError if alpha is too small for the calibration.
        """
        rule = self.calibration.rule(alpha, cap_prone_strata)
        if isinstance(data, bytes):
            return next(self._findings([data], rule, 0))
        chunks = (data[at : at + _BATCH] for at in range(0, len(data), _BATCH))
        return [f for at, chunk in enumerate(chunks) for f in self._findings(chunk, rule, at * _BATCH)]

    def score_views(self, views: Images) -> Scores:
        """uint8 [N, view.bytes], packed by `images.views` -> Scores. A score depends on its own image alone."""
        return self.score_embeddings(joined(self.encoder(views), self.checkpoint.segments))

    def score_embeddings(self, embeddings: F32) -> Scores:
        """float32 [N, D] raw embeddings -> Scores."""
        with torch.inference_mode():
            result = self._flow(torch.from_numpy(np.array(embeddings, np.float64)).to(self._device))
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

    def _findings(self, chunk: Sequence[bytes], rule: Rule, start: int) -> Iterator[Finding]:
        decoded = sandbox.decode_all(chunk, self.checkpoint.limits, self.checkpoint.view)
        good = [image.rgb for image in decoded if isinstance(image, DecodedImage)]
        numbers = iter(self.score_views(good).rows() if good else [])
        for index, (data, image) in enumerate(zip(chunk, decoded, strict=True), start):
            digest = hashlib.sha256(data).hexdigest()
            if isinstance(image, ItemError):
                yield refused(index, digest, image)
            else:
                yield judged(index, digest, FileFacts.of(image), next(numbers), rule, max(self.checkpoint.view.sizes))
