"""Judge a finished audit by another checkpoint of the same encoder, from its kept embeddings; no image is read."""

import logging
import time
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from clipflow_ray.audit.ledger import EMBEDDINGS, SCORED
from clipflow_ray.audit.record import AuditIdentity, AuditRecord, Timing
from clipflow_ray.audit.run import judged_run, made_by, usable_calibration
from clipflow_ray.config import RescoreConfig
from clipflow_ray.data import resources
from clipflow_ray.data.scoring import embedding_columns, scored
from clipflow_ray.errors import ClipflowError, EncoderMismatchError, InputError
from clipflow_ray.model.checkpoint import Checkpoint, load_checkpoint
from clipflow_ray.model.extractor import F32, joined
from clipflow_ray.model.scorer import Scorer
from clipflow_ray.place import Place, settled
from clipflow_ray.runs.folder import Run
from clipflow_ray.runs.lease import exclusive
from clipflow_ray.runs.record import RunRecord

log = logging.getLogger(__name__)

_FILES_PER_TASK: Final = 8


def rescore(config: RescoreConfig) -> AuditRecord:
    """Write an audit of the images of `config.audit`, scored by `config.checkpoint`, and return its record.

    The embeddings are of float16, so scores differ a little from those of an audit of the images. The calibration is
    that of the precision at which the audit encoded. An interrupted run
    continues, and a finished one is returned as it is. Raises InputError if the audit is not finished or did not keep
    the embeddings that the checkpoint needs, and EncoderMismatchError if they are of another encoder.
    """
    config = settled(config, "audit", *(["output"] if config.output else []))
    loaded = load_checkpoint(Place.at(config.checkpoint, config.s3))
    source = Run(Place.at(config.audit, config.s3))
    record = source.completed(AuditRecord)
    if record is None:
        raise InputError(f"{config.audit} holds no finished audit; run or repeat `clipflow-ray audit` first.")
    alpha = record.alpha if config.alpha is None else config.alpha
    checkpoint = loaded.of_encoder(record.identity.encoder_fingerprint)
    calibration = usable_calibration(checkpoint, alpha)
    ids = made_by(checkpoint, calibration)
    _check_embeddings(source, record, checkpoint)
    default = source.place / "rescored" / f"{ids['model_id']}-{ids['calibration_id']}"
    run = Run(Place.at(config.output, config.s3) if config.output else default)
    identity = record.identity.model_copy(update={**ids, "keep_embeddings": False, "rescored_from": source.place.uri})
    with exclusive(run.place):
        finished = run.completed(AuditRecord, identity)
        if finished is not None and finished.alpha == alpha:
            log.info("this audit is already rescored")
            return finished
        settings = record.config.model_copy(
            update={
                "output": run.place.uri,
                "checkpoint": config.checkpoint,
                "precision": checkpoint.encoder.precision,
                "alpha": alpha,
                "dedupe": record.dedupe,
                "cap_prone_strata": record.cap_prone_strata,
                "s3": config.s3,
                "keep_embeddings": False,
                "gallery": 0,
            }
        )
        begun = run.begin(RunRecord[AuditIdentity], identity, lambda: record.manifest_rows)
        timing = finished.timing if finished else _score(source, run, checkpoint, begun.manifest_rows)
        return judged_run(run, begun, settings, timing, calibration)


def _check_embeddings(source: Run, record: AuditRecord, checkpoint: Checkpoint) -> None:
    """Raise InputError or EncoderMismatchError if the audit does not hold the embeddings that the checkpoint needs."""
    if not record.identity.keep_embeddings:
        raise InputError(
            f"{source.place.uri} keeps no embeddings. Audit the images with --keep-embeddings into another output."
        )
    if record.identity.encoder_fingerprint != checkpoint.encoder_fingerprint:
        raise EncoderMismatchError(
            f"The embeddings are of encoder {record.identity.encoder_fingerprint}, the checkpoint needs "
            f"{checkpoint.encoder_fingerprint}. Audit the images again with this checkpoint."
        )
    files = source.files(EMBEDDINGS)
    if set(source.files(SCORED)) != set(files):
        raise InputError(f"Some embeddings of {source.place.uri} were deleted. Audit the images again.")
    kept = (source.place / EMBEDDINGS).parquet(files[:1]).schema.names if files else []
    missing = [name for name in embedding_columns(checkpoint) if name not in kept]
    if missing:
        raise InputError(
            f"{source.place.uri} keeps {', '.join(kept[1:]) or 'nothing'}, but the checkpoint needs "
            f"{', '.join(missing)} too. Audit the images again with this checkpoint."
        )


def _score(source: Run, run: Run, checkpoint: Checkpoint, rows: int) -> Timing:
    """Write `scored/` of `run`: a file for each file of `source`, in tasks that write each file at once."""
    done = set(run.files(SCORED))
    names = [name for name in source.files(SCORED) if name not in done]
    left = rows - run.rows(SCORED)
    log.info("scoring the embeddings of %d of %d objects", left, rows)
    start = time.monotonic()
    if names:
        resources.connect()
        files = ray.data.from_arrow(pa.table({"name": names})).repartition(-(-len(names) // _FILES_PER_TASK))
        arguments = {"source": source, "run": run, "checkpoint": checkpoint}
        stage: Any = _rescore_files  # Ray Data's annotation allows no keyword arguments besides the batch
        files.map_batches(stage, batch_format="pyarrow", batch_size=None, fn_kwargs=arguments).materialize()
    total = run.rows(SCORED)
    if total != rows:
        raise ClipflowError(
            f"{run.place.uri} has {total} rows for {rows} objects. Keep the folder and report this error."
        )
    seconds = time.monotonic() - start
    return Timing(seconds=seconds, objects=left, objects_per_second=left / seconds)


def _rescore_files(batch: pa.Table, source: Run, run: Run, checkpoint: Checkpoint) -> pa.Table:
    """Names of files of scores -> the same names; writes the file of each name with the checkpoint's scores."""
    torch.set_num_threads(1)
    # The rounding of the embeddings is far larger than that of single precision.
    scorer = Scorer(checkpoint, torch.device("cpu"), torch.float32)
    for name in batch["name"].to_pylist():
        table = (source.place / SCORED / name).read_parquet()
        kept = (source.place / EMBEDDINGS / name).read_parquet()
        (run.place / SCORED / name).write_parquet(_rescored(table, kept, checkpoint, scorer))
    return batch


def _rescored(table: pa.Table, kept: pa.Table, checkpoint: Checkpoint, scorer: Scorer) -> pa.Table:
    """Rows of `scored/` and their embeddings, in any order -> the rows with new scores."""
    kept = kept.take(pc.index_in(table["row_id"], kept["row_id"]))
    columns = embedding_columns(checkpoint)
    present = kept[next(iter(columns))].is_valid().to_numpy().astype(bool)
    rows = kept.filter(pa.array(present))
    embeddings = {name: _matrix(rows[name], kind.list_size) for name, kind in columns.items()}
    scores = scorer(joined(embeddings, checkpoint.segments)) if present.any() else None
    return scored(table, present, scores, scorer.calibration)


def _matrix(column: pa.ChunkedArray, width: int) -> F32:
    """A column of lists of float16 without nulls -> float32 [N, width]."""
    values: F32 = column.combine_chunks().flatten().to_numpy().astype(np.float32)
    return values.reshape(-1, width)
