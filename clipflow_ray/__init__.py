"""Detects AI-generated images by anomaly detection: frozen CLIP embeddings and a normalizing flow, on Ray."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipflow_ray.config import ImageLimits, PrecisionChoice
    from clipflow_ray.model.detector import Detector

__version__ = "0.1.0"
__all__ = ["Detector", "__version__", "load_detector"]


def load_detector(
    path: str | None = None,
    device: str | None = None,
    precision: "PrecisionChoice" = "auto",
    limits: "ImageLimits | None" = None,
) -> "Detector":
    """The detector of a checkpoint on a torch `device`.

    `path` is its directory, or the name of a packaged one: `default` or `fast`. `precision` is that of the encoder:
    `float32`, `bfloat16`, or `auto`, which is bfloat16 if the device is fast at it and the checkpoint is calibrated for
    it. An image beyond `limits` is not scored; the default is `ImageLimits()`.

    Fetches the encoder weights if this machine does not have them. Raises CheckpointError, CalibrationError,
    WeightsError or EncoderMismatchError if a part is unusable.
    """
    from clipflow_ray.config import DEFAULT_CHECKPOINT
    from clipflow_ray.model.detector import Detector

    return Detector.from_checkpoint(path or DEFAULT_CHECKPOINT, device, precision, limits)


def __getattr__(name: str) -> Any:
    # Torch takes seconds to import. A manifest task or the --help of the command line should not wait for it.
    if name == "Detector":
        from clipflow_ray.model.detector import Detector

        return Detector
    raise AttributeError(name)
