"""`ray job submit` on a cluster of three nodes with token authentication, and the loss of one of them."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from clipflow_ray.config import TEST_TOWER
from clipflow_ray.demo import s3_server
from clipflow_ray.place import Place
from tests.conftest import encoded, photo, s3_client

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


pytestmark = pytest.mark.stress  # three nodes take minutes to start, train and audit


@pytest.fixture(scope="module")
def s3() -> Iterator[Place]:
    with s3_server() as bucket:
        yield bucket


@pytest.fixture(scope="module")
def nodes(s3: Place) -> Iterator[tuple[dict[str, str], list[int]]]:
    """A cluster of `cluster/local.sh`: the environment that connects to it, and the process ids of head and workers."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"RAY": RAY, "PORT": str(free_port()), "DASHBOARD_PORT": str(free_port()), "CPUS": "3"}
    environment |= {"CLIENT_PORT": str(free_port())}
    command = ["bash", str(ROOT / "cluster" / "local.sh")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as script:
        try:
            assert script.stdout is not None
            exports, pids = script.stdout.readline(), script.stdout.readline()
            assert exports.startswith("export "), "the cluster did not start"
            environment |= dict(word.split("=", 1) for word in exports.split()[1:])
            deadline = time.monotonic() + 120
            while submitted(environment, "list").returncode and time.monotonic() < deadline:
                assert script.poll() is None, "the cluster ended"
                time.sleep(0.5)
            yield environment, [int(pid) for pid in pids.split()[1:]]
        finally:
            kill_all(script.pid)  # a graceful end would take half a minute


def kill_all(pid: int) -> None:
    """Kill a process and its descendants. A process that has already ended is skipped."""
    root = psutil.Process(pid)
    for process in (*root.children(recursive=True), root):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def submitted(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [RAY, "job", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.fixture(scope="module")
def store(s3: Place) -> list[str]:
    """Five sources of photo-like images in a bucket, and the flags that name its endpoint."""
    client = s3_client(s3)
    client.create_bucket(Bucket="jobs")
    for source in ("a", "b", "c", "d", "e"):
        for at in range(12):
            client.put_object(Bucket="jobs", Key=f"in/{source}/{at}.jpg", Body=encoded(photo(ord(source) * 100 + at)))
    return ["--endpoint-url", str(s3.options.endpoint_url), "--region", "us-east-1"]


@pytest.fixture(scope="module")
def checkpoint(
    nodes: tuple[dict[str, str], list[int]], store: list[str], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """The checkpoint of a training that ran as a submitted job."""
    config = tmp_path_factory.mktemp("job") / "train.yaml"
    config.write_text(
        f"encoder: {{model: {TEST_TOWER}, pretrained: 'seed:0'}}\nflow: {{blocks: 2, hidden: 16}}\n"
        "fit: {epochs: 2, batch_size: 16}\nsegments: [{feature: projected}]\n"
    )
    train = ["jobs/train.py", "--config", str(config), "--input", "s3://jobs/in/", "--output", "s3://jobs/train"]
    flags = [*store, "--allow-small"]  # with five sources, one image in five calibrates
    done = submitted(nodes[0], "submit", "--working-dir", ".", "--", "python", *train, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return "s3://jobs/train/checkpoint"


def audit_job(
    environment: dict[str, str], checkpoint: str, store: list[str], source: str, output: str, *more: str
) -> subprocess.CompletedProcess[str]:
    flags = ["--input", source, "--output", output, "--alpha", "0.1", "--checkpoint", checkpoint, "--gallery", "0"]
    command = ["submit", "--working-dir", ".", "--", "python", "jobs/audit.py", *flags, *store, *more]
    return submitted(environment, *command)


def ledger(output: str, s3: Place) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(
        **s3.with_uri(f"{output}/ledger").arguments("source", "filesystem")
    ).to_pylist()
    assert len({row["row_id"] for row in rows}) == len(rows)
    return rows


def test_training_and_auditing_run_as_submitted_jobs_and_fail_with_their_exit_code(
    nodes: tuple[dict[str, str], list[int]], checkpoint: str, store: list[str], s3: Place
) -> None:
    environment, _ = nodes
    done = audit_job(environment, checkpoint, store, "s3://jobs/in/", "s3://jobs/audit")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 objects: 60 ok" in done.stdout and "60 of 60 objects" in done.stdout
    assert "SECRET" not in (done.stdout + done.stderr).upper()
    assert len(ledger("s3://jobs/audit", s3)) == 60
    done = audit_job(environment, checkpoint, store, "s3://jobs/none/", "s3://jobs/x")
    assert done.returncode == 1 and "error [invalid_input]" in done.stdout


def test_a_client_without_the_token_is_refused(nodes: tuple[dict[str, str], list[int]]) -> None:
    environment = {key: value for key, value in nodes[0].items() if "AUTH" not in key} | {"HOME": "/nonexistent"}
    assert submitted(environment, "list").returncode != 0


def test_an_audit_of_poison_and_repeated_keys_is_complete_although_a_node_dies(
    nodes: tuple[dict[str, str], list[int]], checkpoint: str, store: list[str], s3: Place
) -> None:
    environment, pids = nodes
    client = s3_client(s3)
    client.create_bucket(Bucket="loss")
    keys = [f"in/{at}.jpg" for at in range(160)]
    for at, key in enumerate(keys):
        data = encoded(photo(7000 + at, (224, 230)))
        client.put_object(Bucket="loss", Key=key, Body=data[: len(data) // 2] if at in (40, 120) else data)
    lines = "\n".join(f"s3://loss/{key}" for key in [*keys, *keys[::10]])
    client.put_object(Bucket="loss", Key="list.txt", Body=lines.encode())
    outcome: list[subprocess.CompletedProcess[str]] = []

    def run() -> None:
        outcome.append(audit_job(environment, checkpoint, store, "s3://loss/list.txt", "s3://loss/out"))

    job = threading.Thread(target=run)
    job.start()
    while job.is_alive() and client.list_objects_v2(Bucket="loss", Prefix="out/scored/").get("KeyCount", 0) < 2:
        time.sleep(0.1)
    assert job.is_alive(), f"the audit ended before its node died: {outcome}"
    kill_all(pids[-1])
    job.join(300)
    assert outcome and outcome[0].returncode == 0, outcome
    rows = ledger("s3://loss/out", s3)
    counts = Counter((row["uri"], row["error_code"]) for row in rows)
    poison = {f"s3://loss/{key}": "truncated" for key in (keys[40], keys[120])}
    expected = {f"s3://loss/{key}": 2 if at % 10 == 0 else 1 for at, key in enumerate(keys)}
    assert counts == {(uri, poison.get(uri)): count for uri, count in expected.items()}
    assert all((row["score"] is None) == (row["uri"] in poison) for row in rows)
