"""The private names that `compat` uses exist and take its arguments: a failure says what an upgrade broke."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import ray
import ray.serve.context
import torch
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import Target, TargetGroup

from clipflow_ray import compat


def test_a_detector_starts_without_torchs_compiler_which_can_be_imported_afterwards() -> None:
    code = (
        "import sys, clipflow_ray.model.detector\n"
        "print(any(name.startswith('torch._dynamo') for name in sys.modules), 'torchvision.ops' in sys.modules)\n"
        "import torch, torch._dynamo.utils\n"
        "print(torch._dynamo.utils.is_compile_supported('cpu'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "True"]


def test_a_handle_takes_the_option_that_chooses_how_calls_are_sent() -> None:
    given: dict[str, Any] = {}

    class Handle:
        def options(self, **options: Any) -> str:
            given.update(options)
            return "changed"

    assert compat.handle_of_cluster(Handle()) == "changed"
    assert [type(value) for value in given.values()] == [bool]
    assert set(given) <= set(inspect.signature(DeploymentHandle.options).parameters)


def test_the_controller_tells_the_addresses_of_an_application(monkeypatch: pytest.MonkeyPatch) -> None:
    client = vars(ray.serve.context)["ServeControllerClient"]
    package = client.__module__.rpartition(".")[0]
    controller = importlib.import_module(f"{package}.controller").ServeController
    asked: list[str] = []

    class Remote:
        def remote(self, *arguments: str) -> str:
            inspect.signature(controller.get_target_groups).bind(controller, *arguments)
            asked.extend(arguments)
            return "reference"

    made = client.__new__(client)
    monkeypatch.setattr(made, "_controller", type("Controller", (), {"get_target_groups": Remote()}), raising=False)
    monkeypatch.setattr(compat, "serve_client", lambda: made)
    targets = [Target(ip="10.0.0.1", port=30000, instance_id="i", name="n")]
    groups = [TargetGroup(targets=targets, route_prefix="/", protocol=protocol) for protocol in ("HTTP", "gRPC")]
    monkeypatch.setattr(ray, "get", lambda reference, timeout: groups if reference == "reference" else None)
    assert compat.ingress_addresses("clipflow", 1.0) == [("10.0.0.1", 30000)]
    assert asked == ["clipflow"]
    assert "self._controller" in inspect.getsource(client.__init__)


def test_the_client_of_serve_can_deploy_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    context, found = ray.serve.context, object()
    (name,) = [name for name in vars(context) if name.endswith("get_global_client")]
    assert "raise_if_no_controller_running" in inspect.signature(vars(context)[name]).parameters
    monkeypatch.setattr(context, name, lambda raise_if_no_controller_running: found)
    assert compat.serve_client() is found
    assert "config" in inspect.signature(vars(context)["ServeControllerClient"].deploy_apps).parameters


@pytest.mark.parametrize("model", ["ViT-B-32", "RN50", "PE-Core-T-16-384"])
def test_an_image_tower_is_built_from_an_open_clip_configuration_and_fetches_no_weights(model: str) -> None:
    config = open_clip.get_model_config(model)
    vision = config["vision_cfg"] | {"timm_model_pretrained": True}
    with torch.device("meta"):
        tower = compat.image_tower(config["embed_dim"], vision, quick_gelu=True)
        assert tower(torch.empty(1, 3, vision["image_size"], vision["image_size"])).shape == (1, config["embed_dim"])


def test_the_autoscaler_reads_a_cluster() -> None:
    def group(**more: Any) -> dict[str, Any]:
        limits = {"resources": {"limits": {"cpu": "2", "memory": "4Gi"}}}
        return {"rayStartParams": {}, "template": {"spec": {"containers": [{"name": "ray", **limits}]}}, **more}

    workers = group(groupName="cpu", replicas=1, minReplicas=0, maxReplicas=3)
    spec = {"headGroupSpec": group(), "workerGroupSpecs": [workers]}
    config = compat.autoscaler_config({"metadata": {"name": "c", "namespace": "default"}, "spec": spec})
    node = config["available_node_types"]["cpu"]
    assert (node["min_workers"], node["max_workers"], node["resources"]["CPU"]) == (0, 3, 2)


def test_a_block_is_written_as_two_files_of_one_name_by_a_sink_that_a_checkpointed_write_takes(tmp_path: Path) -> None:
    folders = {name: {"path": str(tmp_path / name), "filesystem": pafs.LocalFileSystem()} for name in ("main", "aside")}
    sink = compat.split_parquet_sink(folders["main"], folders["aside"], ("embedding",), rows_per_file=2)
    own = importlib.import_module(type(sink).__mro__[1].__module__)
    planned = importlib.import_module("ray.data._internal.planner.checkpoint.plan_write_op")
    assert isinstance(sink, vars(planned)["_FileDatasink"])  # only for these is a mark written before the file
    blocks = [pa.table({"row_id": [name], "score": [1.0], "embedding": [[0.5]]}) for name in "ab"]
    sink.on_write_start()
    sink.write(blocks, own.TaskContext(task_idx=3, op_name="Write", kwargs={own.WRITE_UUID_KWARG_NAME: "write"}))
    (main,), (aside,) = (list((tmp_path / name).iterdir()) for name in folders)
    assert main.name == aside.name and main.name.startswith("write_000003")
    assert pq.read_table(main).column_names == ["row_id", "score"]
    assert sorted(pq.read_table(aside, columns=["row_id"])["row_id"].to_pylist()) == ["a", "b"]
    assert pq.read_table(aside).column_names == ["row_id", "embedding"]


@pytest.mark.parametrize(("infeasible", "seen", "expected"), [(True, 7, False), (False, 7, True), (False, 6, False)])
def test_the_autoscaler_answers_whether_it_can_add_nodes(
    monkeypatch: pytest.MonkeyPatch, infeasible: bool, seen: int, expected: bool
) -> None:
    raylet, messages = (importlib.import_module(name) for name in ("ray._raylet", "ray.core.generated.autoscaler_pb2"))
    assert hasattr(raylet.InnerGcsClient, "get_cluster_status")
    reply = messages.GetClusterStatusReply()
    reply.cluster_resource_state.cluster_resource_state_version = 7
    reply.cluster_resource_state.pending_gang_resource_requests.add(details="abc:PACK|PENDING")
    reply.autoscaling_state.last_seen_cluster_resource_state_version = seen
    if infeasible:
        reply.autoscaling_state.infeasible_gang_resource_requests.add(details="abc:PACK|PENDING")
    removed: list[Any] = []

    class Group:
        id = type("Id", (), {"hex": lambda self: "abc"})()

        def wait(self, timeout_seconds: float) -> bool:
            return False

    class Client:
        def __init__(self, address: str) -> None: ...
        def get_cluster_status(self, timeout_s: int) -> bytes:
            return bytes(reply.SerializeToString())

    monkeypatch.setattr(raylet, "GcsClient", Client)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: type("Context", (), {"gcs_address": "a:1"}))
    groups = importlib.import_module("ray.util.placement_group")
    monkeypatch.setattr(groups, "placement_group", lambda bundles: Group())
    monkeypatch.setattr(groups, "remove_placement_group", removed.append)
    assert compat.autoscaler_can_add([{"GPU": 1.0}], timeout_seconds=0.1) is expected
    assert len(removed) == 1


def test_a_cluster_tells_whether_it_has_the_autoscaler_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = importlib.import_module("ray.autoscaler.v2.utils")
    assert "fetch_from_server" in inspect.signature(utils.is_autoscaler_v2).parameters
    monkeypatch.setattr(utils, "internal_kv_get_gcs_client", lambda: Store())

    class Store:
        def internal_kv_get(self, key: bytes, namespace: bytes) -> bytes:
            return b"1"

    assert compat.has_autoscaler() is True
