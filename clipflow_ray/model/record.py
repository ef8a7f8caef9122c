"""The models of `checkpoint.json`."""

from typing import Final, Literal

from pydantic import Field

from clipflow_ray.config import (
    Closed,
    EncoderConfig,
    FitConfig,
    FlowConfig,
    ImageLimits,
    ObjectiveConfig,
    Precision,
    ProxyConfig,
    Segment,
    SplitConfig,
    ViewSpec,
)


class TrainingRecord(Closed):
    """How a checkpoint was made, without the paths of the machine that made it."""

    input: tuple[str, ...] = Field(description="Last component of each input's URI.")
    listing: str = Field(description="Hash of the listed objects.")
    objects: int = Field(description="Listed objects.")
    unreadable: int = Field(description="Objects that could not be read.")
    config_hash: str = Field(description="Hash of the fit, flow, objective, proxy and split settings.")
    fit: FitConfig = Field(description="Settings of the optimisation.")
    split: SplitConfig = Field(description="Sources and family that were kept out of training.")
    split_by: Literal["source", "image"] = Field(
        description="`source` if no two parts share a source, `image` if they share sources but no image."
    )
    views: dict[str, int] = Field(description="Number of views in each part.")
    images: dict[str, int] = Field(description="Number of images in each part.")
    sources: dict[str, tuple[str, ...]] = Field(description="Names of the sources in each part.")
    metrics: dict[str, float] = Field(description="Figures of the chosen epoch, by name.")
    history: tuple[dict[str, float], ...] = Field(description="Figures of every epoch up to the chosen one, by name.")
    tool_version: str = Field(description="Version of this package.")
    made_at: str = Field(description="Time at which the training ended, ISO 8601 in UTC.")


class CalibrationStep(Closed):
    """One replacement of a checkpoint's calibrations by `calibrate`, without the paths of the machine."""

    calibration_before: str = Field(description="Id of the calibration that was replaced, at the first precision.")
    precisions: tuple[Precision, ...] = Field(
        (), description="Precisions of the new calibrations; empty in a record of an older release, which knew one."
    )
    input: tuple[str, ...] = Field(description="Last component of each input's URI.")
    photographs: int = Field(description="Photographs that were added.")
    sources: int = Field(description="Their sources.")
    keep_shipped: float = Field(description="Weight of the replaced calibration in the new one.")
    tool_version: str = Field(description="Version of this package.")
    made_at: str = Field(description="Time of the replacement, ISO 8601 in UTC.")


FORMAT_VERSION: Final = 4


class CalibratedRecord(Closed):
    """A further precision of the encoder. Its scores are in the file `calibration-PRECISION.safetensors`."""

    encoder_fingerprint: str = Field(description="Fingerprint of the encoder at this precision.")
    calibration_strata: tuple[str, ...] = Field(description="Stratum of each calibration score, in the scores' order.")


class CheckpointRecord(Closed):
    """`checkpoint.json`. Version 2 added `view`; 3 segments with a view and a training of their own; 4 `further`.

    Older versions are read as well. The features of versions 1 and 2 are plain segments of one view.
    """

    format_version: Literal[4] = Field(FORMAT_VERSION, description="Version of the file's format.")
    model_id: str = Field(description="16 hex digits over the flow's tensors and the encoder's fingerprint.")
    encoder: EncoderConfig = Field(description="The encoder: its architecture, weights, kind of view and precision.")
    encoder_fingerprint: str = Field(description="Fingerprint of the encoder that the flow was fitted on.")
    view: ViewSpec = Field(description="The views that the encoder sees.")
    segments: tuple[Segment, ...] = Field(description="The parts of the score: feature, size of the view, training.")
    widths: tuple[int, ...] = Field(description="Width of each segment.")
    flow: FlowConfig = Field(description="Settings of the flow.")
    limits: ImageLimits = Field(description="Limits with which the training images were decoded.")
    objective: ObjectiveConfig = Field(description="Settings of the objective.")
    proxies: ProxyConfig = Field(description="Settings of views and proxies.")
    calibration_strata: tuple[str, ...] = Field(description="Stratum of each calibration score, in the scores' order.")
    further: dict[Precision, CalibratedRecord] = Field(
        {}, description="Other precisions of the encoder that the checkpoint is calibrated for, by name."
    )
    training: TrainingRecord | None = Field(description="How the checkpoint was made; null if it was not trained.")
    lineage: tuple[CalibrationStep, ...] = Field((), description="Replacements of the calibration, oldest first.")
    sha256: dict[str, str] = Field(description="sha256 of each tensor file, by name.")
    record_sha256: str = Field("", description="sha256 of all other fields, as json with sorted keys.")
