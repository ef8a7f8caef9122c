"""The deployment that scores: one checkpoint, batches across requests, torch off the event loop."""

import asyncio
import time
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from ray import serve

from clipflow_ray import __version__
from clipflow_ray.config import ImageLimits, ServeConfig, Tuning
from clipflow_ray.errors import CalibrationError
from clipflow_ray.images import DecodedImage, Pixels, ViewKind
from clipflow_ray.place import Place
from clipflow_ray.serve.metrics import DetectorMetrics
from clipflow_ray.serve.probe import probe_view

Numbers = tuple[float, float, float]

_ALPHAS: Final = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)
PROBE_TOLERANCE: Final = 1e-4


@dataclass(frozen=True)
class Decoding:
    """What the ingress must know of the checkpoint in order to decode for it."""

    limits: ImageLimits
    view: ViewKind


@dataclass(frozen=True)
class Judged:
    """Findings (as plain values) of one request, all by one model."""

    model: dict[str, str]
    decoding: Decoding
    alpha: float
    alpha_realised_95: tuple[float, float]
    findings: list[dict[str, Any]]


@dataclass(frozen=True)
class Refused:
    """The request cannot be judged as it asks; says why."""

    message: str


@dataclass(frozen=True)
class ToJudge:
    """A decoded image, which of its request it is, and the hash of its bytes."""

    index: int
    sha256: str
    image: DecodedImage


class DetectorReplica:
    """One replica. Its constructor loads encoder, flow and calibration, and raises where they do not fit."""

    def __init__(self, config: ServeConfig) -> None:
        # Here and not at the top: the ingress imports this module too, and torch would be most of its memory.
        import torch

        from clipflow_ray.model.checkpoint import load_checkpoint
        from clipflow_ray.model.detector import Detector, judged

        threads = max(1, int(config.detector_cpus))
        torch.set_num_threads(threads)
        checkpoint = load_checkpoint(Place.at(config.checkpoint, config.s3))
        self._detector = Detector(checkpoint, threads=threads)
        self._judged = judged
        self._model = {
            "model_id": checkpoint.model_id,
            "calibration_id": self._detector.calibration.calibration_id,
            "tool_version": __version__,
        }
        self._decoding = Decoding(checkpoint.limits, checkpoint.encoder.view)
        self._card = _card(config)
        self._tuning = Tuning()
        self._metrics = DetectorMetrics()
        self._broken: str | None = None
        self._free = asyncio.Event()
        self._free.set()
        self._probe_score = float(self._detector.score_views(probe_view(checkpoint.encoder.view)[None]).score[0])
        if not np.isfinite(self._probe_score):
            raise CalibrationError("The probe image has no finite score: the encoder or the flow is broken.")

    async def reconfigure(self, tuning: dict[str, Any]) -> None:
        """Serve's hook for `user_config`: alpha and batching change, nothing restarts."""
        wanted = Tuning.model_validate(tuning)
        self._detector.calibration.threshold(wanted.alpha)
        self._tuning = wanted
        batch: Any = self._batch
        batch.set_max_batch_size(wanted.max_batch_size)
        batch.set_batch_wait_timeout_s(wanted.batch_wait_seconds)

    async def check_health(self) -> None:
        """Serve's hook: raises once a forward pass has failed, so that Serve replaces the replica."""
        if self._broken:
            raise RuntimeError(self._broken)

    async def judge(self, images: list[ToJudge], alpha: float | None) -> Judged | Refused:
        """Judge the images of one request at `alpha`, or at the server's own."""
        alpha = self._tuning.alpha if alpha is None else alpha
        calibration = self._detector.calibration
        try:
            interval = calibration.false_positive_interval(alpha)
        except CalibrationError as error:
            return Refused(str(error))
        scored = await asyncio.gather(*(self._scored(each.image.rgb) for each in images))
        findings = [
            asdict(self._judged(each.index, each.sha256, each.image, *numbers, alpha))
            for each, numbers in zip(images, scored, strict=True)
        ]
        return Judged(self._model, self._decoding, alpha, interval, findings)

    async def reproduces(self, view: Pixels) -> bool:
        """Whether the probe image, decoded by the ingress, gets through the batches the score that it had at start."""
        _, score, _ = await self._scored(view)
        return abs(score - self._probe_score) <= PROBE_TOLERANCE

    async def describe(self) -> dict[str, Any]:
        """The facts of /v1/model that the checkpoint knows, and `decoding`."""
        calibration = self._detector.calibration
        thresholds = [
            {
                "alpha": alpha,
                "score": calibration.threshold(alpha),
                "false_positive_rate_95": calibration.false_positive_interval(alpha),
            }
            for alpha in sorted({*_ALPHAS, self._tuning.alpha})
            if calibration.supports(alpha)
        ]
        return {
            "decoding": self._decoding,
            "model": self._model,
            "alpha": self._tuning.alpha,
            "alpha_realised_95": calibration.false_positive_interval(self._tuning.alpha),
            "calibration_n": len(calibration.scores),
            "thresholds": thresholds,
            "card": self._card,
        }

    async def _scored(self, view: Pixels) -> Numbers:
        arrived = time.monotonic()
        # Serve closes the next batch while this one still runs. Waiting here instead fills the next one, and an
        # idle detector need not wait for company.
        await self._free.wait()
        numbers: Numbers = await self._batch((view, arrived))
        return numbers

    @serve.batch()  # `reconfigure` sets its sizes
    async def _batch(self, waiting: list[tuple[Pixels, float]]) -> list[Numbers]:
        self._free.clear()
        start = time.monotonic()
        self._metrics.batch_size.observe(len(waiting))
        for _, arrived in waiting:
            self._metrics.queue.observe(max(start - arrived, 1e-6))
        try:
            views = np.stack([view for view, _ in waiting])
            scores = await asyncio.to_thread(self._detector.score_views, views)
        except Exception as error:
            self._broken = f"A forward pass failed: {type(error).__name__}."
            raise
        finally:
            self._free.set()
            self._metrics.inference.observe(max(time.monotonic() - start, 1e-6))
        columns = (scores.log_likelihood, scores.score, scores.p_value)
        return [(float(a), float(b), float(c)) for a, b, c in zip(*columns, strict=True)]


def _card(config: ServeConfig) -> str:
    """The model card beside the checkpoint; one that was trained at home may have none."""
    try:
        with (Place.at(config.checkpoint, config.s3) / "MODEL_CARD.md").stream() as file:
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
