"""Calibrate a checkpoint on photographs of one's own: an audit of them, and a new calibration from its scores.

Nothing is trained and no AI-generated image is used, so the scores of all images stay the same. Only p-values and
thresholds change. Photographs are encoded at each precision, so that the checkpoint serves on every machine. A finished
audit has scores of one precision only.

checkpoint/        the new checkpoint, for `--checkpoint`
scores/            the audit of the photographs, unless the input is a finished audit
PRECISION/         the embeddings of the photographs at another precision than that of the audit
calibration.json   what changes
report.html        the same as a page
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy import stats

from clipflow_ray import __version__
from clipflow_ray.audit.ledger import SCORED
from clipflow_ray.audit.record import AuditRecord
from clipflow_ray.audit.rescore import rescore
from clipflow_ray.audit.run import audit
from clipflow_ray.config import (
    DISCLAIMER,
    EVALUATED_ALPHAS,
    AuditConfig,
    CalibrateConfig,
    Closed,
    Precision,
    Record,
    RescoreConfig,
    Segment,
    stable_hash,
)
from clipflow_ray.data.reading import read_and_decode
from clipflow_ray.errors import CalibrationError, ConfigError, InputError
from clipflow_ray.evaluate.embeddings import embeddings_of, encode, readable
from clipflow_ray.inputs.listing import check_apart, rows
from clipflow_ray.model.calibration import Calibration
from clipflow_ray.model.checkpoint import Calibrated, Checkpoint, load_checkpoint, save_checkpoint
from clipflow_ray.model.encoder import fingerprint
from clipflow_ray.model.record import CalibrationStep
from clipflow_ray.model.scorer import Scorer
from clipflow_ray.model.weights import load_record
from clipflow_ray.place import Place, places, settled
from clipflow_ray.reports import pages
from clipflow_ray.runs.folder import MANIFEST, RUN, Run
from clipflow_ray.runs.record import FinishedRecord
from clipflow_ray.statistics import FlaggedRate, flagged_rate

log = logging.getLogger(__name__)

MIN_PHOTOGRAPHS: Final = 20
_MAX_FOLDS: Final = 100
_CHANCE: Final = 0.05
_DEFAULT_ALPHA: Final = float(AuditConfig.model_fields["alpha"].default)
_COLUMNS: Final = ("row_id", "sha256", "score", "stratum", "group", "status")
_ENCODE_ROWS: Final = 32

F32 = NDArray[np.float32]


class SourceChange(Closed):
    """The photographs of one source at one alpha, before and after. `after` is cross-fitted."""

    name: str = Field(description="The group of the photographs.")
    before: FlaggedRate | None = Field(description="Flagged by the old calibration; null if alpha is below its floor.")
    after: FlaggedRate = Field(description="Flagged by the new calibration.")
    stands_out: bool = Field(
        description="Whether at least two are still flagged, and more than chance explains (5 % over all sources)."
    )


class AlphaChange(Closed):
    """What changes at one alpha. A photograph's own score is not in the calibration that judges it afterwards."""

    alpha: float = Field(description="False-positive rate to flag at.")
    threshold_before: float | None = Field(
        description="A higher score was flagged; null if alpha is below the floor of the old calibration."
    )
    threshold_after: float = Field(description="A higher score is flagged now.")
    before: FlaggedRate | None = Field(description="The photographs that the old calibration flags; null likewise.")
    after: FlaggedRate = Field(description="The photographs that the new calibration flags, by cross-fitting.")
    sources: tuple[SourceChange, ...] = Field(description="The same by source, most flagged first.")
    in_words: tuple[str, ...] = Field(description="What alpha means with the new calibration, as sentences.")


