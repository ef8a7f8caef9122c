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


def test_a_file_that_is_being_written_is_counted_once_it_is_whole(tmp_path: Path) -> None:
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"error_code": ["empty", None, None]}), whole)
    run = Run(Place.at(tmp_path / "run"))
    part = tmp_path / "run" / SCORED / "7_000000-0.parquet"
    mark = tmp_path / "run" / "resume" / SCORED / "7_000000.pending.parquet"
    for path in (part, mark):
        path.parent.mkdir(parents=True)
        path.write_bytes(whole.read_bytes()[:-8])

    def done() -> int:
        return int(json.loads((tmp_path / "run" / PROGRESS).read_text())["done"])

    with reported(run, total=3, seconds=1e6):
        assert run.files(SCORED) == []
    assert done() == 0
    with reported(run, total=3, seconds=1e6):
        shutil.copy(whole, part)
        mark.rename(mark.with_name("7_000000.parquet"))
    state = json.loads((tmp_path / "run" / PROGRESS).read_text())
    assert state["done"] == 3 and state["errors"] == {"empty": 1}
