"""Which precision the encoders of a run compute in: one for all nodes, whichever node the driver is on."""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clipflow_ray.model.encoder import device_for
from clipflow_ray.model.precision import Bfloat16, bfloat16_on


def bfloat16_on_nodes(gpus: float) -> Bfloat16:
    """Whether all live nodes that may run an encoder are fast at bfloat16; the answer of one that is not, if there is.

    `gpus` are those of one encoder. Without GPUs, every node with a CPU may run one. If an encoder takes a GPU and no
    node has one yet, the first node that gets one is asked. A node that joins later does not change the answer.
    """
    kind = "GPU" if gpus else "CPU"
    here = ray.get_runtime_context().get_node_id()
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get(kind, 0) > 0]
    if not gpus and nodes == [here]:
        return bfloat16_on(device_for("cpu"))  # no worker process has to start
    places: list[Any] = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes] or ["DEFAULT"]
    task = ray.remote(_of_this_node)
    answers: list[Bfloat16] = ray.get(
        [task.options(num_cpus=0, num_gpus=gpus, scheduling_strategy=place).remote() for place in places]
    )
    return min(answers, key=lambda answer: answer.fast)


def _of_this_node() -> Bfloat16:
    """As an encoder on this node would find it: a worker without a GPU sees no CUDA device."""
    return bfloat16_on(device_for(None))
