"""An audit: list the input, read and decode, score, write the ledger and the report."""

import logging
import os
import time
from collections import Counter
from dataclasses import replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from ray.data import Dataset

from clipflow_ray import __version__
from clipflow_ray.audit.export import export_csv
from clipflow_ray.audit.judging import Judge, PValues
from clipflow_ray.audit.ledger import EMBEDDINGS, LEDGER, SCORED, calibration_card, finalize, judged
from clipflow_ray.audit.progress import reported
from clipflow_ray.audit.record import AuditIdentity, AuditPlan, AuditRecord, Timing
from clipflow_ray.audit.report import PAGE, write_report
from clipflow_ray.columns import MANIFEST_SCHEMA
from clipflow_ray.config import AuditConfig, validated
from clipflow_ray.data import resources
from clipflow_ray.data.pipeline import read_then_encode
from clipflow_ray.data.precision import bfloat16_on_nodes
from clipflow_ray.data.reading import read_and_decode
from clipflow_ray.data.scoring import Score, embedding_columns, scored
from clipflow_ray.errors import CalibrationError, ConfigError, InputError, ReadError
from clipflow_ray.inputs.listing import rows
from clipflow_ray.inputs.manifest import write_manifest
from clipflow_ray.inputs.reading import read_bytes
from clipflow_ray.model.calibration import Calibration, Rule
from clipflow_ray.model.checkpoint import Checkpoint, load_checkpoint
from clipflow_ray.model.encoder import Encoder
from clipflow_ray.model.precision import Bfloat16, at_precision
from clipflow_ray.model.weights import load_weights
from clipflow_ray.place import Place, places, settled
from clipflow_ray.runs.folder import MANIFEST, Aside, Run
from clipflow_ray.runs.lease import exclusive
from clipflow_ray.runs.record import RunRecord

log = logging.getLogger(__name__)

_TRIED_FIRST: Final = 3


def audit(config: AuditConfig) -> AuditRecord:
    """Score every object of the input and return the run's record, as `run.json` holds it.

    An interrupted run continues. A finished run is returned as it is; if alpha, dedupe or cap_prone_strata differ,
    only its verdicts are computed again. Raises ClipflowError before scoring starts if the checkpoint, the weights, the
    input or the cluster is unusable, or if another run holds the output.
    """
    if not config.input:
        raise ConfigError("Name at least one --input to audit.")
    config = settled(config, "input", "output")
    run = Run(Place.at(config.output, config.s3))
    checkpoint = _at_precision(load_checkpoint(Place.at(config.checkpoint, config.s3)), config, run)
    calibration = usable_calibration(checkpoint, config.alpha)
    identity = AuditIdentity(
        input=config.input,
        encoder_fingerprint=checkpoint.encoder_fingerprint,
        inventory=config.inventory,
        limits=config.limits,
        sample=config.sample,
        keep_embeddings=config.keep_embeddings,
        **made_by(checkpoint, calibration),
    )

    def list_inputs() -> int:
        resources.connect()
        resources.check_reading()
        count = write_manifest(places(config.input, config.s3), run.place / MANIFEST, config.inventory)
        _check_readable(config, run)
        return count

    with exclusive(run.place):
        record = run.completed(AuditRecord, identity)
        if record is not None:
            return _judged_again(run, record, config, calibration)
        load_weights(checkpoint.encoder)  # so that missing weights raise here and not in every actor
        begun = run.begin(RunRecord[AuditIdentity], identity, list_inputs)
        timing = _score(config, run, checkpoint, calibration, begun.manifest_rows)
        return judged_run(run, begun, config, timing, calibration)


def _at_precision(checkpoint: Checkpoint, config: AuditConfig, run: Run) -> Checkpoint:
    """The checkpoint at the precision of the audit: with `auto`, that with which the run began, or the nodes' best."""
    begun = run.begun(RunRecord[AuditIdentity])
    if config.precision == "auto" and begun is not None and begun.identity.precision in checkpoint.precisions:
        chosen, reason = checkpoint.at(begun.identity.precision), "the audit began with it"
    else:
        chosen, reason = at_precision(checkpoint, config.precision, lambda: _bfloat16(config))
    log.info("encoding in %s, because %s", chosen.encoder.precision, reason)
    return chosen


