"""Runs on a cluster that grows: Ray's autoscaler and its fake node provider, with GPUs that are numbers alone.

Each run is a process of its own, because this process may be connected to the session's cluster.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pyarrow.dataset as pads
import pytest

from clipflow_ray.data.resources import Resources
from tests.autoscaling import fake_cluster, started_here
from tests.conftest import encoded, photo

# Ray Data asks for nodes every ten seconds by default.
OFTEN = {"RAY_DATA_MIN_GAP_BETWEEN_AUTOSCALING_REQUESTS": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@contextmanager
def growing(head: Mapping[str, int], groups: Mapping[str, tuple[Resources, int]]) -> Iterator[tuple[str, Path]]:
    """The address of a fake cluster, and its folder, whose path is short because Ray makes sockets in it."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as name:
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        with fake_cluster(Path(name), port, head, groups) as address:
            yield address, Path(name)


def started(address: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, *words]
    environment = {**os.environ, **OFTEN, "RAY_ADDRESS": address}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def audit_words(trained: str, images: Path, output: Path, *flags: str) -> list[str]:
    words = ["-m", "clipflow_ray", "audit", "--input", str(images), "--output", str(output), "--checkpoint", trained]
    return [*words, "--alpha", "0.2", "--gallery", "0", *flags]


def wait_for(happened: object, seconds: float = 240.0) -> None:
    assert callable(happened)
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.5)


def finished(run: subprocess.Popen[str], seconds: float = 300.0) -> str:
    """What the run printed; it ended well."""
    try:
        printed, _ = run.communicate(timeout=seconds)
    finally:
        run.kill()
    assert run.returncode == 0, printed[-5000:]
    return printed


def rows(output: Path, folder: str = "ledger") -> int:
    """Rows of the finished files."""
    return int(pads.dataset(output / folder, format="parquet").count_rows()) if (output / folder).exists() else 0


def of_node(address: str, resource: str) -> list[psutil.Process]:
    """The raylets whose nodes have a resource."""
    return [each for each in started_here([address]) if any(f"{resource}," in word for word in each.cmdline())]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,600 images of 24 contents."""
    folder = tmp_path_factory.mktemp("many")
    contents = [encoded(photo(seed, (256, 256))) for seed in range(24)]
    for number in range(1600):
        (folder / f"{number:04d}.jpg").write_bytes(contents[number % len(contents)])
    return folder


def test_an_autoscaler_says_what_it_can_add() -> None:
    code = (
        "from clipflow_ray import compat\n"
        "from clipflow_ray.data import resources\n"
        "resources.connect()\n"
        "print('autoscaler', compat.has_autoscaler())\n"
        "for bundles in ([{'GPU': 2.0}], [{'CPU': 3.0}], [{'GPU': 1.0}] * 3, [{'GPU': 1.0}, {'CPU': 1.0}]):\n"
        "    print(compat.autoscaler_can_add(bundles))"
    )
    with growing({"CPU": 0}, {"gpu": ({"CPU": 2, "GPU": 1}, 2)}) as (address, _):
        lines = finished(started(address, "-c", code)).splitlines()
    assert lines[-5:] == ["autoscaler True", "False", "False", "False", "True"]


@pytest.mark.stress
def test_an_audit_begins_without_a_gpu_and_encodes_on_those_that_are_added(
    trained: str, many: Path, tmp_path: Path
) -> None:
    groups = {"cpu": ({"CPU": 2}, 1), "gpu": ({"CPU": 1, "GPU": 1}, 2)}
    with growing({"CPU": 0}, groups) as (address, _):
        run = started(address, *audit_words(trained, many, tmp_path / "audit", "--encoders", "1-2"))
        wait_for(lambda: len(of_node(address, "GPU")) == 2 or run.poll() is not None)
        printed = finished(run)
    assert "1 to 2 encoders on 1 GPU each" in printed
    assert rows(tmp_path / "audit") == 1600


@pytest.mark.stress
def test_a_lost_gpu_node_is_replaced_and_no_row_is_lost(trained: str, many: Path, tmp_path: Path) -> None:
    groups = {"cpu": ({"CPU": 2}, 1), "gpu": ({"CPU": 1, "GPU": 1}, 1)}
    with growing({"CPU": 0}, groups) as (address, _):
        run = started(address, *audit_words(trained, many, tmp_path / "audit"))
        wait_for(lambda: rows(tmp_path / "audit", "scored") > 0 or run.poll() is not None)
        (lost,) = of_node(address, "GPU")
        lost.kill()
        wait_for(lambda: any(each.pid != lost.pid for each in of_node(address, "GPU")) or run.poll() is not None)
        finished(run)
    assert rows(tmp_path / "audit") == 1600


@pytest.mark.stress
def test_a_run_that_was_cut_off_on_gpus_continues_on_a_head_without_cpus_and_small_nodes(
    trained: str, many: Path, tmp_path: Path
) -> None:
    words = audit_words(trained, many, tmp_path / "audit")
    with growing({"CPU": 2, "GPU": 2}, {"none": ({"CPU": 1}, 0)}) as (address, _):
        run = started(address, *words)
        wait_for(lambda: rows(tmp_path / "audit", "scored") > 0 or run.poll() is not None)
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=60)
        assert 0 < rows(tmp_path / "audit", "scored") < 1600
    with growing({"CPU": 0}, {"small": ({"CPU": 1}, 3)}) as (address, _):
        printed = finished(started(address, *words))
    assert "encoders on 1 CPU each" in printed
    assert rows(tmp_path / "audit") == 1600


@pytest.mark.stress
def test_a_gpu_node_without_cpus_encodes_what_a_node_without_a_gpu_decodes(
    trained: str, many: Path, tmp_path: Path
) -> None:
    groups = {"cpu": ({"CPU": 2}, 1), "gpu": ({"CPU": 0, "GPU": 1}, 1)}
    with growing({"CPU": 0}, groups) as (address, _):
        flags = ("--encoders", "2", "--gpus-per-encoder", "0.5", "--sample", "0.2")
        finished(started(address, *audit_words(trained, many, tmp_path / "audit", *flags)))
    assert rows(tmp_path / "audit") == 1600
