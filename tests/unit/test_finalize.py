"""The ledger and its totals, compared with the same values computed row by row."""

import hashlib
import resource
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipflow_ray.audit import ledger, order
from clipflow_ray.audit.judging import Judge, PValues
from clipflow_ray.audit.ledger import finalize
from clipflow_ray.audit.order import ORDER, Sorter
from clipflow_ray.audit.repeats import Repeats
from clipflow_ray.audit.totals import MOST_RATES, Rates, Totals
from clipflow_ray.columns import LEDGER_SCHEMA, SCORED_SCHEMA
from clipflow_ray.errors import ClipflowError
from clipflow_ray.model.calibration import Calibration, Rule
from clipflow_ray.place import Place
from clipflow_ray.runs.folder import Run

ROWS = 3000
CALIBRATION = Calibration.fit(np.arange(200, dtype=np.float32), ["png|0-256"] * 200)
RULE = Rule(0.05, frozenset({"png|0-256"}), cap=True)
CONSTANTS = {"model_id": "a" * 16, "calibration_id": "b" * 16, "precision": "float32", "tool_version": "1.0"}
Row = dict[str, Any]


def digest(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def first_with_the_same_bytes(rows: Sequence[Row]) -> list[str | None]:
    """`dup_of` of each row, computed row by row."""
    ids: dict[str, list[str]] = {}
    for row in rows:
        ids.setdefault(row["sha256"] or row["row_id"], []).append(row["row_id"])
    first = [min(ids[row["sha256"] or row["row_id"]]) for row in rows]
    return [None if one == row["row_id"] else one for row, one in zip(rows, first, strict=True)]


def benjamini_hochberg(p_values: Sequence[float | None]) -> list[float | None]:
    """q-value of each p-value, computed row by row; None for None."""
    ranked = sorted(p for p in p_values if p is not None)
    q: dict[float, float] = {}
    least = 1.0
    for rank in range(len(ranked), 0, -1):
        least = min(least, ranked[rank - 1] * len(ranked) / rank)
        q.setdefault(ranked[rank - 1], least)
    return [None if p is None else q[p] for p in p_values]


def reference(rows: Sequence[Row], rule: Rule, dedupe: bool) -> list[Row]:
    """The finalizing columns of each row, computed row by row."""
    dup_of = first_with_the_same_bytes(rows)
    skipped = [dedupe and row["status"] == "ok" and first is not None for row, first in zip(rows, dup_of, strict=True)]
    p = [None if skip else row["p_value"] for row, skip in zip(rows, skipped, strict=True)]
    verdicts = [(None, None) if v is None else rule.verdict(v, r["stratum"]) for v, r in zip(p, rows, strict=True)]
    columns = {
        "status": ["skipped_duplicate" if skip else row["status"] for row, skip in zip(rows, skipped, strict=True)],
        "dup_of": dup_of,
        "q_value": benjamini_hochberg(p),
        "verdict": [verdict for verdict, _ in verdicts],
        "verdict_reasons": [reasons for _, reasons in verdicts],
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(st.none() | st.integers(0, 6), st.none() | st.integers(1, 5)), max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=3),
    dedupe=st.booleans(),
)
def test_equal_files_and_q_values_are_those_that_are_found_row_by_row(
    rows: list[tuple[int | None, int | None]], cuts: list[int], dedupe: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    p_values = [None if p is None else float(np.float32(p / 6)) for _, p in rows]
    listed = [
        {"row_id": digest(-at - 1)[:32], "sha256": None if number is None else digest(number), "p_value": p}
        for at, ((number, _), p) in enumerate(zip(rows, p_values, strict=True))
    ]
    schema = pa.schema([("row_id", pa.string()), ("sha256", pa.string()), ("p_value", pa.float32())])
    table = pa.Table.from_pylist(listed, schema)
    piece = np.arange(len(rows)) % 2
    repeats, counted = Repeats(tmp_path_factory.mktemp("repeats"), 10 * 262_144, 2), PValues()
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(rows)], strict=True):
        some = table.slice(start, max(0, end - start))
        repeats.add(some, piece[start : start + len(some)])
        counted.add(some["p_value"].to_numpy())
    for repeated in repeats.find():
        if dedupe:
            counted.add(repeated, -1)
    dup_of = first_with_the_same_bytes(listed)
    for at in range(2):
        found = repeats.first(at, table.filter(pa.array(piece == at))["row_id"])
        assert found.to_pylist() == dup_of[at::2]
    kept = [None if dedupe and first else p for p, first in zip(p_values, dup_of, strict=True)]
    judge = Judge(RULE, counted)
    found_q = judge.columns(np.array(kept, np.float32), pa.chunked_array([pa.nulls(len(rows), pa.string())]))["q_value"]
    expected = [np.nan if q is None else q for q in benjamini_hochberg(kept)]
    np.testing.assert_allclose(np.array(found_q), np.array(expected, np.float32), rtol=1e-6)


