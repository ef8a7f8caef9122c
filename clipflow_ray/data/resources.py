"""Resource plans: how much of the cluster each stage takes. A plan that would hang is refused.

Ray starts all actors first and then waits for a free CPU to read with. If the actors hold every logical CPU, the run
never makes progress. A resumed run adds Ray Data's own CheckpointFilter actor, which takes one CPU. So a plan is
accepted only if `CPUs of all actors + 1 <= logical CPUs`.
"""

import logging
import os
import secrets
import signal
import threading
from dataclasses import dataclass
from typing import Any, Final

import ray
import ray.data

from clipflow_ray.errors import ResourceError

_FILTER_CPUS: Final = 1
_READ_CPUS: Final = 1
_ENCODER_CPUS: Final = 4  # more threads speed up one batch only a little; more encoders gain more
_ENCODING_PER_READ_CPU: Final = 8  # decoding takes less than a tenth of what encoding takes
DECODE_CPUS: Final = 0.5  # a task waits for storage half of its time, so two tasks share a core
_EMBEDDED_OBJECT_STORE: Final = 2 * 2**30


@dataclass(frozen=True)
class ScoringPlan:
    """CPUs and GPUs of one encoder actor, how many there are, and how many decode tasks run beside them."""

    encoders: int
    encoder_cpus: int
    encoder_gpus: int
    decoders: int


def connect() -> None:
    """Connect to the cluster that `RAY_ADDRESS` names (it is set in a submitted job), or start an embedded Ray.

    The embedded Ray has two more logical CPUs than the machine has cores. So the encoder can use every core, and
    reading and Ray Data's resume filter still get a CPU each.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The number of processes in which Ray Data reads the footers of the few manifest files; its default is 32.
    os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":  # execution plans go to Ray's log files, only warnings to the terminal
            handler.setLevel(logging.WARNING)
    if ray.is_initialized():
        return
    before = signal.getsignal(signal.SIGTERM)
    _start()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray's own handler aborts the process


def _start() -> None:
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return
    # A token that is only in memory. Otherwise Ray would write one to the home directory, readable by others.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray.init(
        address="local",
        num_cpus=cores() + _FILTER_CPUS + _READ_CPUS,
        object_store_memory=_EMBEDDED_OBJECT_STORE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )


def cores() -> int:
    """Number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def plan_scoring(rows: int, batch_size: int, nodes: list[dict[str, Any]] | None = None) -> ScoringPlan:
    """Divide the live nodes (`ray.nodes()`): one encoder per GPU, or, without GPUs, one for every few CPUs.

    There are at most as many encoders as batches in `rows`. Raises ResourceError, which says what to change, if reading
    would never get a free CPU.
    """
    live = [node["Resources"] for node in (ray.nodes() if nodes is None else nodes) if node["Alive"]]
    cpus = [int(node.get("CPU", 0)) for node in live]
    gpus = sum(int(node.get("GPU", 0)) for node in live)
    encoding = [_encoding_cpus(count) for count in cpus]
    encoder_cpus = 1 if gpus else min(_ENCODER_CPUS, min((count for count in encoding if count > 0), default=0))
    encoders = gpus or sum(count // encoder_cpus for count in encoding if count > 0)
    needed = max(encoders, 1) * max(encoder_cpus, 1) + _FILTER_CPUS + _READ_CPUS
    if encoder_cpus < 1 or sum(cpus) < needed:
        raise ResourceError(
            f"The cluster has {sum(cpus)} logical CPUs on its {len(live)} nodes (largest {max(cpus, default=0)}); this "
            f"run needs {needed}: one for each encoder, one to read, one to resume. Otherwise it hangs. "
            f"Logical CPUs may exceed the cores: start Ray with `--num-cpus={needed + 1}`, or add a node."
        )
    encoders = min(encoders, max(1, -(-rows // batch_size)))
    spare = sum(cpus) - encoders * encoder_cpus - _FILTER_CPUS
    return ScoringPlan(encoders, encoder_cpus, 1 if gpus else 0, max(1, int(spare / DECODE_CPUS)))


def _encoding_cpus(cpus: int) -> int:
    """CPUs of a node that are left for encoding after those for reading and resuming."""
    left = cpus - _FILTER_CPUS
    return left - max(_READ_CPUS, left // _ENCODING_PER_READ_CPU)


def check_training(workers: int, use_gpu: bool) -> dict[str, float]:
    """Resources of one training worker; raises ResourceError if the cluster cannot run all workers at once."""
    total = ray.cluster_resources()
    kind, share = ("GPU", 1.0) if use_gpu else ("CPU", 1.0)
    available = float(total.get(kind, 0.0))
    if workers * share > available:
        raise ResourceError(
            f"{workers} training workers need {workers} {kind}s, but the cluster has {available:g}: "
            "Ray would retry forever. "
            f"Set `fit.workers` to {int(available)} or less, or add nodes."
        )
    return {"CPU": 1.0, "GPU": 1.0} if use_gpu else {"CPU": 1.0}
