"""The rate of what follows scoring: ledger and report of many rows, over those of an eighth of them."""

import hashlib
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from clipflow_ray.audit.ledger import LEDGER, SCORED
from clipflow_ray.audit.record import AuditIdentity, Timing
from clipflow_ray.audit.run import judged_run, made_by
from clipflow_ray.columns import MANIFEST_SCHEMA, SCORED_SCHEMA
from clipflow_ray.config import DEFAULT_CHECKPOINT, AuditConfig
from clipflow_ray.lab.benchmark.common import Benchmark, interleaved
from clipflow_ray.model.checkpoint import Checkpoint, load_checkpoint
from clipflow_ray.place import Place
from clipflow_ray.runs.folder import MANIFEST, Run
from clipflow_ray.runs.record import RunRecord

_ROWS_PER_FILE: Final = 1024
_ROWS_AT_ONCE: Final = 64 * _ROWS_PER_FILE
_GROUPS: Final = 40
_STRATA: Final = ("jpeg|512-1024", "jpeg|1024-2048", "png|0-256")


class FinalizeBenchmark(Benchmark):
    """Rows per second from scores to a ledger and a report, over those of an eighth of the rows."""

    rows: int = Field(description="Rows of the audit.")
    scored_files: int = Field(description="Files of scores, of 1,024 rows each.")
    ledger_files: int = Field(description="Files of the ledger.")
    ledger_bytes_per_row: float = Field(description="Bytes of the ledger's files for each row.")
    start_mib: int = Field(description="Peak memory of this process before it finalized, in MiB.")
    peak_mib: int = Field(description="Peak memory of this process, in MiB. No other process takes part.")


def finalizing(rows: int, rounds: int) -> FinalizeBenchmark:
    """Rows per second of ledger and report of `rows` synthetic scores, over those of an eighth of them.

    A ratio of 1 means that the time grows linearly with the rows. One row in ten has the bytes of another one, and one
    in a hundred is an error. The rows are in random order, which is the worst case for the sorting of the ledger.
    """
    checkpoint = load_checkpoint(DEFAULT_CHECKPOINT)
    with tempfile.TemporaryDirectory() as folder:
        whole = _scored(Path(folder) / "whole", rows, checkpoint)
        eighth = _scored(Path(folder) / "eighth", rows // 8, checkpoint)
        start = _peak_mib()
        ours, theirs = _measured(whole, rows, checkpoint), _measured(eighth, rows // 8, checkpoint)
        theirs(0)
        result = interleaved("finalize", ours, theirs, rounds)
        ledger = list((Path(whole.place.uri) / LEDGER).iterdir())
        return FinalizeBenchmark(
            **dict(result),
            rows=rows,
            scored_files=len(whole.files(SCORED)),
            ledger_files=len(ledger),
            ledger_bytes_per_row=sum(map(os.path.getsize, ledger)) / rows,
            start_mib=start,
            peak_mib=_peak_mib(),
        )


def _measured(run: Run, rows: int, checkpoint: Checkpoint) -> Callable[[int], float]:
    calibration = checkpoint.calibration
    assert calibration is not None
    config = AuditConfig(input=(f"{run.place.uri}/images",), output=run.place.uri, dedupe="sha256")
    identity = AuditIdentity(
        input=config.input,
        encoder_fingerprint=checkpoint.encoder_fingerprint,
        inventory=config.inventory,
        limits=config.limits,
        sample=1.0,
        **made_by(checkpoint, calibration),
    )
    begun = RunRecord[AuditIdentity](identity=identity, manifest_rows=rows)

    def measured(_: int) -> float:
        start = time.perf_counter()
        judged_run(run, begun, config, Timing(seconds=1.0, objects=rows, objects_per_second=rows), calibration)
        return rows / (time.perf_counter() - start)

    return measured


def _scored(folder: Path, rows: int, checkpoint: Checkpoint) -> Run:
    """Write manifest and scores of an audit of `rows` objects, a few at a time."""
    for name in (MANIFEST, SCORED):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    numbers = rng.permutation(rows)
    for start in range(0, rows, _ROWS_AT_ONCE):
        table = _rows(numbers[start : start + _ROWS_AT_ONCE], rows, f"{folder}/images", checkpoint, rng)
        listed = table.append_column("input_format", pa.repeat("images", len(table)))
        nothing, known = pa.nulls(len(table)), set(listed.column_names)
        columns = {name: listed[name] if name in known else nothing for name in MANIFEST_SCHEMA.names}
        manifest = pa.table(columns).cast(MANIFEST_SCHEMA)
        pq.write_table(manifest, folder / MANIFEST / f"part-{start:010d}.parquet")
        for at in range(0, len(table), _ROWS_PER_FILE):
            pq.write_table(table.slice(at, _ROWS_PER_FILE), folder / SCORED / f"{start + at:010d}.parquet")
    return Run(Place.at(folder))


def _rows(numbers: Any, rows: int, images: str, checkpoint: Checkpoint, rng: np.random.Generator) -> pa.Table:
    """The rows of the objects with these numbers, int64 [N]."""
    calibration, count, listed = checkpoint.calibration, len(numbers), numbers.tolist()
    assert calibration is not None
    bad = rng.random(count) < 0.01
    scores = rng.choice(calibration.scores, count) + rng.normal(0.0, 0.1, count).astype(np.float32)
    floats = ("log_likelihood", "log_base", "log_det")
    columns: dict[str, Any] = {
        "row_id": [hashlib.md5(b"%d" % at).hexdigest() for at in listed],
        "sha256": [hashlib.sha256(b"%d" % (at - (at % 10 == 9))).hexdigest() for at in listed],
        "uri": [f"{images}/{at * _GROUPS // rows:02d}/{at // 1000:07d}/{at:010d}.jpg" for at in listed],
        "member": [""] * count,
        "group": [f"{at * _GROUPS // rows:02d}" for at in listed],
        "bytes": rng.integers(10_000, 1_000_000, count),
        "status": np.where(bad, "error", "ok").tolist(),
        "error_code": pa.array(["truncated"] * count, mask=~bad),
        "error_message": pa.array(["The file ends before its end marker."] * count, mask=~bad),
        "stratum": pa.array(rng.choice(_STRATA, count).tolist(), mask=bad),
        "format": pa.array(["JPEG"] * count, mask=bad),
        "mode": pa.array(["RGB"] * count, mask=bad),
        "width": pa.array(rng.integers(200, 4000, count), mask=bad),
        "height": pa.array(rng.integers(200, 4000, count), mask=bad),
        "jpeg_quality": pa.array(rng.integers(50, 100, count), mask=bad),
        "score": pa.array(scores, mask=bad),
        "p_value": pa.array(calibration.p_value(scores), mask=bad),
        **{name: pa.array(rng.normal(size=count).astype(np.float32), mask=bad) for name in floats},
        "scored_at": [f"2026-01-01T{at // 60 % 24:02d}:{at % 60:02d}:00+00:00" for at in range(count)],
    }
    known = {name: columns.get(name, pa.nulls(count)) for name in SCORED_SCHEMA.names}
    return pa.table({name: pa.array(values).cast(SCORED_SCHEMA.field(name).type) for name, values in known.items()})


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
