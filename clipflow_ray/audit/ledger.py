"""The ledger: one parquet row per listed object, with the columns that `contracts.md` promises.

Scores are stored once; verdicts, q-values and rates are recomputed from them at any alpha without an encoder.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clipflow_ray.audit.repeats import numbered
from clipflow_ray.model.calibration import Calibration, verdict
from clipflow_ray.runs.folder import Run
from clipflow_ray.statistics import flagged_rate

log = logging.getLogger(__name__)

SCORED: Final = "scored"
LEDGER: Final = "ledger"
SCHEMA: Final = pa.schema(
    [
        ("row_id", pa.string()),
        ("uri", pa.string()),
        ("member", pa.string()),
        ("group", pa.string()),
        ("sha256", pa.string()),
        ("bytes", pa.int64()),
        ("dup_of", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),
        ("mode", pa.string()),
        ("frames", pa.int32()),
        ("jpeg_quality", pa.int32()),
        ("has_exif", pa.bool_()),
        ("status", pa.string()),
        ("error_code", pa.string()),
        ("error_message", pa.string()),
        ("log_likelihood", pa.float32()),
        ("log_base", pa.float32()),
        ("log_det", pa.float32()),
        ("score", pa.float32()),
        ("p_value", pa.float32()),
        ("stratum", pa.string()),
        ("p_stratum", pa.float32()),
        ("q_value", pa.float32()),
        ("verdict", pa.string()),
        ("verdict_reasons", pa.list_(pa.string())),
        ("label", pa.string()),
        ("generator", pa.string()),
        ("model_id", pa.string()),
        ("calibration_id", pa.string()),
        ("tool_version", pa.string()),
        ("scored_at", pa.string()),
    ]
)


def finalize(run: Run, alpha: float, constants: dict[str, str], dedupe: bool = False) -> dict[str, Any]:
    """Write `ledger/` from `scored/` at `alpha` and return the summary's counts.

    `constants` fills model_id, calibration_id and tool_version. `dup_of` names the first row, by id, with the
    same bytes; with `dedupe` the others are skipped_duplicate, keep their scores and count nowhere else. One file of
    the ledger belongs to one file of scores, so a repeated call replaces it.
    """
    counts: dict[str, Counter[str]] = {"status": Counter(), "error_code": Counter(), "verdict": Counter()}
    start = 0
    with numbered(run.parts(SCORED)) as rows:
        q_values = rows.q_values(dedupe)
        for name, table in _tables(run):
            table = _judged(table, q_values, rows.repeated(start, len(table)), dedupe, alpha, constants)
            start += len(table)
            (run.place / LEDGER / name).write_parquet(table)
            for column, counter in counts.items():
                counter.update(value for value in table[column].to_pylist() if value is not None)
    return {
        "rows": start,
        **{f"by_{name}": dict(sorted(counter.items())) for name, counter in counts.items()},
        "flagged": flagged_rate(counts["verdict"]["likely_ai"], counts["status"]["ok"], alpha),
    }


def calibration_card(calibration: Calibration, alpha: float) -> dict[str, Any]:
    """What alpha means with this calibration set."""
    return {
        "calibration_n": len(calibration.scores),
        "threshold": calibration.threshold(alpha),
        "false_positive_rate_95": list(calibration.false_positive_interval(alpha)),
    }


def _tables(run: Run) -> Iterator[tuple[str, pa.Table]]:
    """The name of each file of scores, and its rows."""
    for part in run.parts(SCORED):
        for fragment in part.get_fragments():
            yield fragment.path.rsplit("/", 1)[-1], fragment.to_table(schema=part.schema)


def _judged(
    table: pa.Table,
    q_values: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    dup_of: list[str | None],
    dedupe: bool,
    alpha: float,
    constants: dict[str, str],
) -> pa.Table:
    ok = [value == "ok" for value in table["status"].to_pylist()]
    skipped = [dedupe and good and name is not None for good, name in zip(ok, dup_of, strict=True)]
    p_values = zip(table["p_value"].to_pylist(), skipped, strict=True)
    judged = [(None, None) if p is None or skip else verdict(p, alpha) for p, skip in p_values]
    columns: dict[str, pa.Array] = {name: table[name] for name in table.column_names}
    status = zip(table["status"].to_pylist(), skipped, strict=True)
    columns["status"] = pa.array(["skipped_duplicate" if skip else value for value, skip in status], pa.string())
    columns["dup_of"] = pa.array(dup_of, pa.string())
    p_value = np.where(skipped, np.nan, table["p_value"].to_numpy()).astype(np.float32)
    columns["q_value"] = pa.array(q_values(p_value), pa.float32(), from_pandas=True)
    columns["verdict"] = pa.array([name for name, _ in judged], pa.string())
    columns["verdict_reasons"] = pa.array([reasons for _, reasons in judged], pa.list_(pa.string()))
    for name, value in constants.items():
        columns[name] = pa.array([value] * len(table), pa.string())
    absent = pa.nulls(len(table))
    return pa.table({field.name: columns.get(field.name, absent).cast(field.type) for field in SCHEMA}, SCHEMA)