def _bfloat16(config: AuditConfig) -> Bfloat16:
    resources.connect()
    return bfloat16_on_nodes(resources.plan_scoring(1, config.batch_size, config.pool, resumed=False).encoder_gpus)


def usable_calibration(checkpoint: Checkpoint, alpha: float) -> Calibration:
    """The checkpoint's calibration. Raises CalibrationError if there is none, or if it does not support `alpha`."""
    if checkpoint.calibration is None:
        raise CalibrationError("The checkpoint has no calibration; train it with a calibration split.")
    checkpoint.calibration.threshold(alpha)
    return checkpoint.calibration


def made_by(checkpoint: Checkpoint, calibration: Calibration) -> dict[str, Any]:
    """The constants of each row of a ledger: ids of model and calibration, precision of the encoder, this version."""
    return {
        "model_id": checkpoint.model_id,
        "calibration_id": calibration.calibration_id,
        "precision": checkpoint.encoder.precision,
        "tool_version": __version__,
    }


def judged_run(
    run: Run,
    begun: RunRecord[AuditIdentity],
    config: AuditConfig,
    timing: Timing,
    calibration: Calibration,
    scored_by: AuditConfig | None = None,
) -> AuditRecord:
    """Finish a run whose `scored/` is whole: write ledger, report and record, and return the record.

    `config` holds the settings of the verdicts and of the report. `scored_by` holds those of the scoring, if they
    differ.
    """
    rule = calibration.rule(config.alpha, config.cap_prone_strata)
    constants = begun.identity.model_dump(include={"model_id", "calibration_id", "precision", "tool_version"})
    totals = finalize(run, begun.manifest_rows, rule, constants, config.dedupe == "sha256", calibration, config.gallery)
    record = AuditRecord(
        identity=begun.identity,
        manifest_rows=begun.manifest_rows,
        config=scored_by or config,
        timing=timing,
        alpha=rule.alpha,
        cap_prone_strata=rule.cap,
        dedupe=config.dedupe,
        calibration=calibration_card(calibration, rule),
        ledger=(run.place / LEDGER).uri,
        report=(run.place / PAGE).uri,
        exported=export_csv(run, config.export),
        **dict(totals.judged()),
    )
    write_report(run, record, totals, config.inventory)
    run.succeed(record)
    return record


def _judged_again(run: Run, record: AuditRecord, config: AuditConfig, calibration: Calibration) -> AuditRecord:
    """The record of a finished run with the verdicts that `config` asks for."""
    if run.finished and (record.alpha, record.cap_prone_strata, record.dedupe) == (
        config.alpha,
        config.cap_prone_strata,
        config.dedupe,
    ):
        log.info("this audit is already finished")
        if config.export != "none":
            record = record.model_copy(update={"exported": export_csv(run, config.export)})
            run.succeed(record)
        return record
    return judged_run(run, record, config, record.timing, calibration, record.config)


