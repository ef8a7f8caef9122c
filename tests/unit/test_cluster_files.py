"""The files under `cluster/`, against the schemas of the programs that read them.

No package on PyPI contains KubeRay's CRDs. So each part is checked by the program that reads it: pods by Kubernetes'
OpenAPI, groups by Ray's autoscaler, the Serve config by Ray Serve, entrypoints by the command line.
"""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import ray.autoscaler
import typer
import yaml
from jsonschema import Draft7Validator

from clipflow_ray import __version__, compat
from clipflow_ray.cli import app
from clipflow_ray.config import PoolConfig, ServeConfig
from clipflow_ray.data.resources import Cluster, ScoringPlan, plan_scoring, plan_training
from clipflow_ray.errors import ResourceError
from clipflow_ray.serve import edge, metrics, whole
from tests.autoscaling import adds

CLUSTER = Path(__file__).parents[2] / "cluster"
KUBERNETES = "1.30"


def resource(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text())
    return loaded


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    inner = {"RayService": "rayClusterConfig", "RayJob": "rayClusterSpec"}.get(document["kind"])
    cluster: dict[str, Any] = spec[inner] if inner else spec
    return cluster


KUBERAY = sorted(path.name for path in CLUSTER.glob("ray*.yaml"))


@pytest.mark.parametrize("name", KUBERAY)
def test_every_pod_template_is_a_valid_pod(name: str) -> None:
    spec = cluster_spec(resource(name))
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        assert set(group["template"]) == {"spec"}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    names = {group["groupName"] for group in spec["workerGroupSpecs"]}
    assert names == {"cpu", "gpu"} and spec["enableInTreeAutoscaling"] is True
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("name", KUBERAY)
def test_gpu_pods_alone_ask_for_a_gpu_and_no_pod_runs_as_root(name: str) -> None:
    spec = cluster_spec(resource(name))
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (group.get("groupName") == "gpu")
        assert ("tolerations" in pod) == (group.get("groupName") == "gpu")
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]


def test_every_pod_of_the_endpoint_answers_in_one_write() -> None:
    spec = cluster_spec(resource("rayservice.yaml"))
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "value": whole.CALLBACK} in container["env"]


def test_the_committed_files_are_what_the_base_renders() -> None:
    rendered = runpy.run_path(str(CLUSTER / "render.py"))["documents"]()
    assert sorted(rendered) == KUBERAY
    for name, text in rendered.items():
        assert (CLUSTER / name).read_text() == text, "run `make cluster`"


@pytest.mark.parametrize("name", KUBERAY)
def test_the_tag_of_every_image_is_the_version_of_the_package_and_ray_is_the_installed_one(name: str) -> None:
    spec = cluster_spec(resource(name))
    tags = re.findall(r"image: \S+clipflow-ray:(\S+)", (CLUSTER / name).read_text())
    assert len(tags) == 3 and {tag.removesuffix("-cuda") for tag in tags} == {__version__}
    assert spec["rayVersion"] == ray.__version__


def test_the_vm_launcher_file_fits_rays_own_schema() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    assert not list(Draft7Validator(schema).iter_errors(resource("vm.yaml")))


def test_the_ray_service_runs_the_cluster_config_behind_the_edge() -> None:
    ours = yaml.safe_load((CLUSTER.parent / "serve_configs" / "cluster.yaml").read_text())
    assert yaml.safe_load(resource("rayservice.yaml")["spec"]["serveConfigV2"]) == ours
    assert ours["http_options"]["port"] == 8000


