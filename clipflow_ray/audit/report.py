"""The report of an audit: one self-contained HTML page, and the same facts as markdown and json.

Its content comes from the ledger, `run.json` and the checkpoint's calibration. For a few small thumbnails, the input is
read again.
"""

import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
from scipy import stats

from clipflow_ray.audit.distribution import Distribution
from clipflow_ray.audit.ledger import LEDGER
from clipflow_ray.audit.record import (
    AuditRecord,
    AuditReport,
    Counts,
    Drift,
    ErrorExample,
    ErrorGroup,
    NamedRate,
    ReportCard,
)
from clipflow_ray.columns import LEDGER_SCHEMA
from clipflow_ray.config import DISCLAIMER, AuditConfig, Config, InventoryOptions
from clipflow_ray.model.calibration import Calibration
from clipflow_ray.reports import pages
from clipflow_ray.reports.pages import Picture
from clipflow_ray.runs.folder import Run
from clipflow_ray.statistics import flagged_rate

PAGE: Final = "report.html"
_EXAMPLES: Final = 3
_MAX_GROUPS: Final = 200
_FDR: Final = 0.05
# Photographs of another kind than the calibration's, or many generated images.
_UNLIKE_DISTANCE: Final = 0.25
_UNLIKE_P: Final = 0.001
_OK: Final = pc.field("status") == "ok"
# Settings that only a config file can change. Every other setting of an audit has a flag: its name with dashes.
CONFIG_FILE_ONLY: Final = frozenset(
    {"max_jpeg_scans", "max_wall_seconds", "generator_column", "cap_prone_strata", "batch_size", "rows_per_task"}
)
_ALWAYS_SHOWN: Final = ("output", "checkpoint", "alpha")
_RESCORE_FLAGS: Final = frozenset({*_ALWAYS_SHOWN, "endpoint_url", "region", "unsigned"})


def write_report(
    run: Run, record: AuditRecord, calibration: Calibration, gallery: int, options: InventoryOptions
) -> None:
    """Write `report.html`, `report.md` and `report.json` into the run's folder."""
    report = report_of(run, record, calibration)
    pictures = _gallery(run, record, gallery, options) if gallery else {}
    templates = pages.environment("clipflow_ray.audit")
    (run.place / "report.json").write(report.model_dump_json(indent=1) + "\n")
    for name, charts in (("report.md", {}), (PAGE, _charts(report))):
        text = templates.get_template(f"{name}.j2").render(report=report, charts=charts, gallery=pictures)
        (run.place / name).write(text)


def report_of(run: Run, record: AuditRecord, calibration: Calibration) -> AuditReport:
    """The content of the report."""
    counts: Counter[tuple[str, str, str, str]] = Counter()
    examples: dict[str, list[ErrorExample]] = defaultdict(list)
    columns = ["group", "stratum", "status", "verdict", "error_code", "error_message", "uri", "member"]
    for batch in _batches(run, columns):
        rows = batch.to_pydict()
        keys = (rows[name] for name in ("group", "stratum", "status", "verdict"))
        counts.update((g or "", s or "", status, v or "") for g, s, status, v in zip(*keys, strict=True))
        for at, code in enumerate(rows["error_code"]):
            if code and len(examples[code]) < _EXAMPLES:
                place = rows["uri"][at] + (f" : {rows['member'][at]}" if rows["member"][at] else "")
                examples[code].append(ErrorExample(place=place, message=rows["error_message"][at]))
    scores = Distribution(calibration)
    for batch in _batches(run, ["score", "p_value"], _OK):
        scores.add(batch["score"].to_numpy(), batch["p_value"].to_numpy())
    return AuditReport(
        disclaimer=DISCLAIMER,
        card=ReportCard(
            input=record.identity.input,
            checkpoint=record.identity.model_id,
            calibration=record.identity.calibration_id,
            calibration_n=record.calibration.calibration_n,
            alpha=record.alpha,
            false_positive_rate_95=record.calibration.false_positive_rate_95,
            tool_version=record.identity.tool_version,
            encoder=record.identity.encoder_fingerprint,
            sample=record.config.sample,
            dedupe=record.dedupe,
        ),
        command=command_line(
            record.config.model_copy(update={"alpha": record.alpha, "dedupe": record.dedupe}),
            record.identity.rescored_from,
        ),
        counts=Counts(
            status=record.by_status, verdict=record.by_verdict, error_code=record.by_error_code, rows=record.rows
        ),
        timing=record.timing,
        calibration=record.calibration,
        capped=record.capped,
        flagged=record.flagged,
        groups=_rates(counts, 0, record.alpha),
        strata=_rates(counts, 1, record.alpha),
        errors={
            code: ErrorGroup(count=record.by_error_code[code], examples=tuple(examples[code]))
            for code in sorted(examples)
        },
        scores=scores.histogram(),
        p_values=scores.p_values(),
        drift=_drift(scores),
    )


