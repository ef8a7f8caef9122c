"""Checks of this machine, for a user who has a problem; one line per check."""

import io
import platform
from collections.abc import Callable, Iterator
from importlib import metadata

import numpy as np
import torch
from PIL import Image

from clipflow_ray import __version__
from clipflow_ray.data.resources import cores
from clipflow_ray.errors import ClipflowError
from clipflow_ray.model.checkpoint import load_checkpoint
from clipflow_ray.model.detector import Detector
from clipflow_ray.model.encoder import device_for
from clipflow_ray.model.precision import at_precision, bfloat16_on
from clipflow_ray.model.weights import load_weights

_VERSIONS = ("ray", "torch", "open_clip_torch", "pillow", "pyarrow")


def checks(checkpoint: str) -> Iterator[tuple[str, str, bool]]:
    """(name, outcome, whether it passed) of each check. A check after a failed one may fail for the same reason."""
    yield "versions", ", ".join(f"{name} {metadata.version(name)}" for name in _VERSIONS), True
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    yield "machine", f"clipflow-ray {__version__}, Python {platform.python_version()}, {cores()} cores, {device}", True
    for name, check in (
        ("checkpoint", _checkpoint),
        ("precision", _precision),
        ("weights", _weights),
        ("scoring", _scoring),
    ):
        yield _outcome(name, check, checkpoint)


def _outcome(name: str, check: Callable[[str], str], checkpoint: str) -> tuple[str, str, bool]:
    try:
        return name, check(checkpoint), True
    except ClipflowError as error:
        return name, f"[{error.code}] {error}", False


def _checkpoint(path: str) -> str:
    checkpoint = load_checkpoint(path)
    size = "not calibrated" if checkpoint.calibration is None else f"{len(checkpoint.calibration.scores)} naturals"
    return f"model {checkpoint.model_id}, {size}, {checkpoint.encoder.model}"


def _precision(path: str) -> str:
    device = bfloat16_on(device_for(None))
    checkpoint, reason = at_precision(load_checkpoint(path), "auto", lambda: device)
    speed = "faster" if device.fast else "not faster"
    return f"{checkpoint.encoder.precision}, because {reason}; bfloat16 is {speed} than float32 on {device.device}"


def _weights(path: str) -> str:
    return f"contents sha256 {load_weights(load_checkpoint(path).encoder).sha256}"


def _scoring(path: str) -> str:
    ramp = np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 256, 3))
    out = io.BytesIO()
    Image.fromarray(ramp).save(out, "PNG")
    finding = Detector.from_checkpoint(path).detect(out.getvalue(), alpha=0.05)
    return f"a grey ramp scores {finding.score:.4f}, p {finding.p_value:.4f}"
