"""The result for one image: facts of its file, numbers of the model and a verdict. Needs neither torch nor Ray.

Each kind of output is made from these classes in one place. `Detector.detect` returns a Finding, and
`clipflow-ray score` prints its fields as JSON. `serve.service` turns a Finding into an item of an HTTP answer. The
ledger's columns of the same names hold FileFacts and Numbers, and its verdicts come from a `calibration.Rule` too.
"""

import math
from dataclasses import dataclass, field
from typing import Final, Literal, TypedDict

from clipflow_ray import images
from clipflow_ray.errors import ItemCode, ItemError
from clipflow_ray.images import DecodedImage
from clipflow_ray.model.calibration import Reason, Rule, Verdict

WarningCode = Literal["no_exif", "enlarged_to_view"]
# What each warning means; docs/formats.md shows these sentences.
WARNINGS: Final[dict[WarningCode, str]] = {
    "no_exif": "The file has no EXIF metadata. Editing, sharing and screenshots remove it too.",
    "enlarged_to_view": "The shorter side is below that of the encoder's largest view, so the image was enlarged.",
}


class Failure(TypedDict):
    """Why an image has no score: a stable code, and a sentence that says what to do next."""

    code: ItemCode
    message: str


@dataclass(frozen=True)
class FileFacts:
    """Facts of an image file. `width` and `height` are those of the upright image, in pixels.

    `jpeg_quality` is on the IJG scale from 1 to 100, and None if the file has no quantization table.
    """

    width: int
    height: int
    format: str
    mode: str
    frames: int
    jpeg_quality: int | None
    has_exif: bool

    @classmethod
    def of(cls, image: DecodedImage) -> "FileFacts":
        """The facts of a decoded image, without its pixels."""
        return cls(
            width=image.width,
            height=image.height,
            format=image.format,
            mode=image.mode,
            frames=image.frames,
            jpeg_quality=image.jpeg_quality,
            has_exif=image.has_exif,
        )

    @property
    def stratum(self) -> str:
        """Format and range of the long side, such as `jpeg|512-1024`; `p_stratum` is calibrated within it."""
        return images.stratum(self.format, self.width, self.height)


@dataclass(frozen=True)
class Numbers:
    """The numbers of the model for one image. `score` is the sum of the standardised negative log-likelihoods.

    All are NaN if the encoder gave no finite embedding.
    """

    log_likelihood: float
    score: float
    p_value: float


@dataclass(frozen=True)
class Finding:
    """The result for one image. If `status` is `error`, the image has no score and `error` says why.

    `index` is the image's position in its request, from 0. `sha256` is the hash of its bytes. A server gives no hash of
    an oversized file, because the bytes of such a file are counted, not kept.
    """

    index: int
    sha256: str | None
    status: Literal["ok", "error"]
    width: int | None = None
    height: int | None = None
    format: str | None = None
    log_likelihood: float | None = None
    score: float | None = None
    p_value: float | None = None
    stratum: str | None = None
    verdict: Verdict | None = None
    reasons: list[Reason] = field(default_factory=list)
    warnings: list[WarningCode] = field(default_factory=list)
    error: Failure | None = None


def judged(index: int, sha256: str | None, facts: FileFacts, numbers: Numbers, rule: Rule, view_size: int) -> Finding:
    """The Finding of a decoded image by `rule`; without a finite score its status is `error`.

    `view_size` is the side of the encoder's largest view in pixels: a smaller image was enlarged.
    """
    if not math.isfinite(numbers.score):
        return refused(index, sha256, non_finite())
    decision, reasons = rule.verdict(numbers.p_value, facts.stratum)
    warnings: list[WarningCode] = []
    if not facts.has_exif:
        warnings.append("no_exif")
    if min(facts.width, facts.height) < view_size:
        warnings.append("enlarged_to_view")
    return Finding(
        index,
        sha256,
        status="ok",
        width=facts.width,
        height=facts.height,
        format=facts.format,
        log_likelihood=numbers.log_likelihood,
        score=numbers.score,
        p_value=numbers.p_value,
        stratum=facts.stratum,
        verdict=decision,
        reasons=reasons,
        warnings=warnings,
    )


def refused(index: int, sha256: str | None, error: ItemError) -> Finding:
    """The Finding of an image that has no score."""
    return Finding(index, sha256, status="error", error={"code": error.item_code, "message": str(error)})


def non_finite() -> ItemError:
    """The error of an image whose embedding is not finite."""
    return ItemError("non_finite", "The encoder gave no finite embedding for this image.")