@pytest.fixture(scope="module")
def scored() -> list[Row]:
    """Rows of an audit: some with the bytes of others, some without a score, some without a digest."""
    rng, rows = np.random.default_rng(0), []
    for at in range(ROWS):
        number, failed = int(rng.integers(0, 2 * ROWS)), at % 10 == 7
        unread = at % 50 == 7
        rows.append(
            dict.fromkeys(SCORED_SCHEMA.names)
            | {
                "row_id": hashlib.md5(str(at).encode()).hexdigest(),
                "uri": f"/in/{int(rng.integers(0, ROWS))}.jpg",
                "member": "",
                "group": f"site-{number % 7}",
                "sha256": None if unread else digest(number),
                "status": "error" if failed else "ok",
                "error_code": ("not_found" if unread else "truncated") if failed else None,
                "error_message": "It is not whole." if failed else None,
                "stratum": ["jpeg|0-256", "png|0-256"][number % 2],
                "score": None if failed else float(np.float32(rng.normal())),
                "p_value": None if failed else float(np.float32(rng.integers(1, 202) / 201)),
            }
        )
    return rows


def written(rows: Sequence[Row], folder: Path, rows_per_file: int) -> Run:
    """A run with these rows as its scores."""
    (folder / "scored").mkdir(parents=True)
    for at in range(0, len(rows), rows_per_file):
        table = pa.Table.from_pylist(list(rows[at : at + rows_per_file]), SCORED_SCHEMA)
        pq.write_table(table, folder / "scored" / f"{at:06d}.parquet")
    return Run(Place.at(folder))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and files of a few hundred rows."""
    monkeypatch.setattr(order, "_ROWS", 200)
    monkeypatch.setattr(order, "_ROWS_PER_BATCH", 1)
    monkeypatch.setattr(ledger, "_ROWS_PER_FILE", 500)


def finalized(run: Run, dedupe: bool = False, rows: int = ROWS) -> Totals:
    return finalize(run, rows, RULE, CONSTANTS, dedupe, CALIBRATION, gallery=5)


@pytest.mark.parametrize("dedupe", [False, True])
def test_the_ledger_has_the_verdict_of_each_row_in_few_files_in_the_order_of_group_and_uri(
    scored: list[Row], tmp_path: Path, small_pieces: None, dedupe: bool
) -> None:
    totals = finalized(written(scored, tmp_path, 70), dedupe)
    judged = zip(scored, reference(scored, RULE, dedupe), strict=True)
    expected = [{**CONSTANTS, **row, **found} for row, found in judged]
    expected.sort(key=lambda row: (row["group"], row["uri"], row["row_id"]))
    files = sorted((tmp_path / "ledger").iterdir())
    assert 4 <= len(files) <= 7
    found = [row for file in files for row in pq.read_table(file).to_pylist()]
    q, other_q = (np.array([row.pop("q_value") for row in rows], np.float32) for rows in (found, expected))
    np.testing.assert_allclose(q, other_q, rtol=1e-6)
    assert found == expected
    assert pq.read_schema(files[0]).remove_metadata().equals(LEDGER_SCHEMA)
    record = totals.judged()
    assert record.rows == ROWS
    for name, counts in (
        ("status", record.by_status),
        ("error_code", record.by_error_code),
        ("verdict", record.by_verdict),
    ):
        assert counts == Counter(row[name] for row in found if row[name])
    assert record.capped == sum(row["verdict_reasons"] == ["below_alpha", "stratum_prone"] for row in found) > 0
    ok = [row for row in found if row["status"] == "ok"]
    assert totals.groups.of == Counter(row["group"] for row in ok)
    assert +totals.strata.flagged == Counter(row["stratum"] for row in ok if row["verdict"] == "likely_ai")
    assert sum(totals.scores.p_values()) == len(ok)
    assert [row["row_id"] for row in totals.suspicious.to_pylist()] == [
        row["row_id"] for row in sorted(ok, key=lambda row: -row["score"])[:5]
    ]
    assert [row["row_id"] for row in totals.unflagged.to_pylist()] == sorted(
        row["row_id"] for row in ok if row["verdict"] != "likely_ai"
    )[:5]
    for code, examples in totals.errors.items():
        assert [each.place for each in examples] == [row["uri"] for row in found if row["error_code"] == code][:3]


def test_a_ledger_does_not_depend_on_the_order_of_the_scores_and_replaces_the_one_before(
    scored: list[Row], tmp_path: Path, small_pieces: None
) -> None:
    run = written(scored, tmp_path / "a", 70)
    (tmp_path / "a" / "ledger").mkdir()
    pq.write_table(pa.table({"row_id": ["of another time"]}), tmp_path / "a" / "ledger" / "zzz.parquet")
    (tmp_path / "a" / "_SUCCESS").touch()
    finalized(run)
    assert not run.finished, "until its record is written"
    finalized(written(scored[::-1], tmp_path / "b", 31))
    assert pq.read_table(tmp_path / "a" / "ledger").equals(pq.read_table(tmp_path / "b" / "ledger"))


def test_a_sample_that_is_unlike_the_rows_gives_pieces_of_other_sizes_and_the_same_order(tmp_path: Path) -> None:
    keys = pa.table({name: [f"{at:03d}" for at in range(100)] for name in ORDER})
    sorter = Sorter(tmp_path / "order", keys.slice(40, 1), pieces=5)
    numbers = [sorter.add(keys.take(np.arange(start, 100, 3)))[1] for start in range(3)]
    pieces = [sorter.piece(at) for at in range(5)]
    assert [len(piece) for piece in pieces] == np.bincount(np.concatenate(numbers), minlength=5).tolist()
    assert sum(len(piece) == 0 for piece in pieces) == 3
    assert pa.concat_tables(pieces).equals(keys)


def test_a_missing_row_is_an_error(scored: list[Row], tmp_path: Path) -> None:
    with pytest.raises(ClipflowError, match="2999 scores for 3000 objects"):
        finalized(written(scored[:-1], tmp_path, 500))


def test_a_full_disk_raises_an_error_that_says_what_to_do(scored: list[Row], tmp_path: Path) -> None:
    run = written(scored, tmp_path, 500)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(ClipflowError, match="larger disk"):
            finalized(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_an_audit_without_scores_has_no_q_values() -> None:
    judge = Judge(RULE, PValues())
    found = judge.columns(np.array([np.nan], np.float32), pa.chunked_array([["png|0-256"]]))
    assert np.isnan(np.array(found["q_value"])).all()
    assert pa.array(found["verdict"]).to_pylist() == pa.array(found["verdict_reasons"]).to_pylist() == [None]


def test_of_very_many_groups_the_largest_are_kept() -> None:
    rng = np.random.default_rng(0)
    sizes = {f"{at:06d}": int(size) for at, size in enumerate(rng.integers(1, 40, 25_000))}
    names = np.repeat(list(sizes), list(sizes.values()))
    rates = Rates()
    for some in np.array_split(names, 40):  # a group may be cut
        rates.add(pa.chunked_array([some.tolist()]), pa.chunked_array([np.ones(len(some), bool)]))
    assert rates.of.most_common(MOST_RATES) == Counter(sizes).most_common(MOST_RATES)
    assert len(rates.of) < 15_000
    assert all(rates.flagged[name] == count for name, count in rates.of.most_common(MOST_RATES))