def plan(config: AuditConfig) -> AuditPlan:
    """What an audit would do: number of objects, bytes and suffixes, and hours, estimated from one encoder batch.

    Lists the input and writes nothing. Raises ClipflowError if the checkpoint, the input or the cluster is unusable.
    """
    if not config.input:
        raise ConfigError("Name at least one --input to audit.")
    loaded = load_checkpoint(Place.at(config.checkpoint, config.s3))
    objects, readable, size, names = 0, 0, 0, Counter[str]()
    for row in rows(places(config.input, config.s3), config.inventory):
        objects += 1
        readable += row["problem"] is None
        size += row["bytes"] or 0
        names[os.path.splitext(row["member"] or row["uri"])[1].lower() or "none"] += 1
    resources.connect()
    scored = round(readable * config.sample)
    cluster = resources.Cluster.live()
    if cluster.can_add:  # nothing is asked for, so no node is added
        cluster = replace(cluster, can_add=lambda bundles: True)
    share = resources.plan_scoring(scored, config.batch_size, config.pool, resumed=False, cluster=cluster)
    # Without a live GPU the CPUs are asked, because a task that takes a GPU would make the autoscaler add a node.
    gpus = share.encoder_gpus if any(node.get("GPU") for node in cluster.nodes) else 0.0
    checkpoint, _ = at_precision(loaded, config.precision, lambda: bfloat16_on_nodes(gpus))
    encoder = Encoder(checkpoint.encoder, checkpoint.segments, threads=share.threads)
    views = np.zeros((config.batch_size, encoder.view.bytes), np.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in an audit
    encoder(views[:1])
    start = time.perf_counter()
    encoder(views)
    rate = share.initial * len(views) / (time.perf_counter() - start)
    torch.set_num_threads(threads)
    return AuditPlan(
        objects=objects,
        to_score=scored,
        bytes=size,
        by_suffix=dict(names.most_common()),
        precision=checkpoint.encoder.precision,
        encoders=share.initial,
        images_per_second=rate,
        hours=scored / rate / 3600.0,
    )


def judge_again(changes: AuditConfig) -> AuditRecord:
    """Judge the finished audit in `changes.output` again, from its stored scores, and return its record.

    The settings that `changes` names, such as `alpha` and `dedupe`, replace those of the audit; the others are kept.
    Reads the checkpoint for its calibration; no encoder runs. Raises InputError if the output holds no finished audit.
    """
    run = Run(Place.at(changes.output, changes.s3))
    record = run.completed(AuditRecord) or run.reopened(AuditRecord)
    if record is None:
        raise InputError(f"{changes.output} holds no finished audit; run or repeat `clipflow-ray audit` first.")
    named = changes.model_dump(exclude_unset=True)
    s3 = record.config.s3.model_dump() | named.get("s3", {})  # the gallery reads the input again
    config = settled(validated(AuditConfig, record.config.model_dump() | named | {"s3": s3}), "output")
    checkpoint = load_checkpoint(Place.at(config.checkpoint, config.s3)).of_encoder(record.identity.encoder_fingerprint)
    calibration = usable_calibration(checkpoint, config.alpha)
    run = Run(Place.at(config.output, config.s3))
    with exclusive(run.place):
        # Refuse a checkpoint that has changed since the audit.
        run.refuse_other(record.identity, record.identity.model_copy(update=made_by(checkpoint, calibration)))
        return _judged_again(run, record, config, calibration)


def _check_readable(config: AuditConfig, run: Run) -> None:
    """Raise InputError if access to the first few objects is denied, because all others would probably fail too."""
    few = run.table(MANIFEST).head(_TRIED_FIRST, filter=pc.field("problem").is_null())
    tried = read_bytes(few, run.place, config.limits, config.inventory)
    if all(isinstance(outcome, ReadError) and outcome.item_code == "access_denied" for outcome in tried):
        raise InputError(
            f"The credentials allow listing but not reading {', '.join(config.input)}: access to the first "
            "objects is denied. Allow s3:GetObject there, or give --unsigned for a public bucket."
        )


def check_columns(reading: dict[str, Any], calibration: Calibration, constants: dict[str, str]) -> None:
    """Send an empty manifest through every stage: raises ClipflowError if their columns are not those of columns.py."""
    table = read_and_decode(MANIFEST_SCHEMA.empty_table(), **reading)
    judged(
        scored(table, np.zeros(0, bool), None, calibration),
        Judge(Rule(0.5, frozenset(), cap=True), PValues()),
        pa.nulls(0, pa.string()),
        False,
        constants,
    )


def _score(config: AuditConfig, run: Run, checkpoint: Checkpoint, calibration: Calibration, listed: int) -> Timing:
    """Write `scored/`, one row for each of the `listed` objects; rows of an interrupted run are kept."""
    resources.connect()
    left = listed - run.committed(SCORED)
    share = resources.plan_scoring(left, config.batch_size, config.pool, resumed=left < listed)
    log.info("scoring %d of %d objects with %s", left, listed, share.in_words)
    reading = {
        "near": run.place,
        "limits": config.limits,
        "spec": checkpoint.view,
        "options": config.inventory,
        "sample": config.sample,
    }
    check_columns(reading, calibration, made_by(checkpoint, calibration))

    def stages(manifest: Dataset) -> Dataset:
        scoring = {"checkpoint": checkpoint, "keep_embeddings": config.keep_embeddings}
        return read_then_encode(manifest, share, config.batch_size, read_and_decode, reading, Score, scoring)

    aside = Aside(EMBEDDINGS, tuple(embedding_columns(checkpoint))) if config.keep_embeddings else None
    start = time.monotonic()
    with reported(run, listed):
        run.write(SCORED, stages, listed, config.rows_per_task, aside)
    seconds = time.monotonic() - start
    return Timing(seconds=seconds, objects=left, objects_per_second=left / seconds)