def test_the_manifests_of_the_edge_are_valid_and_replace_lines_that_its_configuration_has() -> None:
    documents = list(yaml.safe_load_all((CLUSTER / "edge.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["Deployment", "Service", "NetworkPolicy"]
    for document in documents:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    (container,) = documents[0]["spec"]["template"]["spec"]["containers"]
    replaced = re.findall(r"s/(.+?)/(.+?)/", container["command"][2])
    assert [old for old, _ in replaced] == ["listen 127.0.0.1:8000;", "server 127.0.0.1:8001;"]
    assert all(edge.CONFIG.read_text().count(old) == 1 for old, _ in replaced)


def test_the_dashboard_shows_every_series_of_the_service_and_no_other() -> None:
    dashboard = json.loads((CLUSTER / "grafana-dashboard.json").read_text())
    shown = {
        re.sub(r"_(total|bucket|sum|count)$", "", name)
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"ray_(clipflow_serve_\w+)", target["expr"])
    }
    assert shown == set(re.findall(r'"(clipflow_serve_\w+[a-z])"', Path(metrics.__file__).read_text()))
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


@pytest.mark.parametrize("name", KUBERAY)
def test_rays_autoscaler_reads_each_cluster_as_it_would_from_kuberay(name: str) -> None:
    document = resource(name)
    metadata = {"name": document["metadata"]["name"], "namespace": "default"}
    config = compat.autoscaler_config({"metadata": metadata, "spec": cluster_spec(document)})
    nodes = config["available_node_types"]
    assert set(nodes) == {"headgroup", "cpu", "gpu"}
    assert nodes["headgroup"]["resources"]["CPU"] == 0
    for group in cluster_spec(document)["workerGroupSpecs"]:
        node = nodes[group["groupName"]]
        assert (node["min_workers"], node["max_workers"]) == (group["minReplicas"], group["maxReplicas"])
        assert node["resources"].get("GPU", 0) == (group["groupName"] == "gpu")


def cluster_of(name: str) -> Cluster:
    """The cluster of a file: its nodes at the start, and what the autoscaler may add."""
    document = resource(name)
    if name == "vm.yaml":
        groups = document["available_node_types"]
        standing = {group: node.get("min_workers", 0) for group, node in groups.items()} | {"head": 1}
    else:
        metadata = {"name": "c", "namespace": "default"}
        cluster = compat.autoscaler_config({"metadata": metadata, "spec": cluster_spec(document)})
        groups = cluster["available_node_types"]
        workers = cluster_spec(document)["workerGroupSpecs"]
        standing = {group["groupName"]: group["replicas"] for group in workers} | {"headgroup": 1}
    live = [group["resources"] for name, group in groups.items() for _ in range(standing[name])]
    grown = [(group["resources"], max(standing[name], group.get("max_workers", 0))) for name, group in groups.items()]
    return Cluster(live, adds(grown))


def planned(name: str, resumed: bool = False, **pool: Any) -> ScoringPlan:
    """The plan of a run on that cluster."""
    return plan_scoring(100_000, 32, PoolConfig(**pool), resumed, cluster_of(name))


@pytest.mark.parametrize("name", [*KUBERAY, "vm.yaml"])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_on_each_cluster_encodes_on_gpus_though_none_may_live_at_the_start(name: str, resumed: bool) -> None:
    standing = {"rayjob-audit.yaml": 1, "rayjob-train.yaml": 2}
    plan = planned(name, resumed=resumed)
    assert (plan.encoder_gpus, plan.fewest, plan.initial) == (1, 1, standing.get(name, 1))
    assert plan.most > 8 and plan.decoders is None


@pytest.mark.parametrize("name", [*KUBERAY, "vm.yaml"])
def test_each_cluster_can_become_eight_encoders_and_no_more(name: str) -> None:
    assert planned(name, encoders=8).fewest == 8
    assert planned(name, encoders=16, gpus_per_encoder=0.5).fewest == 16
    with pytest.raises(ResourceError, match="autoscaler cannot add"):
        planned(name, encoders=9)


@pytest.mark.parametrize("name", [*KUBERAY, "vm.yaml"])
def test_each_cluster_can_become_eight_training_workers_with_a_gpu_each(name: str) -> None:
    assert plan_training(8, cluster_of(name)) == {"CPU": 1, "GPU": 1}


@pytest.mark.parametrize("name", KUBERAY)
def test_a_cluster_of_kubernetes_encodes_on_cpus_if_asked_to(name: str) -> None:
    plan = planned(name, gpus_per_encoder=0)
    assert plan.encoder_gpus == 0 and plan.encoder_cpus in (3, 4)


def test_all_replicas_of_the_endpoint_fit_on_the_nodes_of_their_cluster() -> None:
    document = resource("rayservice.yaml")
    groups = compat.autoscaler_config(
        {"metadata": {"name": "c", "namespace": "default"}, "spec": cluster_spec(document)}
    )["available_node_types"]
    (application,) = yaml.safe_load(document["spec"]["serveConfigV2"])["applications"]
    settings = ServeConfig(**application["args"])
    ingress = {"CPU": settings.ingress_cpus}
    detector = {"CPU": settings.detector_cpus, "GPU": settings.detector_gpus}
    can_add = adds([(group["resources"], group["max_workers"]) for group in groups.values()])
    assert can_add([ingress] * settings.ingress_replicas[1] + [detector] * settings.detector_replicas[1])


@pytest.mark.parametrize("name", [name for name in KUBERAY if resource(name)["kind"] == "RayJob"])
def test_the_entrypoint_of_a_job_is_a_command_line_that_its_script_accepts(name: str) -> None:
    python, script, *words = resource(name)["spec"]["entrypoint"].split()
    assert python == "python" and (CLUSTER.parent / script).is_file()
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    command = group.commands[Path(script).stem]
    given = command.make_context(script, words).params
    assert given["inputs"][0].startswith("s3://") and given["output"].startswith("s3://")
