"""What an evaluation writes as json: `figures.json`, and `run.json` of its two runs of embeddings."""

from pydantic import Field

from clipflow_ray.config import Closed
from clipflow_ray.runs.record import FinishedRecord


class VariantsIdentity(Closed):
    """What shapes the embeddings of the images as found and format-aligned."""

    encoder_fingerprint: str = Field(description="Fingerprint of the encoder.")
    features: tuple[str, ...] = Field(description="Encoder features that are stored.")
    input: tuple[str, ...] = Field(description="URIs of the natural and of the generated inputs.")
    listing: str = Field(description="Hash of the listed objects.")
    variants: tuple[str, ...] = Field(description="Names of the variants.")


class DistortionsIdentity(Closed):
    """What shapes the embeddings of the distorted images."""

    encoder_fingerprint: str = Field(description="Fingerprint of the encoder.")
    features: tuple[str, ...] = Field(description="Encoder features that are stored.")
    listing: str = Field(description="Hash of the listed objects.")
    cases: tuple[str, ...] = Field(description="Name and level of each distortion.")
    draws: dict[str, int] = Field(description="Random draw of each distorted image, by row id.")


class VariantsRecord(FinishedRecord[VariantsIdentity]):
    """`run.json` of finished embeddings of both variants."""


class DistortionsRecord(FinishedRecord[DistortionsIdentity]):
    """`run.json` of finished embeddings of the distorted images."""
