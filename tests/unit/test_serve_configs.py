"""The files under `serve_configs/`, the endpoint on KubeRay, and its dashboard, against what consumes them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from clipflow_ray.serve.app import build_app

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "serve_configs").glob("*.yaml"))


def service() -> dict[str, Any]:
    """What the RayService manifest deploys."""
    manifest = yaml.safe_load((ROOT / "cluster" / "rayservice.yaml").read_text())
    deployed: dict[str, Any] = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    return deployed


CONFIGS = {path.name: yaml.safe_load(path.read_text()) for path in FILES} | {"rayservice.yaml": service()}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_file_fits_rays_schema_and_its_arguments_build_the_application(name: str) -> None:
    schema = ServeDeploySchema.model_validate(CONFIGS[name])
    (application,) = schema.applications
    assert application.import_path == "clipflow_ray.serve.app:build_app"
    assert {"cluster.yaml", "local.yaml"} <= set(CONFIGS)
    build_app(application.args)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_an_endpoint_that_others_can_reach_asks_for_a_token(name: str) -> None:
    (application,) = CONFIGS[name]["applications"]
    assert CONFIGS[name]["http_options"]["host"] == "127.0.0.1" or application["args"]["tokens"]


def test_the_endpoint_on_kuberay_is_that_of_the_cluster_file() -> None:
    assert CONFIGS["rayservice.yaml"] == CONFIGS["cluster.yaml"]


def test_the_dashboard_shows_series_that_the_endpoint_keeps_and_all_of_them() -> None:
    dashboard = json.loads((ROOT / "cluster" / "grafana-dashboard.json").read_text())
    queries = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    shown = {name.removesuffix("_total").removesuffix("_bucket") for name in re.findall(r"ray_(clipflow_\w+)", queries)}
    kept = set(re.findall(r'"(clipflow_serve_\w+[a-z])"', (ROOT / "clipflow_ray/serve/metrics.py").read_text()))
    assert shown == kept
