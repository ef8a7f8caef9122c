"""Clusters that grow: node groups for plans, and Ray's own fake autoscaling cluster.

Ray's `AutoscalingCluster` is not used, because it stops all Ray processes of the machine, and because the wheel lacks a
file that it reads. The autoscaler, its node provider and the nodes are the same.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import psutil
from ray.util import get_node_ip_address

from clipflow_ray.data.resources import Resources

HEAD_ID: Final = "f" * 51 + "00000"


def adds(groups: Sequence[tuple[Resources, int]]) -> Callable[[Sequence[Resources]], bool]:
    """An autoscaler that may add, of each group (node, count), up to `count` nodes."""

    def can_add(bundles: Sequence[Resources]) -> bool:
        free = [dict(node) for node, count in groups for _ in range(count)]
        for bundle in sorted(bundles, key=lambda each: (each.get("GPU", 0), each.get("CPU", 0)), reverse=True):
            for node in free:
                if all(node.get(name, 0) >= amount for name, amount in bundle.items()):
                    for name, amount in bundle.items():
                        node[name] -= amount
                    break
            else:
                return False
        return True

    return can_add


def started_here(marks: Sequence[str]) -> list[psutil.Process]:
    """Processes whose command line has one of `marks`, such as the folder or the address of a cluster."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(mark in word for word in process.info["cmdline"] or [] for mark in marks):
            found.append(process)
    return found


@contextmanager
def fake_cluster(
    folder: Path, port: int, head: Mapping[str, int], groups: Mapping[str, tuple[Resources, int]]
) -> Iterator[str]:
    """A cluster whose autoscaler starts nodes as processes of this machine; yields its address.

    `groups` maps the name of a node type to the resources of a node and the largest number of nodes. GPUs are numbers
    alone. The cluster ends with the context.
    """
    address = f"{get_node_ip_address()}:{port}"
    node = {"node_config": {}, "min_workers": 0}
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    config: dict[str, Any] = {
        "cluster_name": "fake",
        **{f"{when}setup_commands": [] for when in ("", "head_", "worker_")},
        "max_workers": 16,
        "idle_timeout_minutes": 0.5,
        "provider": {
            "type": "external",
            "module": provider,
            "gcs_address": address,
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "foreground_node_launch": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {**node, "resources": dict(head), "max_workers": 0},
            **{
                name: {**node, "resources": {**resources, "object_store_memory": 10**8}, "max_workers": most}
                for name, (resources, most) in groups.items()
            },
        },
    }
    file = folder / "autoscaler.json"
    file.write_text(json.dumps(config))
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", f"--port={port}", f"--temp-dir={folder}"]
    command += [f"--num-cpus={head['CPU']}", f"--num-gpus={head.get('GPU', 0)}", f"--autoscaling-config={file}"]
    command += ["--include-dashboard=false", "--object-store-memory=200000000", "--disable-usage-stats"]
    switches = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    }
    try:
        subprocess.run(command, env=os.environ | switches, check=True, stdout=subprocess.DEVNULL)
        yield address
    finally:
        left = started_here([str(folder), address])
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=20)
