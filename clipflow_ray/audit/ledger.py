"""The ledger: parquet files with one row per listed object; their columns are listed in `columns.py`.

Scores are stored once, under `scored/`. Verdicts, q-values and rates at any alpha are computed from them without an
encoder. `embeddings/` holds the embeddings of the same rows, in files of the same names, if the audit keeps them.
"""

from collections.abc import Iterator
from itertools import chain
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipflow_ray.audit.judging import Judge, PValues
from clipflow_ray.audit.order import ORDER, Sorter, rows_of_a_piece
from clipflow_ray.audit.record import CalibrationCard
from clipflow_ray.audit.repeats import Repeats
from clipflow_ray.audit.totals import Totals
from clipflow_ray.columns import LEDGER_SCHEMA, add_columns, ledger_table, scored_table
from clipflow_ray.errors import ClipflowError
from clipflow_ray.model.calibration import Calibration, Rule
from clipflow_ray.runs.bounded import ahead, gathered
from clipflow_ray.runs.folder import Run

SCORED: Final = "scored"
EMBEDDINGS: Final = "embeddings"
LEDGER: Final = "ledger"
_ROWS_PER_FILE: Final = 524_288
# Columns whose values are mostly different.
_PLAIN: Final = ("row_id", "uri", "sha256", "dup_of", "bytes", "log_likelihood", "log_base", "log_det", "score")
_SAMPLED_FILES_PER_PIECE: Final = 16
_ROWS_PER_SAMPLED_ROW: Final = 64


def finalize(
    run: Run, rows: int, rule: Rule, constants: dict[str, str], dedupe: bool, calibration: Calibration, gallery: int
) -> Totals:
    """Write `ledger/` from the `rows` rows of `scored/` with the verdicts of `rule`, and return the totals.

    `constants` holds model_id, calibration_id, precision and tool_version. `dup_of` is the smallest id among the rows
    with the same bytes. With `dedupe`, a row that has a `dup_of` gets the status skipped_duplicate: it keeps its
    scores, has no verdict and counts in no q-value or rate. The totals keep `gallery` images of each kind for the
    report.

    The rows are in the order of group, URI, member and id, whatever the order of `scored/` is. A second call replaces
    the files of the first, and the run does not count as finished until `Run.succeed`. Memory is that of a few
    pieces: see `rows_of_a_piece`. Meanwhile a row takes about 450 bytes in the temporary directory. Raises
    ClipflowError if that directory is full, or if there are not `rows` rows.
    """
    names = run.files(SCORED)
    pieces = -(-rows // rows_of_a_piece(rows))
    with TemporaryDirectory(prefix="clipflow-ray-") as folder:
        sorter = Sorter(f"{folder}/order", _sample(run, names, pieces), pieces)
        repeats = Repeats(folder, rows, pieces)
        p_values = PValues()
        scores = map(scored_table, run.tables(SCORED, names))
        for table in gathered(scores, rows_of_a_piece(rows)):
            ordered, piece = sorter.add(table)
            repeats.add(ordered, piece)
            p_values.add(ordered["p_value"].to_numpy())
        for repeated in repeats.find():
            if dedupe:
                p_values.add(repeated, -1)
        judge = Judge(rule, p_values)

        def judged_piece(at: int) -> pa.Table:
            table = sorter.piece(at)
            return judged(table, judge, repeats.first(at, table["row_id"]), dedupe, constants)

        totals = Totals(rule, calibration, gallery)
        _write(run, ahead(judged_piece, range(pieces), threads=1, most=1), totals)
    if totals.rows != rows:
        raise ClipflowError(
            f"{run.place.uri} has {totals.rows} scores for {rows} objects. Keep the folder and report this error."
        )
    return totals


def calibration_card(calibration: Calibration, rule: Rule) -> CalibrationCard:
    """Size of the calibration set, and what its alpha means for photographs like it and for those of a new source."""
    return CalibrationCard(
        calibration_n=len(calibration.scores),
        calibration_sources=calibration.source_count,
        threshold=calibration.threshold(rule.alpha),
        p_floor=calibration.floor,
        false_positive_rate_95=calibration.false_positive_interval(rule.alpha),
        unseen_source=calibration.unseen_source(rule.alpha),
        prone_strata=tuple(sorted(rule.prone)),
        in_words=calibration.in_words(rule.alpha) + rule.in_words(),
    )


def judged(table: pa.Table, judge: Judge, dup_of: pa.Array, dedupe: bool, constants: dict[str, str]) -> pa.Table:
    """Scored rows -> rows of the ledger; see `finalize`."""
    status = table["status"]
    skipped = pc.and_(pc.and_(pc.equal(status, "ok"), dup_of.is_valid()), dedupe)
    p_values = pc.if_else(skipped, pa.scalar(None, pa.float32()), table["p_value"]).to_numpy()
    values: dict[str, Any] = {
        "status": pc.if_else(skipped, "skipped_duplicate", status),
        "dup_of": dup_of,
        **judge.columns(p_values, table["stratum"]),
        **{name: pa.repeat(value, len(table)) for name, value in constants.items()},
    }
    return ledger_table(add_columns(table, "finalizing", values))


def _sample(run: Run, names: list[str], pieces: int) -> pa.Table:
    """Keys of a few rows of a few files, which stand for all rows."""
    few = names[:: max(1, len(names) // (pieces * _SAMPLED_FILES_PER_PIECE))]
    tables = run.tables(SCORED, few, ORDER)
    return pa.concat_tables([table.take(np.arange(0, len(table), _ROWS_PER_SAMPLED_ROW)) for table in tables])


def _write(run: Run, pieces: Iterator[pa.Table], totals: Totals) -> None:
    """Write the ledger's rows, which come in its order, and count them. Each piece is a row group or more."""
    folder = run.place / LEDGER
    run.reopen()
    for old in folder.names():
        (folder / old).delete()

    def counted() -> Iterator[pa.Table]:
        for table in pieces:
            if len(table):
                totals.add(table)
                yield table

    tables = counted()

    def of_a_file(first: pa.Table) -> Iterator[pa.Table]:
        rows = 0
        for table in chain([first], tables):
            yield table
            rows += len(table)
            if rows >= _ROWS_PER_FILE:
                break

    for number, first in enumerate(tables):
        (folder / f"part-{number:05d}.parquet").write_row_groups(of_a_file(first), LEDGER_SCHEMA, _PLAIN)
