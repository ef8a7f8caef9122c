"""Which precision an encoder computes in: what this machine is fast at, and what the checkpoint is calibrated for.

bfloat16 halves the bytes of each number. CUDA devices since the Ampere generation multiply it several times as fast as
float32, and so do CPUs with AMX. Other CPUs convert each number, which takes longer than float32 does.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from clipflow_ray import compat
from clipflow_ray.config import PrecisionChoice
from clipflow_ray.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class Bfloat16:
    """Whether a device is faster at bfloat16 than at float32; `device` names it, such as "a CPU with AMX"."""

    fast: bool
    device: str


def bfloat16_on(device: torch.device) -> Bfloat16:
    """Whether the named device of this machine is faster at bfloat16 than at float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return Bfloat16(torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name())
    # oneDNN, which multiplies the matrices, takes an upper limit of its instructions from this variable.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    permitted = limit in ("ALL", "DEFAULT") or "AMX" in limit
    if device.type == "cpu" and permitted and torch.backends.mkldnn.is_available() and compat.has_amx():
        return Bfloat16(True, "a CPU with AMX")
    return Bfloat16(False, "a CPU without AMX" if device.type == "cpu" else f"a device of type {device.type}")


def at_precision(
    checkpoint: Checkpoint, choice: PrecisionChoice, ask: Callable[[], Bfloat16]
) -> tuple[Checkpoint, str]:
    """`checkpoint` at the chosen precision, and the reason as words that follow "because".

    `auto` is the precision that `ask` says is faster, if the checkpoint is calibrated for both, else the one that it is
    calibrated for. `ask` is called only if there is a choice. A
    checkpoint without any calibration is returned unchanged. Raises CalibrationError if the checkpoint is not
    calibrated for the precision that `choice` names.
    """
    if choice != "auto":
        return checkpoint.at(choice), "it was asked for"
    known = checkpoint.as_trained.precisions
    if len(known) < 2:
        return (checkpoint.at(known[0]) if known else checkpoint), "the checkpoint is calibrated for no other"
    found = ask()
    if found.fast:
        return checkpoint.at("bfloat16"), f"{found.device} is faster at it"
    return checkpoint.at("float32"), f"{found.device} is not faster at bfloat16"
