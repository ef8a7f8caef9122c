"""Resource plans: how much of the cluster each stage takes. A plan that would hang is refused.

Ray Data starts the fewest encoders of a pool and needs one CPU to read with. A resumed run adds Ray Data's own
CheckpointFilter actor, which takes one CPU. An encoder must fit on one node. An encoder on a GPU takes no logical CPU:
it waits for the GPU, and decode tasks could keep a CPU from it for ever. With an autoscaler, the plan counts what it
can add too, and the pool follows the cluster.
"""

import logging
import os
import secrets
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import ray
import ray.data

from clipflow_ray import compat
from clipflow_ray.config import PoolConfig
from clipflow_ray.errors import ResourceError

_FILTER_CPUS: Final = 1
_READ_CPUS: Final = 1
_ENCODER_CPUS: Final = 4  # more threads speed up one batch only a little; more encoders gain more
_ENCODING_PER_READ_CPU: Final = 8  # decoding takes less than a tenth of what encoding takes
_NEARLY: Final = 0.75  # an encoder has a copy of the model, so few large ones are preferred
_MODEL_SHARE: Final = 0.001  # Ray's own amount of the resource that names a GPU model
DECODE_CPUS: Final = 0.5  # a task waits for storage half of its time, so two tasks share a core
_EMBEDDED_OBJECT_STORE: Final = 2 * 2**30

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Cluster:
    """The logical resources of each live node, and what the autoscaler can add.

    `can_add` tells whether the autoscaler can make room for some bundles of resources at the same time, each of them on
    one node. It is None if the cluster has no autoscaler.
    """

    nodes: Sequence[Resources]
    can_add: Callable[[Sequence[Resources]], bool] | None = None

    @classmethod
    def live(cls) -> "Cluster":
        """The cluster that this process is connected to."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return cls(nodes, compat.autoscaler_can_add if compat.has_autoscaler() else None)


@dataclass(frozen=True)
class ScoringPlan:
    """The encoders of a run and the decode tasks beside them.

    The pool starts with `initial` encoders and has between `fewest` and `most`. Each takes `encoder_cpus` CPUs and
    `encoder_gpus` GPUs, or a share of one, of the model `accelerator_type`, if that is given. `decoders` is the largest
    number of decode tasks at a time, or None for as many as the CPUs allow.
    """

    fewest: int
    initial: int
    most: int
    encoder_cpus: int
    encoder_gpus: float
    accelerator_type: str | None
    decoders: int | None

    @property
    def threads(self) -> int:
        """Threads of one encoder on the CPU."""
        return max(1, self.encoder_cpus)

    @property
    def in_words(self) -> str:
        """The encoders, as in `1 to 8 encoders on 1 GPU each`."""
        number = f"{self.fewest}" if self.fewest == self.most else f"{self.fewest} to {self.most}"
        each = f"{self.encoder_gpus:g} GPU" if self.encoder_gpus else f"{self.encoder_cpus} CPU"
        return f"1 encoder on {each}" if number == "1" else f"{number} encoders on {each} each"


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


def check_reading(cluster: Cluster | None = None) -> None:
    """Raise ResourceError if no node has a CPU, and none that the autoscaler can add, so that no task would ever start.

    A run lists its input in a task, before the number of objects is known and a plan can be made.
    """
    cluster = cluster or Cluster.live()
    if not (_total(cluster.nodes, "CPU") or (cluster.can_add and cluster.can_add([{"CPU": 1.0}]))):
        raise ResourceError(
            f"The cluster has no logical CPU on its {len(cluster.nodes)} nodes"
            f"{', and its autoscaler can add none' if cluster.can_add else ''}, so nothing would ever start. "
            "Start Ray with a larger `--num-cpus`, or add a node."
        )


def plan_scoring(
    rows: int, batch_size: int, pool: PoolConfig, resumed: bool, cluster: Cluster | None = None
) -> ScoringPlan:
    """Divide the cluster, by default the live one: encoders on GPUs if there are any, else on some CPUs each.

    There are at most as many encoders as batches in `rows`. `resumed` tells whether some rows are finished, so that
    Ray Data filters them. Without an autoscaler, a pool of automatic size has as many encoders as the nodes have room
    for. With one, it has at least one encoder, and grows and shrinks with the cluster. If no node has a GPU, the
    autoscaler is asked for one, and begins to add it.

    Raises ResourceError, which says what to change, if the run would wait for ever.
    """
    cluster = cluster or Cluster.live()
    nodes = cluster.nodes
    others = [{"CPU": 1.0}] * (2 if resumed else 1)  # to read, and to filter finished rows
    batches = max(1, -(-rows // batch_size))
    fewest, most = (min(count, batches) for count in ((1, batches) if pool.encoders == "auto" else pool.encoders))
    gpus = _gpus_per_encoder(pool, cluster, others)
    cpus = 0 if gpus else _cpus_per_encoder(cluster, fewest, others)
    encoder = _encoder(cpus, gpus, pool.accelerator_type)
    _check(cluster, encoder, fewest, others)
    room = _room(nodes, encoder) if gpus else _cpu_encoders(nodes, cpus)
    if pool.encoders == "auto" and not cluster.can_add:
        fewest = most = max(1, min(room, batches))
    initial = max(fewest, min(room, most))
    if pool.decoders != "auto":
        decoders: int | None = pool.decoders
    elif cluster.can_add or initial < most:  # nodes may be added, and their CPUs are not known yet
        decoders = None
    else:
        decoders = max(1, int((_total(nodes, "CPU") - initial * cpus - _FILTER_CPUS) / DECODE_CPUS))
    return ScoringPlan(fewest, initial, most, cpus, gpus, pool.accelerator_type, decoders)


def _gpus_per_encoder(pool: PoolConfig, cluster: Cluster, others: Sequence[Resources]) -> float:
    if pool.gpus_per_encoder != "auto":
        return pool.gpus_per_encoder
    if pool.accelerator_type or _total(cluster.nodes, "GPU"):
        return 1.0
    return 1.0 if cluster.can_add and cluster.can_add([_encoder(0, 1.0, None), *others]) else 0.0


def _cpus_per_encoder(cluster: Cluster, fewest: int, others: Sequence[Resources]) -> int:
    """4, or the largest smaller number with which encoders use nearly as many CPUs as they can."""
    choices = range(_ENCODER_CPUS, 0, -1)
    used = {cpus: cpus * _cpu_encoders(cluster.nodes, cpus) for cpus in choices}
    enough = _NEARLY * max(used.values())
    for cpus in sorted(choices, key=lambda cpus: used[cpus] < enough):
        if _fit(cluster.nodes, _encoder(cpus, 0.0, None), fewest, len(others)):
            return cpus
    if cluster.can_add:
        for cpus in choices:
            if cluster.can_add([_encoder(cpus, 0.0, None)] * fewest + [*others]):
                return cpus
    return 1


def _cpu_encoders(nodes: Sequence[Resources], cpus: int) -> int:
    """How many encoders of `cpus` CPUs leave enough CPUs for reading on each node, and for resuming."""
    counts = [int(node.get("CPU", 0)) for node in nodes]
    room = sum((count - count // _ENCODING_PER_READ_CPU) // cpus for count in counts)
    return max(0, min(room, (sum(counts) - _READ_CPUS - _FILTER_CPUS) // cpus))


def _encoder(cpus: int, gpus: float, accelerator_type: str | None) -> Resources:
    """The resources of one encoder, with names as in `ray.nodes()`."""
    model = {f"accelerator_type:{accelerator_type}": _MODEL_SHARE} if accelerator_type else {}
    return {"GPU": gpus, **model} if gpus else {"CPU": float(cpus)}


def _room(nodes: Sequence[Resources], bundle: Resources) -> int:
    """How many times `bundle` fits on the nodes. A share of a GPU is taken from one GPU."""

    def times(available: float, amount: float) -> int:
        if amount < 1 and available >= 1:
            return int(available) * int(1 / amount + 1e-9)
        return int(available // amount)

    return sum(min(times(node.get(name, 0.0), amount) for name, amount in bundle.items()) for node in nodes)


def _total(nodes: Sequence[Resources], name: str) -> int:
    return sum(int(node.get(name, 0)) for node in nodes)


def _check(cluster: Cluster, encoder: Resources, count: int, others: Sequence[Resources]) -> None:
    """Raise ResourceError if there will never be room for `count` encoders and for `others` at the same time."""
    if _fit(cluster.nodes, encoder, count, len(others)):
        return
    if cluster.can_add and cluster.can_add([encoder] * count + [*others]):
        return
    nodes, each = cluster.nodes, " and ".join(f"{amount:g} {name}" for name, amount in encoder.items())
    largest = max((_total([node], "CPU") for node in nodes), default=0)
    raise ResourceError(
        f"This run needs {count} encoders with {each} each, on one node, and beside them {len(others)} CPU to read"
        f"{' and to resume' if len(others) > 1 else ''}. The cluster has {_total(nodes, 'CPU')} logical CPUs on its "
        f"{len(nodes)} nodes (largest {largest}), and {_total(nodes, 'GPU')} GPUs: {_room(nodes, encoder)} such "
        f"encoders. {'Its autoscaler cannot add what is missing. ' if cluster.can_add else ''}The run would hang. "
        "Logical CPUs may exceed the cores: start Ray with a larger `--num-cpus`, add a node, or change `encoders`, "
        "`gpus_per_encoder` or `accelerator_type`."
    )


def _fit(nodes: Sequence[Resources], encoder: Resources, count: int, others: int) -> bool:
    """Whether the nodes hold `count` encoders and `others` single CPUs, wherever Ray places the single CPUs."""
    if _total(nodes, "CPU") < others + count * encoder.get("CPU", 0.0):
        return False
    if others == 1 or "CPU" not in encoder:
        return _room(nodes, encoder) >= count
    # A read task gives its CPU back, but the filter of a resumed run keeps it, perhaps where an encoder would fit.
    counts = {node.get("CPU", 0.0): at for at, node in enumerate(nodes) if node.get("CPU", 0.0) >= _FILTER_CPUS}
    taken = [[*nodes[:at], {**nodes[at], "CPU": cpus - _FILTER_CPUS}, *nodes[at + 1 :]] for cpus, at in counts.items()]
    return all(_room(left, encoder) >= count for left in taken)


def plan_training(workers: int, cluster: Cluster | None = None) -> Resources:
    """The resources of each training worker: a CPU, and a GPU if the cluster has one or its autoscaler can add one.

    Raises ResourceError if there will never be room for all workers at once, because Ray would retry for ever.
    """
    cluster = cluster or Cluster.live()
    cpu, gpu = {"CPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}
    worker = gpu if _total(cluster.nodes, "GPU") or (cluster.can_add and cluster.can_add([gpu])) else cpu
    room = _room(cluster.nodes, worker)
    if room < workers and not (cluster.can_add and cluster.can_add([worker] * workers)):
        each = " and ".join(f"{amount:g} {name}" for name, amount in worker.items())
        raise ResourceError(
            f"{workers} training workers need {each} each, on one node, and the cluster has room for {room} of them"
            f"{'; its autoscaler cannot add more' if cluster.can_add else ''}. "
            f"Set `fit.workers` to {max(room, 1)} or less, or add nodes."
        )
    return worker
