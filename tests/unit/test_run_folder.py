"""What counts as finished in a run folder."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from clipflow_ray.place import Place
from clipflow_ray.runs.folder import Run


def test_a_block_that_was_being_written_when_the_run_died_is_not_counted_as_done(tmp_path: Path) -> None:
    run, folder = Run(Place.at(tmp_path)), tmp_path / "resume" / "scored"
    assert run.committed("scored") == 0
    folder.mkdir(parents=True)
    for name, rows in (("a.parquet", 3), ("b.parquet", 4), ("c.pending.parquet", 50)):
        pq.write_table(pa.table({"row_id": [str(at) for at in range(rows)]}), folder / name)
    assert run.committed("scored") == 7
