"""The report of an audit: one self-contained HTML page, and the same facts as markdown and json.

Its content comes from `run.json` and from the totals that were counted while the ledger was written. For a few small
thumbnails, the input is read again.
"""

import shlex
from collections.abc import Iterator
from typing import Any, Final

import pyarrow as pa
from scipy import stats

from clipflow_ray.audit.distribution import Distribution
from clipflow_ray.audit.record import (
    AuditRecord,
    AuditReport,
    Counts,
    Drift,
    ErrorGroup,
    NamedRate,
    ReportCard,
)
from clipflow_ray.audit.totals import MOST_RATES, Rates, Totals
from clipflow_ray.config import DISCLAIMER, AuditConfig, Config, InventoryOptions
from clipflow_ray.reports import pages
from clipflow_ray.reports.pages import Picture
from clipflow_ray.runs.folder import Run
from clipflow_ray.statistics import flagged_rate

PAGE: Final = "report.html"
_FDR: Final = 0.05
# Photographs of another kind than the calibration's, or many generated images.
_UNLIKE_DISTANCE: Final = 0.25
_UNLIKE_P: Final = 0.001
# Settings that only a config file can change. Every other setting of an audit has a flag: its name with dashes.
CONFIG_FILE_ONLY: Final = frozenset(
    {"max_jpeg_scans", "max_wall_seconds", "generator_column", "cap_prone_strata", "rows_per_task"}
)
_ALWAYS_SHOWN: Final = ("output", "checkpoint", "alpha")
_RESCORE_FLAGS: Final = frozenset({*_ALWAYS_SHOWN, "endpoint_url", "region", "unsigned"})


def write_report(run: Run, record: AuditRecord, totals: Totals, options: InventoryOptions) -> None:
    """Write `report.html`, `report.md` and `report.json` into the run's folder. Pictures are read with `options`."""
    report = report_of(record, totals)
    pictures = _gallery(run, record, totals, options) if totals.gallery else {}
    templates = pages.environment("clipflow_ray.audit")
    (run.place / "report.json").write(report.model_dump_json(indent=1) + "\n")
    for name, charts in (("report.md", {}), (PAGE, _charts(report))):
        text = templates.get_template(f"{name}.j2").render(report=report, charts=charts, gallery=pictures)
        (run.place / name).write(text)


def report_of(record: AuditRecord, totals: Totals) -> AuditReport:
    """The content of the report."""
    scores = totals.scores
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
            precision=record.identity.precision,
            sample=record.config.sample,
            dedupe=record.dedupe,
        ),
        command=command_line(
            record.config.model_copy(
                update={"alpha": record.alpha, "dedupe": record.dedupe, "precision": record.identity.precision}
            ),
            record.identity.rescored_from,
        ),
        counts=Counts(
            status=record.by_status, verdict=record.by_verdict, error_code=record.by_error_code, rows=record.rows
        ),
        timing=record.timing,
        calibration=record.calibration,
        capped=record.capped,
        flagged=record.flagged,
        groups=_rates(totals.groups, record.alpha),
        strata=_rates(totals.strata, record.alpha),
        errors={
            code: ErrorGroup(count=record.by_error_code[code], examples=tuple(totals.errors[code]))
            for code in sorted(totals.errors)
        },
        scores=scores.histogram(),
        p_values=scores.p_values(),
        drift=_drift(scores),
    )


def _rates(rates: Rates, alpha: float) -> tuple[NamedRate, ...]:
    """Flagged share of each group or stratum, most flagged first; `marked` ones exceed alpha at an FDR of 5 %."""
    of, hits = rates.of, rates.flagged
    names = [name for name, _ in of.most_common(MOST_RATES)]
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


def _gallery(run: Run, record: AuditRecord, totals: Totals, options: InventoryOptions) -> dict[str, list[Picture]]:
    """Thumbnails as data URIs: the most suspicious images, and as many unflagged ones by row id."""
    both = pa.concat_tables([totals.suspicious, totals.unflagged]).to_pylist()
    wanted = [Picture(note=row.pop("verdict"), **row) for row in both]
    pictures = pages.pictured(run, wanted, record.identity.limits, options)  # at once, because it reads the manifest
    first = len(totals.suspicious)
    return {"Most suspicious": pictures[:first], "Not flagged, at random": pictures[first:]}


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
            if name == "encoders":
                value = "-".join(map(str, value))
            for each in value if isinstance(value, tuple) else (value,):
                parts += [f"--{name.replace('_', '-')}", *([] if each is True else [str(each)])]
    return shlex.join(parts)
