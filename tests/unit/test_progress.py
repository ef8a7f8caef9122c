"""Progress reports while files are being written."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from clipflow_ray.audit.ledger import SCORED
from clipflow_ray.audit.progress import PROGRESS, reported
from clipflow_ray.place import Place
from clipflow_ray.runs.folder import Run


def test_an_unfinished_file_skips_one_report_and_the_run_continues(tmp_path: Path) -> None:
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"error_code": ["empty", None, None]}), whole)
    part = tmp_path / "run" / SCORED / "part-0.parquet"
    part.parent.mkdir(parents=True)
    run = Run(Place.at(tmp_path / "run"))
    with reported(run, total=3, seconds=1e6):
        part.write_bytes(whole.read_bytes()[:-8])
    assert not Path((run.place / PROGRESS).uri).exists()
    part.unlink()
    with reported(run, total=3, seconds=1e6):
        shutil.copy(whole, part)
    state = json.loads(Path((run.place / PROGRESS).uri).read_text())
    assert state["done"] == 3 and state["errors"] == {"empty": 1}
