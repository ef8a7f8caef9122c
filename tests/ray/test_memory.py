"""An audit of ten times the rows takes no more memory in its driver, its workers and its decoders."""

import io
import json
import subprocess
import sys
import tarfile
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.dataset as pads
import pytest

from tests.conftest import encoded, photo

ROWS = (20_000, 200_000)
PER_SHARD = 20_000
GROWTH = 1.1


def write_shards(folder: Path, rows: int) -> None:
    """Write tar shards of small JPEGs. Bytes behind the end marker make each JPEG unique."""
    folder.mkdir()
    images = [encoded(photo(at, (64, 72)), quality=80) for at in range(50)]
    for start in range(0, rows, PER_SHARD):
        with tarfile.open(folder / f"{start:08d}.tar", "w") as shard:
            for at in range(start, min(rows, start + PER_SHARD)):
                data = images[at % len(images)] + at.to_bytes(8, "big")
                member = tarfile.TarInfo(f"{at:08d}.jpg")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))


def private_bytes(driver: psutil.Process) -> dict[str, int]:
    """Private memory of the largest process of each kind, in bytes. Shared memory is not counted."""
    largest: dict[str, int] = defaultdict(int)
    for process in (driver, *driver.children(recursive=True)):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess, IndexError):
            words, memory = process.cmdline(), process.memory_info()
            kind = "driver" if process.pid == driver.pid else ""
            kind = kind or ("worker" if words[0].startswith("ray::") else "")
            kind = kind or ("decoder" if "clipflow_ray.sandbox" in " ".join(words[:3]) else "")
            if kind:
                largest[kind] = max(largest[kind], memory.rss - memory.shared)
    return largest


def peaks(checkpoint: str, source: Path, output: Path) -> dict[str, int]:
    """Audit `source` in a separate process. Returns the peak of `private_bytes` of each kind of process."""
    command = [sys.executable, "-m", "clipflow_ray", "audit", "--input", str(source), "--output", str(output)]
    command += ["--checkpoint", checkpoint, "--alpha", "0.1"]
    found: dict[str, int] = defaultdict(int)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as audit:
        while audit.poll() is None:
            with suppress(psutil.NoSuchProcess):
                for kind, size in private_bytes(psutil.Process(audit.pid)).items():
                    found[kind] = max(found[kind], size)
            time.sleep(0.2)
    assert audit.returncode == 0
    return found


@pytest.mark.stress
def test_ten_times_the_rows_take_no_more_memory(trained: str, tmp_path: Path) -> None:
    measured = []
    for rows in ROWS:
        write_shards(tmp_path / f"in-{rows}", rows)
        output = tmp_path / f"out-{rows}"
        measured.append(peaks(trained, tmp_path / f"in-{rows}", output))
        assert pads.dataset(output / "ledger").count_rows() == rows
        seconds = json.loads((output / "run.json").read_text())["timing"]["seconds"]
        print(
            rows, "rows", f"{seconds:.0f} s", {kind: f"{size / 2**20:.0f} MiB" for kind, size in measured[-1].items()}
        )
    assert set(measured[0]) == set(measured[1]) == {"driver", "worker", "decoder"}
    assert {kind: measured[1][kind] <= GROWTH * size for kind, size in measured[0].items()} == {
        "driver": True,
        "worker": True,
        "decoder": True,
    }
