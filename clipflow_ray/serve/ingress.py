"""The deployment that clients reach: it admits, decodes, asks a detector, and puts the answer together."""

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from clipflow_ray import compat
from clipflow_ray.config import DISCLAIMER, ServeConfig
from clipflow_ray.data.resources import cores
from clipflow_ray.errors import ItemError
from clipflow_ray.images import FORMATS, DecodedImage
from clipflow_ray.serve import body
from clipflow_ray.serve.body import Submission, Upload
from clipflow_ray.serve.decoding import DecoderPool
from clipflow_ray.serve.detector import Decoding, Judged, Refused, ToJudge
from clipflow_ray.serve.failures import RequestError
from clipflow_ray.serve.metrics import IngressMetrics
from clipflow_ray.serve.probe import probe_png
from clipflow_ray.serve.schemas import DetectResponse, ItemFailure, ItemResult, ModelCard, ModelInfo, ServiceLimits

# Bodies that are being read count for what they declare, up to this many of the largest.
_BODIES: Final = 8
_READY_SECONDS: Final = 10.0
_RETRY_SECONDS: Final = 0.1
_log = logging.getLogger("clipflow_ray.serve")


class Admission:
    """How much one ingress replica has taken on; beyond it a request is refused at once, while it costs little."""

    def __init__(self, config: ServeConfig) -> None:
        self._most = {
            "requests": config.max_requests,
            "bytes": _BODIES * config.max_body_bytes,
            "items": config.max_items,
        }
        self._taken = dict.fromkeys(self._most, 0)

    @contextmanager
    def hold(self, **amounts: int) -> Iterator[None]:
        """Take these amounts until the context ends; raises RequestError `overloaded` where they are not free."""
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


class Ingress:
    """One replica. Holds no model: what it must know of the checkpoint it asks a detector, and asks again on change."""

    def __init__(self, config: ServeConfig, detector: DeploymentHandle[Any]) -> None:
        self.config = config
        self.metrics = IngressMetrics()
        self.admission = Admission(config)
        self._detector = compat.handle_of_cluster(detector)
        self.decoders = DecoderPool(config.decoders or cores(), self.metrics)
        self._decoding: Decoding | None = None

    def __serve_build_asgi_app__(self) -> ASGIApp:
        from clipflow_ray.serve.api import build_api

        return build_api(self)

    async def detect(self, submission: Submission, request_id: str) -> DetectResponse:
        """Judge the images of one request; raises RequestError where the request as a whole cannot be answered."""
        start = time.monotonic()
        with self.admission.hold(items=len(submission.uploads) - 1):  # `api` holds one since before it read
            decoding = self._decoding or await self._learn()
            judged, results = await self._judge(submission, decoding, start)
            if judged.decoding != decoding:  # an update brought a checkpoint that looks at images in another way
                self._decoding = judged.decoding
                judged, results = await self._judge(submission, judged.decoding, start)
        for result in results:
            self.metrics.items.inc(1, {"verdict": result.verdict or "error"})
            if result.error:
                self.metrics.errors.inc(1, {"scope": "item", "code": result.error.code})
        return DetectResponse(
            request_id=request_id,
            model=ModelInfo(**judged.model),
            alpha=judged.alpha,
            alpha_realised_95=judged.alpha_realised_95,
            results=results,
            disclaimer=DISCLAIMER + " See /v1/model.",
        )

    async def ready(self) -> None:
        """Replay the probe image through a decoder and a detector's batches; raises RequestError `not_ready`."""
        try:
            async with asyncio.timeout(_READY_SECONDS):
                decoding = await self._learn()
                _, image = await self.decoders.decode(probe_png(), decoding.limits, decoding.view)
                reproduced = isinstance(image, DecodedImage) and await self._ask("reproduces", image.rgb)
        except TimeoutError as error:
            raise RequestError("not_ready", "The detector does not answer yet; try again soon.") from error
        if not reproduced:
            raise RequestError("not_ready", "The probe image does not get the score that it had when the model loaded.")

    async def model_card(self) -> ModelCard:
        """What /v1/model answers."""
        facts: dict[str, Any] = dict(await self._ask("describe"))
        decoding: Decoding = facts.pop("decoding")
        limits = ServiceLimits(
            max_images=self.config.max_images,
            max_bytes=min(self.config.max_bytes, decoding.limits.max_bytes),
            max_body_bytes=self.config.max_body_bytes,
            max_pixels=decoding.limits.max_pixels,
            formats=list(FORMATS),
        )
        return ModelCard(
            **facts,
            limits=limits,
            auth_required=bool(self.config.tokens),
            disclaimer=DISCLAIMER,
        )

    async def _learn(self) -> Decoding:
        facts = await self._ask("describe")
        self._decoding = facts["decoding"]
        return self._decoding

    async def _judge(self, submission: Submission, decoding: Decoding, start: float) -> tuple[Judged, list[ItemResult]]:
        decoded = await asyncio.gather(*(self._decoded(upload, decoding) for upload in submission.uploads))
        good = [
            ToJudge(index, digest, image)
            for index, (digest, image) in enumerate(decoded)
            if digest is not None and isinstance(image, DecodedImage)
        ]
        judged = await self._ask("judge", good, submission.alpha)
        if isinstance(judged, Refused):
            raise RequestError("validation_error", f"alpha: {judged.message}")
        findings = {finding["index"]: finding for finding in judged.findings}
        elapsed = round(1000.0 * (time.monotonic() - start), 1)
        results = []
        for index, (upload, (digest, image)) in enumerate(zip(submission.uploads, decoded, strict=True)):
            if isinstance(image, ItemError):
                error = ItemFailure(code=image.item_code, message=str(image))
                results.append(ItemResult(id=upload.id, index=index, status="error", sha256=digest, error=error))
            else:
                finding = {key: value for key, value in findings[index].items() if value is not None}
                results.append(ItemResult(id=upload.id, latency_ms=elapsed, **finding))
        return judged, results

    async def _decoded(self, upload: Upload, decoding: Decoding) -> tuple[str | None, DecodedImage | ItemError]:
        if upload.data is None:
            return None, ItemError("too_large_bytes", body.too_large(upload.size, self.config))
        return await self.decoders.decode(upload.data, decoding.limits, decoding.view)

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """Call a detector. One that died with our call is asked once more: another takes over, or its successor."""
        for last in (False, True):
            try:
                return await getattr(self._detector, method).remote(*arguments)
            except BackPressureError as error:
                raise overloaded() from error
            except (RayError, DeploymentUnavailableError) as error:
                _log.warning(json.dumps({"detector": method, "error": type(error).__name__, "last": last}))
                if last:
                    raise RequestError("not_ready", "No detector answers; try again after Retry-After.") from error
                await asyncio.sleep(_RETRY_SECONDS)
        raise AssertionError
