"""What the endpoint does between HTTP and the detectors: it admits a request, decodes its images and has them scored.

One Service per ingress replica. `api` gives it a way to read the request; `ingress` gives it detectors to ask.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

from clipflow_ray.config import DISCLAIMER, ImageLimits, ServeConfig, ViewSpec
from clipflow_ray.containers import FORMATS
from clipflow_ray.data.resources import cores
from clipflow_ray.errors import ItemError
from clipflow_ray.images import DecodedImage
from clipflow_ray.model.finding import FileFacts, Finding, judged, refused
from clipflow_ray.serve.body import Submission, Upload
from clipflow_ray.serve.decoding import DecoderPool
from clipflow_ray.serve.failures import RequestError
from clipflow_ray.serve.messages import Detectors, Refused, Scored
from clipflow_ray.serve.metrics import IngressMetrics
from clipflow_ray.serve.probe import probe_png
from clipflow_ray.serve.schemas import DetectResponse, ItemFailure, ItemResult, ModelCard, ServiceLimits

# A body that is being read counts for the size that it declares. Together they may declare this many of the largest.
_BODIES: Final = 8
_READY_SECONDS: Final = 10.0

Decoded = tuple[str | None, DecodedImage | ItemError]


class Service:
    """One ingress replica's work. It holds no model: it asks a detector what the checkpoint needs, and again on change.

    Starts `decoders` child processes, by default one per core; `close` stops them.
    """

    def __init__(self, config: ServeConfig, detectors: Detectors) -> None:
        self.config = config
        self.metrics = IngressMetrics()
        self._detectors = detectors
        self._admission = Admission(config)
        self._decoders = DecoderPool(config.decoders or cores(), self.metrics)
        self._view: ViewSpec | None = None

    async def detect(
        self, declared: int | None, read: Callable[[], Awaitable[Submission]], request_id: str
    ) -> DetectResponse:
        """Judge the images of a request whose body has `declared` bytes, if it says so; `read` reads it.

        A full server refuses before it reads. Raises RequestError if the request as a whole cannot be answered.
        """
        most = self.config.max_body_bytes
        # How many images there are is known only after reading. Until then the request counts for one.
        with self._admission.hold(requests=1, bytes=most if declared is None else min(declared, most), items=1):
            try:
                async with asyncio.timeout(self.config.timeout_seconds):
                    submission = await read()
                    with self._admission.hold(items=len(submission.uploads) - 1):
                        return await self._answer(submission, request_id)
            except TimeoutError as error:
                message = f"No answer within {self.config.timeout_seconds:g} seconds; send fewer images at once."
                raise RequestError("timeout", message) from error

    async def check_ready(self) -> None:
        """Have the probe image decoded and scored; raises RequestError `not_ready` if its score is not reproduced."""
        try:
            async with asyncio.timeout(_READY_SECONDS):
                _, image = await self._decoders.decode(probe_png(), ImageLimits(), await self._learn())
                reproduced = isinstance(image, DecodedImage) and await self._detectors.reproduces(image.rgb)
        except TimeoutError as error:
            raise RequestError("not_ready", "The detector does not answer yet; try again soon.") from error
        if not reproduced:
            raise RequestError("not_ready", "The probe image does not get the score that it had when the model loaded.")

    async def model_card(self) -> ModelCard:
        """The answer of GET /v1/model."""
        facts = await self._detectors.describe()
        limits = ServiceLimits(
            max_images=self.config.max_images,
            max_bytes=self.config.limits.max_bytes,
            max_body_bytes=self.config.max_body_bytes,
            max_pixels=self.config.limits.max_pixels,
            formats=list(FORMATS),
        )
        return ModelCard(
            model=facts.model,
            alpha=facts.alpha,
            alpha_realised_95=facts.alpha_realised_95,
            unseen_source=facts.unseen_source,
            p_floor=facts.p_floor,
            calibration_n=facts.calibration_n,
            calibration_sources=facts.calibration_sources,
            in_words=list(facts.in_words),
            thresholds=facts.thresholds,
            limits=limits,
            auth_required=bool(self.config.tokens),
            card=facts.card,
            disclaimer=DISCLAIMER,
        )

    def close(self) -> None:
        """Stop the decoders. Images that wait for one are given up."""
        self._decoders.close()

    async def _answer(self, submission: Submission, request_id: str) -> DetectResponse:
        start = time.monotonic()
        view = self._view or await self._learn()
        decoded, scored = await self._score(submission, view)
        if scored.view != view:  # an update brought a checkpoint that needs another view
            self._view = scored.view
            decoded, scored = await self._score(submission, scored.view)
        latency = round(1000.0 * (time.monotonic() - start), 1)
        results = [
            _item(upload, finding, latency)
            for upload, finding in zip(submission.uploads, _findings(decoded, scored), strict=True)
        ]
        for result in results:
            self.metrics.items.inc(1, {"verdict": result.verdict or "error"})
            if result.error:
                self.metrics.errors.inc(1, {"scope": "item", "code": result.error.code})
        return DetectResponse(
            request_id=request_id,
            model=scored.model,
            alpha=scored.rule.alpha,
            alpha_realised_95=scored.alpha_realised_95,
            unseen_source=scored.unseen_source,
            p_floor=scored.p_floor,
            results=results,
            disclaimer=DISCLAIMER + " See /v1/model.",
        )

    async def _score(self, submission: Submission, view: ViewSpec) -> tuple[list[Decoded], Scored]:
        decoded = await asyncio.gather(*(self._decode(upload, view) for upload in submission.uploads))
        views = [image.rgb for _, image in decoded if isinstance(image, DecodedImage)]
        scored = await self._detectors.score(views, submission.alpha)
        if isinstance(scored, Refused):
            raise RequestError("validation_error", f"alpha: {scored.message}")
        return decoded, scored

    async def _decode(self, upload: Upload, view: ViewSpec) -> Decoded:
        if isinstance(upload.data, ItemError):
            return None, upload.data
        return await self._decoders.decode(upload.data, self.config.limits, view)

    async def _learn(self) -> ViewSpec:
        self._view = (await self._detectors.describe()).view
        return self._view


class Admission:
    """How much work an ingress replica has taken on. A request beyond its limits is refused while it costs little."""

    def __init__(self, config: ServeConfig) -> None:
        self._most = {
            "requests": config.max_requests,
            "bytes": _BODIES * config.max_body_bytes,
            "items": config.max_items,
        }
        self._taken = dict.fromkeys(self._most, 0)

    @contextmanager
    def hold(self, **amounts: int) -> Iterator[None]:
        """Take these amounts until the context ends; raises RequestError `overloaded` if they are not free."""
        if any(self._taken[name] + amount > self._most[name] for name, amount in amounts.items()):
            raise overloaded()
        for name, amount in amounts.items():
            self._taken[name] += amount
        try:
            yield
        finally:
            for name, amount in amounts.items():
                self._taken[name] -= amount


def overloaded() -> RequestError:
    """The refusal that tells a client to wait."""
    return RequestError("overloaded", "The server has as much to do as it can; try again after Retry-After.")


def _findings(decoded: list[Decoded], scored: Scored) -> Iterator[Finding]:
    numbers = iter(scored.numbers)
    for index, (digest, image) in enumerate(decoded):
        if isinstance(image, ItemError):
            yield refused(index, digest, image)
        else:
            facts = FileFacts.of(image)
            yield judged(index, digest, facts, next(numbers), scored.rule, max(scored.view.sizes))


def _item(upload: Upload, finding: Finding, latency_ms: float) -> ItemResult:
    """The item of an HTTP answer: every field of the finding. An image without a score has an error and no latency."""
    if finding.error is not None:
        error = ItemFailure(code=finding.error["code"], message=finding.error["message"])
        return ItemResult(id=upload.id, index=finding.index, status="error", sha256=finding.sha256, error=error)
    return ItemResult(id=upload.id, latency_ms=latency_ms, **vars(finding))
