"""An audit loses no row and repeats none if processes are killed on the way."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from clipflow_ray.audit.run import audit
from clipflow_ray.config import AuditConfig, ImageLimits
from clipflow_ray.inputs.format import Row
from tests.conftest import encoded, photo, scan_bomb

KILLS = 10
DRIVER_KILLS = 3
WORKERS = ("ray::MapBatches", "ray::MapWorker")


def listed(trained: str, root: Path, images: int) -> AuditConfig:
    """An audit of a list in small units of work. One image in ten is listed twice, and one in a hundred is poison.

    Half of the poison is truncated. The other half keeps a decoder busy until it is stopped.
    """
    lines = []
    for at in range(images):
        (root / f"{at}.jpg").write_bytes(encoded(photo(6000 + at, (224, 240))))
        lines += [str(root / f"{at}.jpg")] * (2 if at % 10 == 0 else 1)
    whole, bomb = encoded(photo(0)), scan_bomb()
    for at in range(max(2, images // 100)):
        (root / f"poison-{at}.jpg").write_bytes(bomb if at % 2 else whole[: len(whole) // 2])
        lines.insert(40 * at, str(root / f"poison-{at}.jpg"))
    (root / "list.txt").write_text("\n".join(lines))
    return AuditConfig(
        input=(str(root / "list.txt"),),
        output="",
        checkpoint=trained,
        alpha=0.1,
        gallery=0,
        batch_size=4,
        rows_per_task=4,
        limits=ImageLimits(max_jpeg_scans=10_000),
    )


@pytest.fixture(scope="module")
def config(trained: str, tmp_path_factory: pytest.TempPathFactory) -> AuditConfig:
    return listed(trained, tmp_path_factory.mktemp("conserved"), 120)


def ledger(output: Path) -> dict[str, Row]:
    rows = pq.read_table(output / "ledger").to_pylist()
    assert len({row["row_id"] for row in rows}) == len(rows)
    return {row["row_id"]: row for row in rows}


@pytest.fixture(scope="module")
def calm(cluster: None, config: AuditConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """The ledger of a run without faults."""
    output = tmp_path_factory.mktemp("calm") / "run"
    audit(config.model_copy(update={"output": str(output)}))
    return ledger(output)


def assert_same(rows: dict[str, Row], calm: dict[str, Row], images: int = 120) -> None:
    codes = {key: row["error_code"] for key, row in rows.items()}
    poison = max(2, images // 100)
    assert len(rows) == images + images // 10 + poison
    assert codes == {key: row["error_code"] for key, row in calm.items()}
    assert Counter(code for code in codes.values() if code) == {
        "truncated": (poison + 1) // 2,
        "decode_timeout": poison // 2,
    }
    assert {key: row["dup_of"] for key, row in rows.items()} == {key: row["dup_of"] for key, row in calm.items()}
    for key, row in rows.items():
        if row["score"] is not None:
            assert row["score"] == pytest.approx(calm[key]["score"], rel=1e-5)


def killed_workers(pid: int, stop: threading.Event, kills: int, output: Path) -> int:
    """Kill Ray workers of the process `pid` one after another while its audit writes. Returns the number killed."""
    done = 0
    while done < kills and not stop.wait(0.2):
        if not list(output.glob("scored/*.parquet")):
            continue
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(pid).children(recursive=True):
                if any(word.startswith(WORKERS) for word in process.cmdline()[:1]):
                    process.kill()
                    done += 1
                    stop.wait(1.5)
                    break
    return done


@contextmanager
def killing(pid: int, kills: int, output: Path) -> Iterator[list[int]]:
    """Kill workers during the block. Afterwards the list holds the number killed."""
    stop, counted = threading.Event(), []
    killer = threading.Thread(target=lambda: counted.append(killed_workers(pid, stop, kills, output)))
    killer.start()
    try:
        yield counted
    finally:
        stop.set()
        killer.join()


def audit_until_killed(settings: AuditConfig, file: Path, blocks: int, kills: int = 0) -> int:
    """Run an audit in its own process; kill `kills` of its workers, then the audit after `blocks` more blocks.

    Returns the number of workers killed.
    """
    output = Path(settings.output)
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    before = len(list(output.glob("scored/*.parquet")))
    command = [sys.executable, "-m", "clipflow_ray", "audit", "--config", str(file)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 180
    with killing(driver.pid, kills, output) as counted:
        while time.monotonic() < deadline and driver.poll() is None:
            if len(list(output.glob("scored/*.parquet"))) >= before + blocks:
                break
            time.sleep(0.02)
    assert driver.poll() is None, "the audit ended before it could be killed"
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not (output / "_SUCCESS").exists()
    return counted[0]


@pytest.mark.stress
def test_killed_workers_lose_and_duplicate_nothing(calm: dict[str, Row], config: AuditConfig, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with killing(os.getpid(), KILLS, output) as counted:
        record = audit(config.model_copy(update={"output": str(output)}))
    assert counted[0] >= 1, "no worker was killed"
    assert_same(ledger(output), calm)
    assert record.manifest_rows == len(calm)


@pytest.mark.stress
def test_three_killed_drivers_lose_and_duplicate_nothing(
    calm: dict[str, Row], config: AuditConfig, tmp_path: Path
) -> None:
    settings = config.model_copy(update={"output": str(tmp_path / "run")})
    for _ in range(DRIVER_KILLS):
        audit_until_killed(settings, tmp_path / "audit.yaml", 3)
    audit(settings)
    assert_same(ledger(tmp_path / "run"), calm)


@pytest.mark.stress
def test_a_run_of_poison_and_duplicates_loses_nothing_when_workers_and_drivers_are_killed(
    cluster: None, trained: str, tmp_path: Path
) -> None:
    images = 2000
    (tmp_path / "in").mkdir()
    settings = listed(trained, tmp_path / "in", images)
    audit(settings.model_copy(update={"output": str(tmp_path / "calm")}))
    output = tmp_path / "run"
    settings = settings.model_copy(update={"output": str(output)})
    killed = sum(audit_until_killed(settings, tmp_path / "audit.yaml", 100, 3) for _ in range(DRIVER_KILLS))
    with killing(os.getpid(), KILLS - killed, output) as counted:
        audit(settings)
    assert killed + counted[0] == KILLS
    assert_same(ledger(output), ledger(tmp_path / "calm"), images)
