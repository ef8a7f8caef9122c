"""The files of `serve_configs/`, checked against Ray's schema, our settings and each other."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from clipflow_ray.config import ServeConfig
from clipflow_ray.serve import edge

FOLDER = Path(__file__).parents[2] / "serve_configs"
NAMES = ("local.yaml", "cluster.yaml")
EDGE_READ_SECONDS = 35


def config(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return loaded


@pytest.mark.parametrize("name", NAMES)
def test_each_file_fits_rays_schema_and_builds_the_application_from_valid_settings(name: str) -> None:
    schema = ServeDeploySchema.model_validate(config(name))
    (application,) = schema.applications
    module, _, builder = application.import_path.partition(":")
    built = getattr(import_module(module), builder)(application.args)
    assert type(built).__name__ == "Application"
    assert application.route_prefix == "/"
    assert {deployment.name for deployment in application.deployments} <= {"Detector", "Ingress"}


@pytest.mark.parametrize("name", NAMES)
def test_each_file_names_its_address_and_public_ones_ask_for_a_token(name: str) -> None:
    options, args = config(name)["http_options"], config(name)["applications"][0]["args"]
    assert options["host"] == "127.0.0.1" or ServeConfig(**args).tokens


@pytest.mark.parametrize("name", NAMES)
def test_the_service_times_out_before_the_edge_and_the_edge_before_serve(name: str) -> None:
    args = config(name)["applications"][0]["args"]
    assert f"proxy_read_timeout {EDGE_READ_SECONDS}s;" in edge.CONFIG.read_text()
    serves = config(name)["http_options"]["request_timeout_s"]
    assert ServeConfig(**args).timeout_seconds < EDGE_READ_SECONDS < serves


def test_the_local_file_listens_at_the_edge_s_upstream() -> None:
    options = config("local.yaml")["http_options"]
    assert f"server {options['host']}:{options['port']};" in edge.CONFIG.read_text()


def test_the_edges_file_is_the_packaged_one() -> None:
    assert (FOLDER / "edge" / "nginx.conf").resolve() == edge.CONFIG.resolve()


def test_rendering_changes_the_addresses_and_nothing_else() -> None:
    before = edge.CONFIG.read_text().splitlines()
    after = edge.rendered("127.0.0.1:8001", ["127.0.0.1:9"], "127.0.0.1:7").splitlines()
    changed = [new.strip() for old, new in zip(before, after, strict=True) if old != new and not old.startswith("#")]
    assert changed == ["server 127.0.0.1:7;", "server 127.0.0.1:9;", "listen 127.0.0.1:8001;", "listen 127.0.0.1:7;"]


def test_the_proxy_is_the_backup_of_the_replicas() -> None:
    lines = edge.rendered("127.0.0.1:8000", ["127.0.0.1:7", "127.0.0.1:8", "127.0.0.1:9"], "127.0.0.1:6").splitlines()
    servers = [line.strip() for line in lines if line.strip().startswith("server 127")]
    assert servers == [
        "server 127.0.0.1:6;",
        "server 127.0.0.1:7;",
        "server 127.0.0.1:8;",
        "server 127.0.0.1:9 backup;",
    ]
