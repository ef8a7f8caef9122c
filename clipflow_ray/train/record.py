"""What `run.json` of the features holds: the embeddings that a training fits the flow on."""

from pydantic import Field

from clipflow_ray.config import Closed, ImageLimits, ProxyConfig
from clipflow_ray.runs.record import FinishedRecord


class FeaturesIdentity(Closed):
    """What shapes the embeddings: with any change they are encoded anew, into another folder."""

    input: tuple[str, ...] = Field(description="URIs of the inputs.")
    listing: str = Field(description="Hash of the listed objects.")
    encoder_fingerprint: str = Field(description="Fingerprint of the encoder.")
    proxies: ProxyConfig = Field(description="Settings of views and proxies.")
    calibration: tuple[str, ...] = Field(description="Sources that get a plain view only, in alphabetical order.")
    limits: ImageLimits = Field(description="Limits of size and time for the decoding of an image.")
    tool_version: str = Field(description="Version of this package.")
    features: tuple[str, ...] = Field(description="Encoder features that are stored.")


class FeaturesRecord(FinishedRecord[FeaturesIdentity]):
    """`run.json` of finished features."""

    errors: int = Field(description="Objects that could not be read.")
