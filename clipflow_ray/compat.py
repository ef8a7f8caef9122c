"""Private names of other packages. Each is wrapped in one function, which says why it is needed.

No other module uses such a name. `tests/unit/test_compat.py` fails if an upgrade has changed one of them. The imports
are inside the functions, so that a process imports only the package that it uses.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def open_clip() -> Any:
    """The package open_clip, imported without torch's compiler, which would take two of the four seconds.

    torchvision imports the compiler to ask whether it supports a device, and timm to keep a function from being
    compiled. Nothing is compiled here. So stand-ins that answer no and that change nothing are in place during the
    import. Later imports of the compiler get the real one. Private because torch has no public way to do without it.
    """
    import torch

    name = "torch._dynamo.utils"
    if name not in sys.modules:
        utils: Any = ModuleType(name)
        utils.is_compile_supported = lambda device_type: False
        compiler: Any = torch.compiler
        disable = compiler.disable
        sys.modules[name] = utils
        compiler.disable = lambda function: function
        try:
            import open_clip
        finally:
            compiler.disable = disable
            del sys.modules[name]
    import open_clip

    return open_clip


def image_tower(embed_dim: int, vision_cfg: dict[str, Any], quick_gelu: bool = False) -> "nn.Module":
    """An open_clip image tower with random weights.

    Private because `open_clip.create_model` builds the text tower too, which is the larger half of some models and may
    fetch a tokenizer.
    """
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    known = CLIPVisionCfg(**{**vision_cfg, "timm_model_pretrained": False})
    tower: nn.Module = _build_vision_tower(embed_dim, known, quick_gelu)
    return tower


def has_amx() -> bool:
    """Whether the CPU multiplies bfloat16 matrices by AMX, and the kernel permits this process to use it.

    Private because torch's public list of capabilities says what the CPU has, and not what the kernel permits.
    """
    import torch

    return bool(torch.cpu.get_capabilities().get("amx_bf16", False)) and bool(torch.cpu._init_amx())


def handle_of_cluster(handle: Any) -> Any:
    """`handle` of a deployment, set to send its calls as this process's cluster does: by gRPC or by Ray.

    Private because Ray fixes that choice in the process that binds the application. The environment variables of that
    process may differ from those of the cluster, and Ray has no public way to read or change the choice.
    """
    from ray.serve._private.constants import RAY_SERVE_USE_GRPC_BY_DEFAULT

    return handle.options(_by_reference=not RAY_SERVE_USE_GRPC_BY_DEFAULT)


def ingress_addresses(application: str, timeout_seconds: float) -> list[tuple[str, int]]:
    """IP address and port of each server that answers HTTP for `application`, on all nodes.

    These are the ingress replicas if they answer HTTP themselves, and Serve's proxies otherwise. Private because Ray
    gives the addresses of replicas only to its own load balancer. Raises RayError if Serve does not answer in time.
    """
    import ray

    groups = ray.get(serve_client()._controller.get_target_groups.remote(application), timeout=timeout_seconds)
    return [(each.ip, each.port) for group in groups if group.protocol == "HTTP" for each in group.targets]


def split_parquet_sink(main: dict[str, Any], aside: dict[str, Any], columns: Sequence[str], rows_per_file: int) -> Any:
    """A Ray Data sink that writes each block as two parquet files of the same name, below two folders.

    `main` and `aside` are the arguments `path` and `filesystem` of the folders. The file aside holds `row_id` and the
    `columns`, which are numbers that compress badly. The main file holds all columns but these. Private because Ray
    Data offers its parquet sink only as `write_parquet`, which writes one file, and because a checkpointed write is
    atomic only with a sink derived from Ray's own.
    """
    from ray.data._internal.datasource.parquet_datasink import ParquetDatasink

    class SplitParquet(ParquetDatasink):
        def __init__(self) -> None:
            super().__init__(**main, min_rows_per_file=rows_per_file)
            plain = {"use_dictionary": False, "compression": "none"}
            self._aside = ParquetDatasink(**aside, min_rows_per_file=rows_per_file, arrow_parquet_args=plain)

        def on_write_start(self, schema: Any = None) -> None:
            super().on_write_start(schema)
            self._aside.on_write_start(schema)

        def write(self, blocks: Any, ctx: Any) -> None:
            tables = list(blocks)
            self._aside.write([table.select(["row_id", *columns]) for table in tables], ctx)
            super().write([table.drop_columns(list(columns)) for table in tables], ctx)

    return SplitParquet()


def serve_client() -> Any:
    """Ray's own client of the Serve controller that this process is connected to; raises RayServeException if none.

    Private because `serve.run` deploys an application from this process, but nothing public deploys one from a Serve
    config file as the Serve REST API does.
    """
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=True)


def autoscaler_config(cluster: dict[str, Any]) -> dict[str, Any]:
    """The configuration that Ray's autoscaler derives from a RayCluster resource.

    Its `available_node_types` maps the name of each group to its node type. Private because only the autoscaler in a
    KubeRay pod reads such a resource. The tests check the files of `cluster/` with it.
    """
    from ray.autoscaler._private.kuberay import autoscaling_config

    config: dict[str, Any] = autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)
    return config


def has_autoscaler() -> bool:
    """Whether the cluster was started with the second version of Ray's autoscaler, as KubeRay and `ray up` do.

    Private because nothing public tells it.
    """
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return bool(is_autoscaler_v2(fetch_from_server=True))


def autoscaler_can_add(bundles: Sequence[Mapping[str, float]], timeout_seconds: float = 60.0) -> bool:
    """Whether the cluster has, or its autoscaler can add, room for all `bundles` at the same time, each on one node.

    The autoscaler is asked by a placement group, which is removed at once. It begins to add the nodes. False if it
    does not answer in time. Private because Ray tells the groups of a cluster's configuration to no driver, and what
    the autoscaler calls infeasible only to `ray status`.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    # Compiled or generated modules, of which a type checker sees no names.
    raylet: Any = import_module("ray._raylet")
    messages: Any = import_module("ray.core.generated.autoscaler_pb2")
    client = raylet.GcsClient(ray.get_runtime_context().gcs_address)
    group = placement_group([dict(bundle) for bundle in bundles])
    deadline, noticed = time.monotonic() + timeout_seconds, None
    try:
        while time.monotonic() < deadline:
            if group.wait(0.2):
                return True
            status = messages.GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=10))
            cluster, answer = status.cluster_resource_state, status.autoscaling_state
            if noticed is None and _names(cluster.pending_gang_resource_requests, group.id.hex()):
                noticed = cluster.cluster_resource_state_version
            if noticed is not None and answer.last_seen_cluster_resource_state_version >= noticed:
                return not _names(answer.infeasible_gang_resource_requests, group.id.hex())
    finally:
        remove_placement_group(group)
    return False


def _names(requests: Any, group: str) -> bool:
    return any(request.details.startswith(group) for request in requests)
