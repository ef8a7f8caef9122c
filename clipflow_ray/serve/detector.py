"""The deployment that scores: one checkpoint, batches across requests, torch off the event loop."""

import asyncio
import time
from typing import Any, Final

import numpy as np
from ray import serve

from clipflow_ray import __version__
from clipflow_ray.config import ServeConfig, Tuning
from clipflow_ray.errors import CalibrationError
from clipflow_ray.images import Pixels
from clipflow_ray.model.finding import Numbers
from clipflow_ray.place import Place
from clipflow_ray.serve.messages import Description, Detectors, Refused, Scored
from clipflow_ray.serve.metrics import DetectorMetrics
from clipflow_ray.serve.probe import probe_view
from clipflow_ray.serve.schemas import ModelInfo, Threshold

_ALPHAS: Final = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1)
PROBE_TOLERANCE: Final = 1e-4


class DetectorReplica(Detectors):
    """One replica. Its constructor loads encoder, flow and calibration, and raises if they do not fit together.

    Beside the methods of `Detectors` it has Serve's hooks.
    """

    def __init__(self, config: ServeConfig) -> None:
        # Not at the top: the application is built in processes that load no model, and importing torch takes seconds.
        import torch

        from clipflow_ray.model.checkpoint import load_checkpoint
        from clipflow_ray.model.detector import Detector

        threads = max(1, int(config.detector_cpus))
        torch.set_num_threads(threads)
        checkpoint = load_checkpoint(Place.at(config.checkpoint, config.s3))
        self._detector = Detector(checkpoint, threads=threads, precision=config.precision)
        self._model = ModelInfo(
            model_id=checkpoint.model_id,
            calibration_id=self._detector.calibration.calibration_id,
            precision=self._detector.checkpoint.encoder.precision,
            tool_version=__version__,
        )
        self._view = checkpoint.view
        self._card = _card(config)
        self._tuning = Tuning()
        self._metrics = DetectorMetrics()
        self._broken: str | None = None
        self._free = asyncio.Event()
        self._free.set()
        self._probe_score = float(self._detector.score_views([probe_view(checkpoint.view)]).score[0])
        if not np.isfinite(self._probe_score):
            raise CalibrationError("The probe image has no finite score: the encoder or the flow is broken.")

    async def reconfigure(self, tuning: dict[str, Any]) -> None:
        """Serve's hook for `user_config`: alpha, cap_prone_strata and batching change without a restart."""
        wanted = Tuning.model_validate(tuning)
        self._detector.calibration.rule(wanted.alpha, wanted.cap_prone_strata)  # refuses an unsupported alpha
        self._tuning = wanted
        batch: Any = self._batch
        batch.set_max_batch_size(wanted.max_batch_size)
        batch.set_batch_wait_timeout_s(wanted.batch_wait_seconds)

    async def check_health(self) -> None:
        """Serve's hook: raises once a forward pass has failed, so that Serve replaces the replica."""
        if self._broken:
            raise RuntimeError(self._broken)

    async def score(self, views: list[Pixels], alpha: float | None) -> Scored | Refused:
        """Score the views of one request, to be judged at `alpha` or at the server's own."""
        alpha = self._tuning.alpha if alpha is None else alpha
        calibration = self._detector.calibration
        try:
            rule = calibration.rule(alpha, self._tuning.cap_prone_strata)
        except CalibrationError as error:
            return Refused(str(error))
        numbers = await asyncio.gather(*(self._scored(view) for view in views))
        return Scored(
            model=self._model,
            view=self._view,
            rule=rule,
            alpha_realised_95=calibration.false_positive_interval(alpha),
            unseen_source=calibration.unseen_source(alpha),
            p_floor=calibration.floor,
            numbers=numbers,
        )

    async def reproduces(self, view: Pixels) -> bool:
        """Whether the probe image, decoded by the ingress, gets the score that it had at start, batches included."""
        numbers = await self._scored(view)
        return abs(numbers.score - self._probe_score) <= PROBE_TOLERANCE

    async def describe(self) -> Description:
        """The facts of the checkpoint and the settings of now."""
        calibration = self._detector.calibration
        rule = calibration.rule(self._tuning.alpha, self._tuning.cap_prone_strata)
        thresholds = [
            Threshold(
                alpha=alpha,
                score=calibration.threshold(alpha),
                false_positive_rate_95=calibration.false_positive_interval(alpha),
                unseen_source=calibration.unseen_source(alpha),
            )
            for alpha in sorted({*_ALPHAS, rule.alpha})
            if calibration.supports(alpha)
        ]
        return Description(
            model=self._model,
            view=self._view,
            alpha=rule.alpha,
            alpha_realised_95=calibration.false_positive_interval(rule.alpha),
            unseen_source=calibration.unseen_source(rule.alpha),
            p_floor=calibration.floor,
            calibration_n=len(calibration.scores),
            calibration_sources=calibration.source_count,
            in_words=calibration.in_words(rule.alpha) + rule.in_words(),
            thresholds=thresholds,
            card=self._card,
        )

    async def _scored(self, view: Pixels) -> Numbers:
        if view.size != self._view.bytes:  # made for another checkpoint: the ingress sees that and asks again
            return Numbers(np.nan, np.nan, np.nan)
        arrived = time.monotonic()
        # Serve closes the next batch while the current one still runs. Images that wait here instead fill the next
        # batch, and an idle detector starts at once.
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
            views = [view for view, _ in waiting]
            scores = await asyncio.to_thread(self._detector.score_views, views)
        except Exception as error:  # after any failure in torch, the replica must not go on
            self._broken = f"A forward pass failed: {type(error).__name__}."
            raise
        finally:
            self._free.set()
            self._metrics.inference.observe(max(time.monotonic() - start, 1e-6))
        return scores.rows()


def _card(config: ServeConfig) -> str:
    """The model card beside the checkpoint, or "" if there is none, as for a checkpoint that a user trained."""
    try:
        with (Place.at(config.checkpoint, config.s3) / "MODEL_CARD.md").stream() as file:
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
