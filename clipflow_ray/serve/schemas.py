"""The JSON of the HTTP interface. Within /v1 fields may be added, but are never renamed or removed.

A field that does not apply is absent, not null. Numbers are finite, because JSON has no NaN.
"""

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from clipflow_ray.config import Precision
from clipflow_ray.errors import ItemCode
from clipflow_ray.model.calibration import SourceRange, Verdict

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
UNSEEN: Final = "Flagged share of a source never seen; absent if the calibration knows fewer than 5 sources."


class Schema(BaseModel):
    """Numbers are finite. An unknown key is an error in requests; clients should ignore unknown keys in answers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class JsonImage(Schema):
    """One image of a JSON request."""

    id: str = Field(max_length=255, description="Name of the image; its result has the same one.")
    b64: str = Field(description="The bytes of the file in standard base64.")


class DetectRequest(Schema):
    """JSON body of POST /v1/detect."""

    images: list[JsonImage] = Field(min_length=1, description="The images, up to the server's `max_images`.")
    alpha: float | None = Field(
        None, gt=0, lt=1, description="False-positive rate to flag at; by default the server's own."
    )


class ItemFailure(Schema):
    """Why one image has no score."""

    code: ItemCode = Field(description="Error code of the image.")
    message: str = Field(description="The error in a sentence.")


class ItemResult(Schema):
    """The result for one image. `error` is present if `status` is `error`; the fields of a score if it is `ok`."""

    id: str = Field(description="File name or `id` of the image in the request.")
    index: int = Field(description="Position of the image in the request, from 0.")
    status: Literal["ok", "error"] = Field(description="Whether the image has a score.")
    sha256: str | None = Field(None, description="SHA-256 of the file in hex; absent if the file is too large.")
    width: int | None = Field(None, description="Width in pixels, upright.")
    height: int | None = Field(None, description="Height in pixels, upright.")
    format: str | None = Field(None, description="Format by the first bytes of the file, such as `JPEG`.")
    score: float | None = Field(
        None,
        description="Sum of the segments' standardised negative log-likelihoods; higher is more suspicious. Specific "
        "to the model.",
    )
    log_likelihood: float | None = Field(None, description="Log-likelihood of the embedding, in nats.")
    p_value: float | None = Field(
        None, description="Conformal p-value among all calibration images; at least `p_floor`."
    )
    stratum: str | None = Field(None, description="Format and class of the longer side, such as `jpeg|512-1024`.")
    verdict: Verdict | None = Field(None, description="Verdict at the request's alpha.")
    reasons: list[str] | None = Field(None, description="Reasons for the verdict, as codes.")
    warnings: list[str] | None = Field(None, description="Remarks on the image, as codes; they change no score.")
    latency_ms: float | None = Field(None, description="Milliseconds from the start of the request to its results.")
    error: ItemFailure | None = Field(None, description="Why there is no score.")


class ModelInfo(Schema):
    """The model, the calibration and the release that judge."""

    model_id: str = Field(description="Id of the flow and its encoder: 16 hex digits.")
    calibration_id: str = Field(description="Id of the calibration set: 16 hex digits.")
    precision: Precision = Field("float32", description="Precision of the encoder; an older server has no other.")
    tool_version: str = Field(description="Version of clipflow_ray.")


class DetectResponse(Schema):
    """Answer of POST /v1/detect."""

    request_id: str = Field(description="Id of the request; the server's log has it as well.")
    model: ModelInfo = Field(description="What judged.")
    alpha: float = Field(description="False-positive rate that was used.")
    alpha_realised_95: tuple[float, float] = Field(
        description="95 % interval of the rate that it realises on photographs drawn as the calibration's were."
    )
    unseen_source: SourceRange | None = Field(None, description=UNSEEN)
    p_floor: float | None = Field(None, description="The smallest p-value that there is: 1 / (n + 1).")
    results: list[ItemResult] = Field(description="One result an image, in the order of the request.")
    disclaimer: str = Field(description="What a verdict is and is not, in a sentence.")


class Threshold(Schema):
    """The score threshold of one alpha."""

    alpha: float = Field(description="False-positive rate.")
    score: float = Field(description="A higher score has a p-value of at most `alpha`.")
    false_positive_rate_95: tuple[float, float] = Field(
        description="95 % interval of the rate that it realises on photographs drawn as the calibration's were."
    )
    unseen_source: SourceRange | None = Field(None, description=UNSEEN)


class ServiceLimits(Schema):
    """Limits of one request."""

    max_images: int = Field(description="Images in one request.")
    max_bytes: int = Field(description="Bytes of one file.")
    max_body_bytes: int = Field(description="Bytes of one multipart body.")
    max_pixels: int = Field(description="Pixels of one image.")
    formats: list[str] = Field(description="Accepted formats.")


class ModelCard(Schema):
    """Answer of GET /v1/model."""

    model: ModelInfo = Field(description="What judges.")
    alpha: float = Field(description="False-positive rate that is used if a request names none.")
    alpha_realised_95: tuple[float, float] = Field(
        description="95 % interval of the rate that it realises on photographs drawn as the calibration's were."
    )
    unseen_source: SourceRange | None = Field(None, description=UNSEEN)
    p_floor: float | None = Field(None, description="The smallest p-value that there is: 1 / (n + 1).")
    calibration_n: int = Field(description="Number of calibration images.")
    calibration_sources: int = Field(1, description="Number of their sources; 1 if the checkpoint does not know them.")
    in_words: list[str] = Field([], description="What the server's `alpha` and a p-value mean, as sentences.")
    thresholds: list[Threshold] = Field(description="Thresholds of common alphas that the calibration supports.")
    limits: ServiceLimits = Field(description="What one request may hold.")
    auth_required: bool = Field(description="Whether a request needs a bearer token.")
    card: str = Field(description="The model card in Markdown.")
    disclaimer: str = Field(description="What a verdict is and is not, in a sentence.")


class ErrorDetail(Schema):
    """Why a request as a whole is refused."""

    code: ErrorCode = Field(description="Stable code.")
    message: str = Field(description="What to do next, in a sentence.")
    request_id: str = Field(description="Id of the request; the server's log has it as well.")


class ErrorBody(Schema):
    """Body of every answer that is not 2xx."""

    error: ErrorDetail = Field(description="The error.")