def _batches(run: Run, columns: list[str], only: pc.Expression | None = None) -> Iterator[pa.RecordBatch]:
    for part in run.parts(LEDGER):
        yield from part.to_batches(columns=columns, filter=only)


def _rates(counts: Counter[tuple[str, str, str, str]], place: int, alpha: float) -> tuple[NamedRate, ...]:
    """Flagged share of each group or stratum, most flagged first; `marked` ones exceed alpha at an FDR of 5 %."""
    of: Counter[str] = Counter()
    hits: Counter[str] = Counter()
    for key, count in counts.items():
        if key[2] == "ok":
            of[key[place]] += count
            hits[key[place]] += count if key[3] == "likely_ai" else 0
    names = [name for name, _ in of.most_common(_MAX_GROUPS)]
    if not names:
        return ()
    tests = [stats.binomtest(hits[name], of[name], alpha, "greater").pvalue for name in names]
    adjusted = stats.false_discovery_control(tests)
    table = [
        NamedRate(name=name, q=float(q), marked=bool(q <= _FDR), **dict(flagged_rate(hits[name], of[name], alpha)))
        for name, q in zip(names, adjusted, strict=True)
    ]
    return tuple(sorted(table, key=lambda row: (-row.count / row.of, row.name)))


def _drift(scores: Distribution) -> Drift | None:
    """Kolmogorov-Smirnov distance of the audit's scores from the calibration's, and both medians."""
    middle = scores.median()
    if middle is None:
        return None
    distance, p_value = scores.distance()
    return Drift(
        ks_distance=distance,
        p_value=p_value,
        median=middle,
        calibration_median=scores.calibration_median(),
        unlike=distance >= _UNLIKE_DISTANCE and p_value <= _UNLIKE_P,
    )


def _gallery(run: Run, record: AuditRecord, size: int, options: InventoryOptions) -> dict[str, list[Picture]]:
    """Thumbnails as data URIs: the `size` most suspicious images, and as many unflagged ones by row id."""
    suspicious = _first(run, _OK, "score", "descending", size)
    # ids are hashes, so their order is random and the same in every run
    random = _first(run, _OK & (pc.field("verdict") != "likely_ai"), "row_id", "ascending", size)
    limits = record.identity.limits
    return {
        "Most suspicious": pages.pictured(run, suspicious, limits, options),
        "Not flagged, at random": pages.pictured(run, random, limits, options),
    }


def _first(run: Run, only: pc.Expression, column: str, order: str, size: int) -> list[Picture]:
    """The first `size` rows in that order. Reads one batch at a time, because a ledger may be larger than memory."""
    columns = ["row_id", "uri", "member", "p_value", "score", "verdict"]
    best = pa.schema([LEDGER_SCHEMA.field(name) for name in columns]).empty_table()
    for batch in _batches(run, columns, only):
        best = pa.concat_tables([best, pa.Table.from_batches([batch])]).sort_by([(column, order)]).slice(0, size)
    return [Picture(note=row.pop("verdict"), **row) for row in best.to_pylist()]


def _charts(report: AuditReport) -> dict[str, str]:
    """Inline SVG of the two histograms."""

    def scores(axes: Any) -> None:
        found = report.scores
        axes.stairs(
            found.calibration, found.edges, fill=True, color=pages.NATURAL_COLOUR, alpha=0.6, label="calibration"
        )
        axes.stairs(found.audit, found.edges, color=pages.SUSPICIOUS_COLOUR, linewidth=2, label="this audit")
        axes.set_xlabel("score (the end bins hold all scores beyond)")
        axes.set_ylabel("share of images")
        axes.legend(frameon=False)

    return {"scores": pages.chart(scores), "p_values": pages.p_value_chart(report.p_values)}


def settings_with_flags(config: Config) -> Iterator[tuple[str, Any]]:
    """(name, value) of each setting that has a flag, including those of `inventory` and `s3`."""
    for name, value in config:
        if isinstance(value, Config) and name not in CONFIG_FILE_ONLY:
            yield from settings_with_flags(value)
        elif name not in CONFIG_FILE_ONLY:
            yield name, value


def command_line(config: AuditConfig, rescored_from: str | None = None) -> str:
    """The command line that repeats the audit: every setting that has a flag and is not the default.

    For an audit whose scores come from the embeddings of another, this is the `rescore` of that other audit.
    """
    parts = ["clipflow-ray", "audit"] if rescored_from is None else ["clipflow-ray", "rescore", rescored_from]
    defaults = dict(settings_with_flags(AuditConfig(output="")))
    for name, value in settings_with_flags(config):
        if rescored_from is not None and name not in _RESCORE_FLAGS:
            continue
        if name in _ALWAYS_SHOWN or value != defaults[name]:
            for each in value if isinstance(value, tuple) else (value,):
                parts += [f"--{name.replace('_', '-')}", *([] if each is True else [str(each)])]
    return shlex.join(parts)
