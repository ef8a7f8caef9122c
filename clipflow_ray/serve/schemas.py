"""The JSON of the HTTP interface. Within /v1 fields may be added, but are never renamed or removed.

A field that does not apply is absent, not null. Numbers are finite, because JSON has no NaN.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from clipflow_ray.errors import ItemCode
from clipflow_ray.model.calibration import Verdict

ErrorCode = Literal[
    "invalid_request",
    "unauthorized",
    "not_found",
    "method_not_allowed",
    "file_too_large",
    "batch_too_large",
    "unsupported_media_type",
    "validation_error",
    "overloaded",
    "not_ready",
    "timeout",
    "internal",
]


class Schema(BaseModel):
    """Numbers are finite. An unknown key is an error in requests; clients should ignore unknown keys in answers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class JsonImage(Schema):
    """One image of a JSON request: an id that its result repeats, and its bytes in standard base64."""

    id: str = Field(max_length=255)
    b64: str


class DetectRequest(Schema):
    """JSON body of POST /v1/detect. Without `alpha` the server uses its own."""

    images: list[JsonImage] = Field(min_length=1)
    alpha: float | None = Field(None, gt=0, lt=1)


class ItemFailure(Schema):
    """Why one image has no score."""

    code: ItemCode
    message: str


class ItemResult(Schema):
    """The result of one image: the fields of a finding if `status` is ok, and `error` if `status` is error."""

    id: str
    index: int
    status: Literal["ok", "error"]
    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    format: str | None = None
    score: float | None = None
    log_likelihood: float | None = None
    p_value: float | None = None
    stratum: str | None = None
    verdict: Verdict | None = None
    reasons: list[str] | None = None
    warnings: list[str] | None = None
    latency_ms: float | None = None
    error: ItemFailure | None = None


class ModelInfo(Schema):
    """The model, the calibration and the release that judged."""

    model_id: str
    calibration_id: str
    tool_version: str


class DetectResponse(Schema):
    """Answer of POST /v1/detect, with results in request order.

    `alpha_realised_95` is the 95 % interval of the false-positive rate at `alpha` on photographs like those of the
    calibration.
    """

    request_id: str
    model: ModelInfo
    alpha: float
    alpha_realised_95: tuple[float, float]
    results: list[ItemResult]
    disclaimer: str


class Threshold(Schema):
    """At `alpha`, images that score above `score` are flagged. The interval is as in `alpha_realised_95`."""

    alpha: float
    score: float
    false_positive_rate_95: tuple[float, float]


class ServiceLimits(Schema):
    """Limits of one request."""

    max_images: int
    max_bytes: int
    max_body_bytes: int
    max_pixels: int
    formats: list[str]


class ModelCard(Schema):
    """Answer of GET /v1/model. `thresholds` are for common alphas that the calibration supports."""

    model: ModelInfo
    alpha: float
    alpha_realised_95: tuple[float, float]
    calibration_n: int
    thresholds: list[Threshold]
    limits: ServiceLimits
    auth_required: bool
    card: str = Field(description="Markdown")
    disclaimer: str


class ErrorDetail(Schema):
    """`code` is stable. `message` says what to do next."""

    code: ErrorCode
    message: str
    request_id: str


class ErrorBody(Schema):
    """Body of every answer that is not 2xx."""

    error: ErrorDetail
