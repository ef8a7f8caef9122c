"""An audit: list the input, read and decode, score, write the ledger."""

import logging
import time
from typing import Any

from clipflow_ray import __version__
from clipflow_ray.audit.ledger import LEDGER, SCORED, calibration_card, finalize
from clipflow_ray.config import AuditConfig
from clipflow_ray.data import resources
from clipflow_ray.data.inventory import write_manifest
from clipflow_ray.data.pipeline import read_then_encode
from clipflow_ray.data.reading import read_and_decode
from clipflow_ray.data.resumable import MANIFEST, Run
from clipflow_ray.data.scoring import Score
from clipflow_ray.errors import CalibrationError, ConfigError
from clipflow_ray.model.checkpoint import Checkpoint, load_checkpoint
from clipflow_ray.model.weights import load_weights
from clipflow_ray.storage import join, normalized, resolved

log = logging.getLogger(__name__)


def audit(config: AuditConfig) -> dict[str, Any]:
    """Score every object of the input and return the run's record, as `run.json` holds it.

    A run that was cut off goes on where it stopped; a finished one is returned as it is, with its verdicts recomputed
    when only alpha differs. Raises ClipflowError before anything starts where checkpoint, weights, input or cluster
    do not do.
    """
    if not config.input:
        raise ConfigError("Name at least one --input to audit.")
    s3 = resolved(config.s3)
    output = normalized(config.output)
    inputs = tuple(normalized(uri) for uri in config.input)
    checkpoint = load_checkpoint(config.checkpoint, s3)
    if checkpoint.calibration is None:
        raise CalibrationError("The checkpoint has no calibration; train it with a calibration split.")
    card = calibration_card(checkpoint.calibration, config.alpha)
    run = Run(output, s3)
    constants = {
        "model_id": checkpoint.model_id,
        "calibration_id": checkpoint.calibration.calibration_id,
        "tool_version": __version__,
    }
    identity = {
        "input": list(inputs),
        "encoder_fingerprint": checkpoint.encoder_fingerprint,
        "limits": config.limits.model_dump(mode="json"),
        **constants,
    }
    load_weights(checkpoint.encoder)  # missing weights are said here, once, and not by every actor
    record = run.begin(identity, lambda: write_manifest(inputs, run.path(MANIFEST), s3))
    if run.finished and record["alpha"] == config.alpha:
        log.info("this audit is already finished")
        return record
    if not run.finished:
        record["config"] = config.model_dump(mode="json")
        _score(config.model_copy(update={"s3": s3}), run, checkpoint, record)
    record |= {"alpha": config.alpha, "calibration": card, "ledger": join(output, LEDGER)}
    record |= finalize(run, config.alpha, constants)
    run.succeed(record)
    return record


def _score(config: AuditConfig, run: Run, checkpoint: Checkpoint, record: dict[str, Any]) -> None:
    resources.connect()
    plan = resources.plan_scoring()
    before = run.committed(SCORED)
    log.info("scoring %d of %d objects", record["manifest_rows"] - before, record["manifest_rows"])
    start = time.monotonic()
    run.write(
        SCORED,
        lambda manifest: read_then_encode(
            manifest,
            plan,
            config.batch_size,
            read_and_decode,
            {"s3": config.s3, "limits": config.limits, "kind": checkpoint.encoder.view},
            Score,
            {"checkpoint": checkpoint},
        ),
        record["manifest_rows"],
        config.rows_per_task,
    )
    seconds = time.monotonic() - start
    done = record["manifest_rows"] - before
    record["timing"] = {"seconds": seconds, "objects": done, "objects_per_second": done / seconds}