class CalibrationReport(Record):
    """`calibration.json`: what `calibrate` changed."""

    disclaimer: str = Field(description="What a score is and is not.")
    checkpoint: str = Field(description="URI of the new checkpoint.")
    model_id: str = Field(description="Id of the model, which stays the same.")
    precisions: tuple[Precision, ...] = Field(
        description="Precisions that the new checkpoint is calibrated for; all figures are those of the first."
    )
    calibration_before: str = Field(description="Id of the old calibration.")
    calibration_after: str = Field(description="Id of the new calibration.")
    photographs: int = Field(description="Photographs in the new calibration that `calibrate` added.")
    sources: int = Field(description="Their sources.")
    unreadable: int = Field(description="Objects of the input that have no score; the ledger of `scores` says why.")
    repeated: int = Field(description="Equal files, which are left out.")
    keep_shipped: float = Field(description="Weight of the old calibration in the new one.")
    smallest_alpha: float = Field(description="The smallest alpha that the new checkpoint supports.")
    alphas: tuple[AlphaChange, ...] = Field(
        description="What changes at alpha 1 % and 5 %. One is left out if there are too few photographs to judge each "
        "of them at it without itself."
    )


@dataclass(frozen=True)
class _Photographs:
    """Scores float32 [N] of distinct photographs, sorted by row id, with the stratum and the source of each."""

    row_ids: list[str]
    scores: F32
    strata: list[str]
    sources: list[str]
    unreadable: int
    repeated: int


class EncodedIdentity(Closed):
    """Everything that determines the embeddings of the photographs at a further precision."""

    encoder_fingerprint: str = Field(description="Fingerprint of the encoder.")
    segments: tuple[Segment, ...] = Field(description="Outputs of the encoder that are stored.")
    photographs: str = Field(description="Hash of the row ids of the photographs.")


class EncodedRecord(FinishedRecord[EncodedIdentity]):
    """`run.json` of the finished embeddings of the photographs at a further precision."""


