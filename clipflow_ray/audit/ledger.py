"""The ledger: parquet files with one row per listed object; their columns are listed in `columns.py`.

Scores are stored once, under `scored/`. Verdicts, q-values and rates at any alpha are computed from them without an
encoder. `embeddings/` holds the embeddings of the same rows, in files of the same names, if the audit keeps them.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from clipflow_ray.audit.record import CalibrationCard, Judged
from clipflow_ray.audit.repeats import numbered
from clipflow_ray.columns import add_columns, ledger_table
from clipflow_ray.model.calibration import Calibration, Rule
from clipflow_ray.runs.folder import Run
from clipflow_ray.statistics import flagged_rate

log = logging.getLogger(__name__)

SCORED: Final = "scored"
EMBEDDINGS: Final = "embeddings"
LEDGER: Final = "ledger"


def finalize(run: Run, rule: Rule, constants: dict[str, str], dedupe: bool = False) -> Judged:
    """Write `ledger/` from `scored/` with the verdicts of `rule` and return the totals over its rows.

    `constants` holds model_id, calibration_id, precision and tool_version. `dup_of` is the smallest id among the rows
    with the same bytes. With `dedupe`, a row that has a `dup_of` gets the status skipped_duplicate: it keeps its
    scores, has no verdict and counts in no q-value or rate. Each file of scores gives one ledger file of the same name,
    so a second call replaces the files of the first.
    """
    counts: dict[str, Counter[str]] = {"status": Counter(), "error_code": Counter(), "verdict": Counter()}
    start, capped = 0, 0
    with numbered(run.parts(SCORED)) as rows:
        q_values = rows.q_values(dedupe)
        for name, table in _tables(run):
            table = judged(table, q_values, rows.repeated(start, len(table)), dedupe, rule, constants)
            start += len(table)
            (run.place / LEDGER / name).write_parquet(table)
            for column, counter in counts.items():
                counter.update(value for value in table[column].to_pylist() if value is not None)
            if rule.prone and rule.cap:
                capped += sum(_capped(reasons) for reasons in table["verdict_reasons"].to_pylist())
    return Judged(
        rows=start,
        by_status=dict(sorted(counts["status"].items())),
        by_error_code=dict(sorted(counts["error_code"].items())),
        by_verdict=dict(sorted(counts["verdict"].items())),
        capped=capped,
        flagged=flagged_rate(counts["verdict"]["likely_ai"], counts["status"]["ok"], rule.alpha),
    )


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


def _capped(reasons: list[str] | None) -> bool:
    """Whether these are the reasons of an image whose p-value is at most alpha, and whose stratum is prone."""
    return reasons is not None and {"below_alpha", "stratum_prone"} <= set(reasons)


def _tables(run: Run) -> Iterator[tuple[str, pa.Table]]:
    """The name of each file of scores, and its rows."""
    for part in run.parts(SCORED):
        for fragment in part.get_fragments():
            yield fragment.path.rsplit("/", 1)[-1], fragment.to_table(schema=part.schema)


def judged(
    table: pa.Table,
    q_values: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    dup_of: list[str | None],
    dedupe: bool,
    rule: Rule,
    constants: dict[str, str],
) -> pa.Table:
    """Scored rows -> rows of the ledger; see `finalize`."""
    status, p_values = table["status"].to_pylist(), table["p_value"].to_numpy()
    skipped = np.array(
        [dedupe and old == "ok" and first is not None for old, first in zip(status, dup_of, strict=True)], bool
    )
    p_values = np.where(skipped, np.nan, p_values).astype(np.float32)
    strata = table["stratum"].to_pylist()
    verdicts = [
        (None, None) if np.isnan(p) else rule.verdict(float(p), stratum or "")
        for p, stratum in zip(p_values, strata, strict=True)
    ]
    values: dict[str, Any] = {
        "status": ["skipped_duplicate" if skip else old for old, skip in zip(status, skipped, strict=True)],
        "dup_of": dup_of,
        "q_value": q_values(p_values),
        "verdict": [name for name, _ in verdicts],
        "verdict_reasons": [reasons for _, reasons in verdicts],
        **{name: [value] * len(table) for name, value in constants.items()},
    }
    return ledger_table(add_columns(table, "finalizing", values))
