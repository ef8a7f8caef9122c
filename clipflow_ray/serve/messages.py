"""What the ingress and the detectors say to each other. The ingress keeps the facts of files; a detector gets views."""

from dataclasses import dataclass
from typing import Protocol

from clipflow_ray.config import ViewSpec
from clipflow_ray.images import Pixels
from clipflow_ray.model.calibration import Rule, SourceRange
from clipflow_ray.model.finding import Numbers
from clipflow_ray.serve.schemas import ModelInfo, Threshold


@dataclass(frozen=True)
class Scored:
    """Numbers of the views of one request in their order, all by one model, and the rule to judge by.

    `view` is that of the model, which an update may have changed since the views were made.
    """

    model: ModelInfo
    view: ViewSpec
    rule: Rule
    alpha_realised_95: tuple[float, float]
    unseen_source: SourceRange | None
    p_floor: float
    numbers: list[Numbers]


@dataclass(frozen=True)
class Refused:
    """The calibration does not support the alpha of the request; `message` says why."""

    message: str


@dataclass(frozen=True)
class Description:
    """What a detector knows of its checkpoint and settings: most of GET /v1/model, and how to decode."""

    model: ModelInfo
    view: ViewSpec
    alpha: float
    alpha_realised_95: tuple[float, float]
    unseen_source: SourceRange | None
    p_floor: float
    calibration_n: int
    calibration_sources: int
    in_words: tuple[str, ...]
    thresholds: list[Threshold]
    card: str


class Detectors(Protocol):
    """The detectors behind an ingress replica. Methods raise RequestError `overloaded` or `not_ready`."""

    async def score(self, views: list[Pixels], alpha: float | None) -> Scored | Refused:
        """Score views, uint8 [size, size, 3] each; without `alpha` the server's own is meant."""

    async def describe(self) -> Description:
        """The facts of the checkpoint that is served now."""

    async def reproduces(self, view: Pixels) -> bool:
        """Whether the probe image, decoded to `view`, gets the score that it had when the model was loaded."""
