"""Rescoring a finished audit over a bare loop of the flow."""

import hashlib
import tempfile
import time
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from pydantic import Field

from clipflow_ray.audit.ledger import EMBEDDINGS, SCORED
from clipflow_ray.audit.record import AuditRecord
from clipflow_ray.audit.rescore import rescore
from clipflow_ray.audit.run import audit
from clipflow_ray.config import DEFAULT_CHECKPOINT, AuditConfig, RescoreConfig
from clipflow_ray.data import resources
from clipflow_ray.lab.benchmark.common import BATCH, Benchmark, interleaved, jpegs
from clipflow_ray.model.checkpoint import load_checkpoint
from clipflow_ray.model.scorer import Scorer

_ROWS_PER_FILE: Final = 1024


class RescoreBenchmark(Benchmark):
    """Scoring kept embeddings over a bare loop of the flow, both by the packaged checkpoint."""

    rows: int = Field(description="Rows of the audit.")
    whole: float = Field(description="Rows per second of the rescoring with its start-up, ledger and report.")


def rescoring(rows: int, rounds: int) -> RescoreBenchmark:
    """Rows per second of scoring in `rescore`, start-up included, over those of the flow on ready embeddings.

    The audit's files are made of one small audit, whose rows are repeated under other ids. The loop has all cores.
    """
    checkpoint = load_checkpoint(DEFAULT_CHECKPOINT)
    torch.set_num_threads(resources.cores())
    scorer = Scorer(checkpoint, torch.device("cpu"), torch.float32)
    embeddings = np.random.default_rng(0).normal(size=(_ROWS_PER_FILE, sum(checkpoint.widths))).astype(np.float32)
    whole: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        run = _finished_audit(Path(folder), rows)
        resources.connect()

        def ours(_: int) -> float:
            start = time.perf_counter()
            record = rescore(RescoreConfig(audit=run, output=tempfile.mkdtemp(dir=folder)))
            whole.append(rows / (time.perf_counter() - start))
            return record.timing.objects_per_second

        def bare(_: int) -> float:
            start = time.perf_counter()
            for _ in range(8):
                scorer(embeddings)
            return 8 * _ROWS_PER_FILE / (time.perf_counter() - start)

        result = interleaved("rescore", ours, bare, rounds)
    ray.shutdown()
    return RescoreBenchmark(**dict(result), rows=rows, whole=float(np.median(whole)))


def _finished_audit(folder: Path, rows: int) -> str:
    """Write the folder of a finished audit of `rows` objects, and return its path."""
    images, run = folder / "images", folder / "run"
    images.mkdir()
    for at, data in enumerate(jpegs(BATCH)):
        (images / f"{at}.jpg").write_bytes(data)
    record = audit(AuditConfig(input=(str(images),), output=str(run), gallery=0, keep_embeddings=True))
    small = {name: pq.read_table(run / name).sort_by("row_id") for name in (SCORED, EMBEDDINGS)}
    for name in small:
        for path in (run / name).iterdir():
            path.unlink()
    for start in range(0, rows, _ROWS_PER_FILE):
        numbers = range(start, min(rows, start + _ROWS_PER_FILE))
        ids = pa.array([hashlib.md5(str(at).encode()).hexdigest() for at in numbers])
        for name, table in small.items():
            repeated = table.take([at % len(table) for at in numbers])
            repeated = repeated.set_column(repeated.schema.get_field_index("row_id"), "row_id", ids)
            if name == SCORED:
                digests = pa.array([each.as_py() * 2 for each in ids])
                repeated = repeated.set_column(repeated.schema.get_field_index("sha256"), "sha256", digests)
            pq.write_table(repeated, run / name / f"{start:09d}.parquet", use_dictionary=name == SCORED)
    changed: AuditRecord = record.model_copy(update={"manifest_rows": rows, "rows": rows})
    (run / "run.json").write_text(changed.model_dump_json())
    return str(run)
