"""Rows in are rows out, whatever dies on the way."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from clipflow_ray.audit.run import audit
from clipflow_ray.config import AuditConfig
from tests.conftest import encoded, photo

IMAGES = 120
POISON = 2
KILLS = 10


@pytest.fixture(scope="module")
def config(trained: str, tmp_path_factory: pytest.TempPathFactory) -> AuditConfig:
    """A list with images, one in ten of them twice, and objects that do not decode; small units of work."""
    root = tmp_path_factory.mktemp("conserved")
    lines = []
    for at in range(IMAGES):
        (root / f"{at}.jpg").write_bytes(encoded(photo(6000 + at, (224, 240))))
        lines += [str(root / f"{at}.jpg")] * (2 if at % 10 == 0 else 1)
    for at in range(POISON):
        data = encoded(photo(at))
        (root / f"poison-{at}.jpg").write_bytes(data[: len(data) // 2])
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
    )


def ledger(output: Path) -> dict[str, dict]:
    rows = pq.read_table(output / "ledger").to_pylist()
    assert len({row["row_id"] for row in rows}) == len(rows)
    return {row["row_id"]: row for row in rows}


@pytest.fixture(scope="module")
def calm(cluster: None, config: AuditConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The ledger of a run without faults."""
    output = tmp_path_factory.mktemp("calm") / "run"
    audit(config.model_copy(update={"output": str(output)}))
    return ledger(output)


def assert_same(rows: dict[str, dict], calm: dict[str, dict]) -> None:
    assert len(rows) == IMAGES + IMAGES // 10 + POISON
    assert {key: row["error_code"] for key, row in rows.items()} == {
        key: row["error_code"] for key, row in calm.items()
    }
    assert Counter(row["error_code"] for row in rows.values())["truncated"] == POISON
    assert {key: row["dup_of"] for key, row in rows.items()} == {key: row["dup_of"] for key, row in calm.items()}
    for key, row in rows.items():
        if row["score"] is not None:
            assert row["score"] == pytest.approx(calm[key]["score"], rel=1e-5)


def killed_workers(stop: threading.Event, kills: int, output: Path) -> int:
    """Kill busy Ray workers of this process's cluster, one after another, while the audit writes."""
    done = 0
    while done < kills and not stop.wait(0.2):
        if not list(output.glob("scored/*.parquet")):
            continue
        for process in psutil.Process().children(recursive=True):
            try:
                busy = process.name().startswith(("ray::MapBatches", "ray::MapWorker")) or any(
                    word.startswith(("ray::MapBatches", "ray::MapWorker")) for word in process.cmdline()[:1]
                )
                if busy:
                    process.kill()
                    done += 1
                    stop.wait(1.5)
                    break
            except psutil.NoSuchProcess:
                continue
    return done


@pytest.mark.stress
def test_killed_workers_lose_and_duplicate_nothing(calm: dict[str, dict], config: AuditConfig, tmp_path: Path) -> None:
    output, stop, counted = tmp_path / "run", threading.Event(), []
    killer = threading.Thread(target=lambda: counted.append(killed_workers(stop, KILLS, output)))
    killer.start()
    record = audit(config.model_copy(update={"output": str(output)}))
    stop.set()
    killer.join()
    assert counted[0] >= 1, "no worker was killed"
    assert_same(ledger(output), calm)
    assert record["manifest_rows"] == len(calm)


@pytest.mark.stress
def test_three_killed_drivers_lose_and_duplicate_nothing(
    calm: dict[str, dict], config: AuditConfig, tmp_path: Path
) -> None:
    output, file = tmp_path / "run", tmp_path / "audit.yaml"
    settings = config.model_copy(update={"output": str(output)})
    file.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    for _ in range(3):
        before = len(list(output.glob("scored/*.parquet")))
        command = [sys.executable, "-m", "clipflow_ray.cli", "audit", "--config", str(file)]
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and driver.poll() is None:
            if len(list(output.glob("scored/*.parquet"))) >= before + 3:
                break
            time.sleep(0.02)
        assert driver.poll() is None, "the audit ended before it could be killed"
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        assert not (output / "_SUCCESS").exists()
    audit(settings)
    assert_same(ledger(output), calm)
