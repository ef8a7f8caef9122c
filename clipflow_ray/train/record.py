"""The models of `run.json` in a features run, which holds the embeddings on which the flow is fitted."""

from pydantic import Field

from clipflow_ray.config import Closed, InventoryOptions, ProxyConfig, Segment, TrainingLimits
from clipflow_ray.runs.record import FinishedRecord
from clipflow_ray.train.parts import Parts


class FeaturesIdentity(Closed):
    """All settings that affect the embeddings. After any change, images are encoded again into another folder."""

    input: tuple[str, ...] = Field(description="URIs of the inputs.")
    inventory: InventoryOptions = Field(description="How the inputs are read.")
    listing: str = Field(description="Hash of the listed objects.")
    encoder_fingerprint: str = Field(description="Fingerprint of the encoder.")
    proxies: ProxyConfig = Field(description="Settings of views and proxies.")
    parts: Parts = Field(description="Sources or images that are kept out of training.")
    limits: TrainingLimits = Field(description="Size and time limits for decoding an image.")
    tool_version: str = Field(description="Version of this package.")
    segments: tuple[Segment, ...] = Field(description="Segments whose embeddings are stored.")


class FeaturesRecord(FinishedRecord[FeaturesIdentity]):
    """`run.json` of finished features."""

    errors: int = Field(description="Objects that could not be read.")
