"""The files under `cluster/`, against the schemas of what consumes them."""

import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import ray.autoscaler
import yaml
from jsonschema import Draft7Validator

CLUSTER = Path(__file__).parents[2] / "cluster"
KUBERNETES = "1.30"


def resource(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


def cluster_spec(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    return {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec"), "RayService": spec.get("rayClusterConfig")}[
        document["kind"]
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