def calibrate(config: CalibrateConfig) -> CalibrationReport:
    """Write a checkpoint whose calibrations are made of the photographs of `config.input`, and what that changes.

    There is one for each precision. From a finished audit there is only that of its precision, and if
    `config.keep_shipped` is not 0, only those for which the checkpoint has one. The input may be a finished audit by
    the same model, or by another of the same encoder if the audit kept its embeddings; no image is read then. A
    repeated call continues an interrupted one. Raises ClipflowError before scoring starts if the input has fewer than
    20 objects or holds the output, and InputError if the input has changed since the output was begun.
    """
    if not config.input:
        raise ConfigError("Name at least one --input with photographs.")
    config = settled(config, "input", "output")
    loaded = load_checkpoint(Place.at(config.checkpoint, config.s3))
    if not loaded.precisions:
        raise CalibrationError("The checkpoint has no calibration to compare with; train it with a calibration split.")
    inputs, place = places(config.input, config.s3), Place.at(config.output, config.s3)
    check_apart(inputs, place)
    finished = _finished(inputs, config, loaded)
    run = finished or _audited(config, inputs, loaded)
    record = run.completed(AuditRecord)
    assert record is not None  # both are finished audits
    checkpoint = loaded.at(record.identity.precision)
    assert checkpoint.calibration is not None  # `at` refuses a precision without one
    own = _scored(run)
    if len(own.scores) < MIN_PHOTOGRAPHS:
        raise CalibrationError(f"Only {len(own.scores)} photographs have a score; give at least {MIN_PHOTOGRAPHS}.")
    new = _combined(checkpoint.calibration, own, config.keep_shipped, np.ones(len(own.scores), bool))
    further = {} if finished else _further(config, checkpoint, own, run)
    step = CalibrationStep(
        calibration_before=checkpoint.calibration.calibration_id,
        precisions=(checkpoint.encoder.precision, *further),
        input=tuple(each.name for each in inputs),
        photographs=len(own.scores),
        sources=len(set(own.sources)),
        keep_shipped=config.keep_shipped,
        tool_version=__version__,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    report = CalibrationReport(
        disclaimer=DISCLAIMER,
        checkpoint=(place / "checkpoint").uri,
        model_id=checkpoint.model_id,
        precisions=step.precisions,
        calibration_before=step.calibration_before,
        calibration_after=new.calibration_id,
        photographs=step.photographs,
        sources=step.sources,
        unreadable=own.unreadable,
        repeated=own.repeated,
        keep_shipped=config.keep_shipped,
        smallest_alpha=new.floor,
        alphas=_changes(checkpoint.calibration, new, own, config.keep_shipped),
    )
    outdated = {name: replace(each, calibration=None) for name, each in checkpoint.further.items()}
    changed = replace(checkpoint, calibration=new, further=outdated | further, lineage=(*checkpoint.lineage, step))
    save_checkpoint(changed, place / "checkpoint")
    (place / "calibration.json").write(report.model_dump_json(indent=1) + "\n")
    template = pages.environment("clipflow_ray.reports").get_template("calibration.html.j2")
    (place / "report.html").write(template.render(report=report, step=step))
    return report


def in_words(report: CalibrationReport) -> list[str]:
    """The report as sentences for the terminal."""
    left_out = [
        f"{count} {name}"
        for count, name in ((report.unreadable, "without a score"), (report.repeated, "repeated"))
        if count
    ]
    lines = [
        f"calibrated on {report.photographs} photographs; sources: {report.sources}"
        + (f"; left out: {', '.join(left_out)}" if left_out else "")
        + f"; precisions: {', '.join(report.precisions)}"
    ]
    for change in report.alphas:
        before = "not supported"
        if change.before is not None:
            before = f"{_share(change.before)} (score above {change.threshold_before:.3f})"
        now = f"{_share(change.after)} (above {change.threshold_after:.3f}, cross-fitted)"
        lines.append(f"alpha {change.alpha:g}: flagged before {before}, now {now}")
        standing_out = [each for each in change.sources if each.stands_out]
        if standing_out:
            names = ", ".join(f"{each.name} ({_share(each.after)})" for each in standing_out)
            lines.append(f"  sources that are still flagged more often than alpha: {names}")
    lines += report.alphas[-1].in_words if report.alphas else ()
    if report.smallest_alpha > _DEFAULT_ALPHA:
        lines.append(f"audits with this checkpoint need an --alpha of at least {report.smallest_alpha:.2g}")
    return [*lines, f"checkpoint: {report.checkpoint}", report.disclaimer]


def _audited(config: CalibrateConfig, inputs: Sequence[Place], loaded: Checkpoint) -> Run:
    """The finished audit of the photographs, at the first precision of the checkpoint."""
    checkpoint = loaded.at(loaded.precisions[0])
    assert checkpoint.calibration is not None  # `at` refuses a precision without one
    listed = _listed(config, inputs, checkpoint.calibration)
    run = AuditConfig(
        input=config.input,
        output=(Place.at(config.output, config.s3) / "scores").uri,
        checkpoint=config.checkpoint,
        precision=checkpoint.encoder.precision,
        alpha=_alpha(checkpoint.calibration),
        s3=config.s3,
        inventory=config.inventory,
        gallery=0,
        pool=config.pool,
    )
    if audit(run).manifest_rows != listed:
        raise InputError(f"The input has changed since {run.output} was written: name another output.")
    return Run(Place.at(run.output, config.s3))


def _alpha(calibration: Calibration) -> float:
    """An alpha that the calibration supports: scores do not depend on it."""
    return next((alpha for alpha in EVALUATED_ALPHAS if calibration.supports(alpha)), 0.5)


def _finished(inputs: Sequence[Place], config: CalibrateConfig, checkpoint: Checkpoint) -> Run | None:
    """The finished audit that the input is, with scores by `checkpoint`, or None if the input is no run.

    An audit by another model is rescored from its embeddings. Raises InputError for any other run.
    """
    runs = [place for place in inputs if (place / RUN).exists()]
    if not runs:
        return None
    record = Run(runs[0]).completed(AuditRecord)
    if record is None or len(inputs) > 1:
        raise InputError(f"{runs[0].uri} is a run. Give one finished audit as the only input, or photographs.")
    if record.identity.model_id == checkpoint.model_id:
        return Run(runs[0])
    if not record.identity.keep_embeddings:
        raise InputError(
            f"{runs[0].uri} is an audit by model {record.identity.model_id}, not by {checkpoint.model_id}, and keeps "
            "no embeddings. Name the checkpoint of that audit, or give its photographs as the input."
        )
    output = (Place.at(config.output, config.s3) / "scores").uri
    calibration = checkpoint.of_encoder(record.identity.encoder_fingerprint).calibration
    alpha = 0.5 if calibration is None else _alpha(calibration)
    rescore(RescoreConfig(audit=runs[0].uri, output=output, checkpoint=config.checkpoint, alpha=alpha, s3=config.s3))
    return Run(Place.at(output, config.s3))


def _further(
    config: CalibrateConfig, checkpoint: Checkpoint, own: _Photographs, audited: Run
) -> dict[Precision, Calibrated]:
    """The encoder at each other precision than that of `checkpoint`, with a calibration of the same photographs."""
    further: dict[Precision, Calibrated] = {}
    for precision in get_args(Precision):
        old = checkpoint.further.get(precision, Calibrated("", None)).calibration
        if precision == checkpoint.encoder.precision:
            continue
        if old is None and config.keep_shipped:
            log.warning("the checkpoint has no calibration for %s to keep, so the new one has none either", precision)
            continue
        log.info("encoding the photographs in %s, too", precision)
        encoder = checkpoint.encoder.model_copy(update={"precision": precision})
        name = fingerprint(encoder, load_record(encoder), checkpoint.view.sizes)
        other = replace(checkpoint, encoder=encoder, encoder_fingerprint=name)
        scores = replace(own, scores=_scores(config, other, own.row_ids, audited))
        everything = np.ones(len(own.scores), bool)
        further[precision] = Calibrated(name, _combined(old, scores, config.keep_shipped, everything))
    return further


def _scores(config: CalibrateConfig, other: Checkpoint, row_ids: Sequence[str], audited: Run) -> F32:
    """Scores float32 [N] of audited photographs by the encoder of `other`, whose calibration is of another precision.

    Raises InputError if a photograph cannot be read again.
    """
    run = Run(Place.at(config.output, config.s3) / other.encoder.precision)
    identity = EncodedIdentity(
        encoder_fingerprint=other.encoder_fingerprint,
        segments=other.outputs,
        photographs=stable_hash(*row_ids),
    )

    def write_manifest() -> int:
        listed = audited.table(MANIFEST).to_table(filter=pads.field("row_id").isin(row_ids))
        (run.place / MANIFEST / "part-0.parquet").write_parquet(listed)
        return len(listed)

    encode(run, EncodedRecord, identity, write_manifest, read_and_decode, _ENCODE_ROWS, other, config)
    again = readable(run)
    if len(again) != len(row_ids):
        raise InputError(
            f"{len(row_ids) - len(again)} of the photographs could not be read a second time, for "
            f"{other.encoder.precision}. Name another output."
        )
    (embeddings,) = embeddings_of(again, other.segments, 1)
    return Scorer(other, torch.device("cpu"))(embeddings).score  # its p-values are of another precision and not used


def _listed(config: CalibrateConfig, inputs: Sequence[Place], old: Calibration) -> int:
    """The number of objects, after saying what they will support. Raises CalibrationError if they are too few."""
    groups = [row["group"] for row in rows(inputs, config.inventory) if row["problem"] is None]
    if len(groups) < MIN_PHOTOGRAPHS:
        raise CalibrationError(
            f"The input has {len(groups)} objects; a calibration needs at least {MIN_PHOTOGRAPHS} photographs, and at "
            f"least 99 for alpha {_DEFAULT_ALPHA:g}."
        )
    count = len(groups) + (len(old.scores) if config.keep_shipped else 0)
    log.info("%d objects, sources: %d; the smallest alpha will be %.2g", len(groups), len(set(groups)), 1 / (count + 1))
    if len(set(groups)) == 1 and not config.keep_shipped:
        log.warning("all photographs are from one source, so nothing is known about any other: see --keep-shipped")
    return len(groups)


def _scored(run: Run) -> _Photographs:
    tables = [part.to_table(columns=list(_COLUMNS)) for part in run.parts(SCORED)]
    table = pa.concat_tables(tables).sort_by("row_id")
    good = table.filter(pc.equal(table["status"], "ok"))
    _, first = np.unique(np.array(good["sha256"].to_pylist(), np.str_), return_index=True)
    kept = good.take(np.sort(first))
    return _Photographs(
        row_ids=kept["row_id"].to_pylist(),
        scores=kept["score"].to_numpy().astype(np.float32),
        strata=kept["stratum"].to_pylist(),
        sources=kept["group"].to_pylist(),
        unreadable=int(pc.sum(pc.equal(table["status"], "error")).as_py() or 0),
        repeated=len(good) - len(kept),
    )


def _combined(old: Calibration | None, own: _Photographs, keep: float, chosen: NDArray[np.bool_]) -> Calibration:
    """A calibration of the chosen photographs, in which the old calibration, if there is one, has the weight `keep`."""
    sources = [f"own {name}" for name, is_chosen in zip(own.sources, chosen, strict=True) if is_chosen]
    strata = [name for name, is_chosen in zip(own.strata, chosen, strict=True) if is_chosen]
    if not keep or old is None:
        return Calibration.fit(own.scores[chosen], strata, sources)
    distinct = set(sources)
    shares = np.full(old.source_count, 1.0 / old.source_count) if old.weights is None else old.weights
    weights: dict[str | int, float] = {f"shipped {at}": keep * float(share) for at, share in enumerate(shares)}
    weights |= dict.fromkeys(distinct, (1.0 - keep) / len(distinct))
    return Calibration.fit(
        np.r_[old.scores, own.scores[chosen]],
        [*old.strata, *strata],
        [*(f"shipped {at}" for at in old.sources), *sources],
        weights,
    )


def _changes(old: Calibration, new: Calibration, own: _Photographs, keep: float) -> tuple[AlphaChange, ...]:
    sources = np.array(own.sources, np.str_)
    names = np.unique(sources)
    folds = _folds(old, own, keep)
    changes = []
    for alpha in EVALUATED_ALPHAS:
        if not all(without.supports(alpha) for _, without in folds):
            continue
        known = old.supports(alpha)
        was = own.scores > (old.threshold(alpha) if known else np.inf)
        now = np.zeros(len(sources), bool)
        for part, without in folds:
            now[part] = own.scores[part] > without.threshold(alpha)
        by_source = []
        for name in names:
            own_rows = sources == name
            rate = _rate(now[own_rows], alpha)
            by_source.append(
                SourceChange(
                    name=str(name),
                    before=_rate(was[own_rows], alpha) if known else None,
                    after=rate,
                    stands_out=rate.count >= 2
                    and stats.binom.sf(rate.count - 1, rate.of, alpha) < _CHANCE / len(names),
                )
            )
        changes.append(
            AlphaChange(
                alpha=alpha,
                threshold_before=old.threshold(alpha) if known else None,
                threshold_after=new.threshold(alpha),
                before=_rate(was, alpha) if known else None,
                after=_rate(now, alpha),
                sources=tuple(sorted(by_source, key=lambda each: -(each.after.share or 0.0))),
                in_words=new.in_words(alpha),
            )
        )
    return tuple(changes)


def _folds(old: Calibration, own: _Photographs, keep: float) -> list[tuple[NDArray[np.bool_], Calibration]]:
    """Parts of the photographs, bool [N] each, with a calibration without the part, for cross-fitting.

    Up to 100 photographs are left out one at a time, more of them in 100 parts.
    """
    count = len(own.scores)
    number = np.random.default_rng(0).permutation(count) % min(count, _MAX_FOLDS)
    parts = [number == at for at in range(min(count, _MAX_FOLDS))]
    return [(part, _combined(old, own, keep, ~part)) for part in parts]


def _rate(flagged: NDArray[np.bool_], alpha: float) -> FlaggedRate:
    return flagged_rate(int(flagged.sum()), len(flagged), alpha)


def _share(rate: FlaggedRate) -> str:
    return f"{rate.count} of {rate.of}"
