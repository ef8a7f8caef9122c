"""The files under `cluster/`, against the schemas of what consumes them."""

import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import ray.autoscaler
import yaml
from jsonschema import Draft7Validator

from clipflow_ray.serve import edge, metrics

CLUSTER = Path(__file__).parents[2] / "cluster"
KUBERNETES = "1.30"


def resource(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    return {"RayCluster": spec, "RayService": spec.get("rayClusterConfig")}.get(document["kind"]) or spec[
        "rayClusterSpec"
    ]


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


def test_the_vm_launcher_file_fits_rays_own_schema() -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    assert not list(Draft7Validator(schema).iter_errors(resource("vm.yaml")))


def test_the_ray_service_runs_the_cluster_config_behind_the_edge() -> None:
    ours = yaml.safe_load((CLUSTER.parent / "serve_configs" / "cluster.yaml").read_text())
    assert yaml.safe_load(resource("rayservice.yaml")["spec"]["serveConfigV2"]) == ours
    assert ours["http_options"]["port"] == 8000


def test_the_edges_manifests_are_valid_and_replace_what_the_configuration_holds() -> None:
    documents = list(yaml.safe_load_all((CLUSTER / "edge.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["Deployment", "Service", "NetworkPolicy"]
    for document in documents:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    (container,) = documents[0]["spec"]["template"]["spec"]["containers"]
    replaced = re.findall(r"s/(.+?)/(.+?)/", container["command"][2])
    assert [old for old, _ in replaced] == ["listen 127.0.0.1:8000;", "server 127.0.0.1:8001;"]
    assert all(edge.CONFIG.read_text().count(old) == 1 for old, _ in replaced)


def test_every_series_of_the_dashboard_is_one_that_the_service_keeps_and_none_is_missing() -> None:
    dashboard = json.loads((CLUSTER / "grafana-dashboard.json").read_text())
    shown = {
        re.sub(r"_(total|bucket|sum|count)$", "", name)
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"ray_(clipflow_serve_\w+)", target["expr"])
    }
    assert shown == set(re.findall(r'"(clipflow_serve_\w+[a-z])"', Path(metrics.__file__).read_text()))
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
