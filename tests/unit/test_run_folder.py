"""A run folder: its record, when a run counts as begun or finished, and to which run it belongs."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipflow_ray.config import Closed
from clipflow_ray.errors import RunConflictError
from clipflow_ray.place import Place
from clipflow_ray.runs.folder import Run
from clipflow_ray.runs.record import FinishedRecord, RunRecord


class Identity(Closed):
    input: tuple[str, ...]
    sample: float


class Counted(FinishedRecord[Identity]):
    errors: int


WHOLE = Identity(input=("/in",), sample=1.0)
HALF = Identity(input=("/in",), sample=0.5)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(Place.at(tmp_path))


def begun(run: Run, identity: Identity, rows: int) -> RunRecord[Identity]:
    return run.begin(RunRecord[Identity], identity, lambda: rows)


def test_a_block_that_was_being_written_when_the_run_died_is_not_counted_as_done(run: Run) -> None:
    folder = Path(run.place.uri, "resume", "scored")
    assert run.committed("scored") == 0
    folder.mkdir(parents=True)
    for name, rows in (("a.parquet", 3), ("b.parquet", 4), ("c.pending.parquet", 50)):
        pq.write_table(pa.table({"row_id": [str(at) for at in range(rows)]}), folder / name)
    assert run.committed("scored") == 7


def test_a_run_lists_its_inputs_once_and_its_record_is_complete_when_it_has_finished(run: Run) -> None:
    assert run.completed(Counted, WHOLE) is None
    assert begun(run, WHOLE, 7).manifest_rows == 7
    assert begun(run, WHOLE, 8).manifest_rows == 7
    assert run.completed(Counted, WHOLE) is None
    record = Counted(identity=WHOLE, manifest_rows=7, errors=1)
    run.succeed(record)
    assert run.finished and run.completed(Counted, WHOLE) == record == run.completed(Counted)


def test_a_run_that_died_right_before_its_mark_of_success_resumes(run: Run) -> None:
    run.succeed(Counted(identity=WHOLE, manifest_rows=7, errors=1))
    Path(run.place.uri, "_SUCCESS").unlink()
    assert run.completed(Counted, WHOLE) is None
    assert begun(run, WHOLE, 8).manifest_rows == 7


def test_a_run_of_another_identity_is_refused_and_the_difference_named(run: Run) -> None:
    begun(run, WHOLE, 7)
    with pytest.raises(RunConflictError, match="other sample"):
        begun(run, HALF, 7)
    run.succeed(Counted(identity=WHOLE, manifest_rows=7, errors=1))
    with pytest.raises(RunConflictError, match="other sample"):
        run.completed(Counted, HALF)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"identity": {"input": ["/in"]}, "manifest_rows": 7}', '{"format_version": 2}'],
)
def test_a_file_that_is_not_a_record_of_a_run_is_refused_with_what_to_do(run: Run, text: str) -> None:
    Path(run.place.uri, "run.json").write_text(text)
    with pytest.raises(RunConflictError, match="Name another output"):
        begun(run, WHOLE, 7)
    Path(run.place.uri, "_SUCCESS").touch()
    with pytest.raises(RunConflictError, match="Name another output"):
        run.completed(Counted)


def test_a_record_without_a_format_version_is_read(run: Run) -> None:
    plain = {"identity": {"input": ["/in"], "sample": 1.0}, "manifest_rows": 7, "errors": 1}
    Path(run.place.uri, "run.json").write_text(json.dumps(plain))
    assert begun(run, WHOLE, 8).manifest_rows == 7
    Path(run.place.uri, "_SUCCESS").touch()
    assert run.completed(Counted, WHOLE) == Counted(identity=WHOLE, manifest_rows=7, errors=1)
