"""Detects AI-generated images by anomaly detection: frozen CLIP, a normalizing flow, on Ray."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipflow_ray.model.detector import Detector

__version__ = "0.1.0"
__all__ = ["Detector", "__version__", "load_detector"]


def load_detector(path: str | None = None, device: str | None = None) -> "Detector":
    """The detector of a checkpoint directory, or of the packaged default."""
    from clipflow_ray.config import DEFAULT_CHECKPOINT
    from clipflow_ray.model.detector import Detector

    return Detector.from_checkpoint(path or DEFAULT_CHECKPOINT, device)


def __getattr__(name: str) -> Any:
    # Torch takes seconds to import; a manifest task or the command line's --help should not wait for it.
    if name == "Detector":
        from clipflow_ray.model.detector import Detector

        return Detector
    raise AttributeError(name)
