"""The ledger as csv, and the exit code of an audit that scored nothing."""

import csv
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from clipflow_ray.audit.export import export_csv
from clipflow_ray.audit.ledger import LEDGER
from clipflow_ray.columns import LEDGER_SCHEMA
from clipflow_ray.place import Place
from clipflow_ray.runs.folder import Run

ROWS: list[dict[str, Any]] = [
    {"row_id": "0", "uri": "/a,b.jpg", "verdict": "likely_ai", "verdict_reasons": ["below_alpha", "x"], "score": 1.5},
    {"row_id": "1", "uri": '/é "q"\n.jpg', "verdict": "no_ai_signal", "verdict_reasons": []},
    {"row_id": "2", "uri": "/c.txt", "status": "skipped_not_image"},
]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(Place.at(tmp_path))
    for at, row in enumerate(ROWS):
        table = pa.Table.from_pylist([row], LEDGER_SCHEMA)
        (run.place / LEDGER / f"part-{at}.parquet").write_parquet(table)
    return run


def read(uri: str | None) -> list[dict[str, str]]:
    assert uri is not None
    with open(uri, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_all_rows_or_the_flagged_ones_are_written(run: Run) -> None:
    every = read(export_csv(run, "csv-all"))
    assert [*every[0]] == LEDGER_SCHEMA.names
    assert [row["uri"] for row in every] == [row["uri"] for row in ROWS]
    assert [row["verdict_reasons"] for row in every] == ["below_alpha;x", "", ""]
    flagged = read(export_csv(run, "csv"))
    assert [(row["row_id"], row["score"]) for row in flagged] == [("0", "1.5")]
    assert sorted(name for name in run.place.names() if name.endswith("csv")) == ["flagged.csv", "ledger.csv"]


def test_nothing_is_written_unless_it_is_asked_for(run: Run) -> None:
    assert export_csv(run, "none") is None
    assert run.place.names() == [LEDGER]
