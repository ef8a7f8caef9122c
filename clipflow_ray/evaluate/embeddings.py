"""Embeddings of labelled images, as found, format-aligned and distorted: encoded once, stored and reused."""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from numpy.typing import NDArray

from clipflow_ray.config import EvaluateConfig, Segment
from clipflow_ray.data import resources
from clipflow_ray.data.pipeline import read_then_encode
from clipflow_ray.data.scoring import Embed
from clipflow_ray.evaluate.record import DistortionsIdentity, DistortionsRecord, VariantsIdentity, VariantsRecord
from clipflow_ray.evaluate.views import CASES, DRAW, VARIANTS, read_both, read_distorted
from clipflow_ray.inputs.listing import listing_hash
from clipflow_ray.inputs.manifest import write_manifest
from clipflow_ray.model.detector import Detector
from clipflow_ray.place import Place
from clipflow_ray.runs.folder import MANIFEST, Run
from clipflow_ray.runs.record import FinishedRecord, IdentityT

F32 = NDArray[np.float32]

EMBEDDINGS: Final = "embeddings"
_ENCODE_ROWS: Final = 16
_DISTORT_ROWS: Final = 4  # a row holds one view for each distortion


def both_variants(config: EvaluateConfig, inputs: Sequence[Place], detector: Detector) -> Run:
    """Encode every image as found and format-aligned, and return the finished run."""
    identity = VariantsIdentity(
        encoder_fingerprint=detector.encoder.fingerprint,
        segments=detector.checkpoint.outputs,
        input=tuple(place.uri for place in inputs),
        listing=listing_hash(inputs),
        variants=VARIANTS,
    )
    run = Run(Place.at(config.output, config.s3) / "evaluation")

    def list_inputs() -> int:
        return write_manifest(inputs, run.place / MANIFEST)

    _encoded(run, VariantsRecord, identity, list_inputs, read_both, _ENCODE_ROWS, detector)
    return run


def distortions(config: EvaluateConfig, source: Run, draws: dict[str, int], detector: Detector) -> Run:
    """Encode the images of `draws` (row id -> draw) after every distortion, and return the finished run.

    `source` is the finished run of `both_variants` that lists the images.
    """
    listed = source.completed(VariantsRecord)
    assert listed is not None  # `both_variants` returns a finished run
    identity = DistortionsIdentity(
        encoder_fingerprint=detector.encoder.fingerprint,
        segments=detector.checkpoint.outputs,
        listing=listed.identity.listing,
        cases=tuple(f"{name} {level:g}" for name, level in CASES),
        draws=draws,
    )
    run = Run(Place.at(config.output, config.s3) / f"robustness-{config.robustness}")

    def sample() -> int:
        rows = source.table(MANIFEST).to_table(filter=pads.field("row_id").isin(list(draws)))
        rows = rows.append_column(DRAW, pa.array([draws[row] for row in rows["row_id"].to_pylist()], pa.int64()))
        (run.place / MANIFEST / "part-0.parquet").write_parquet(rows)
        return len(rows)

    _encoded(run, DistortionsRecord, identity, sample, read_distorted, _DISTORT_ROWS, detector)
    return run


def readable(run: Run) -> pa.Table:
    """Return the rows of a finished run that have embeddings, sorted by row id."""
    table = run.table(EMBEDDINGS).to_table().sort_by("row_id")
    return table.filter(pc.equal(table["status"], "ok"))


def embeddings_of(rows: pa.Table, segments: Sequence[Segment], views: int) -> F32:
    """Return float32 [views, N, D] of N readable rows: the outputs of the segments, concatenated."""
    columns = [rows[each.output].combine_chunks().flatten().to_numpy() for each in segments]
    parts = [column.reshape(len(rows), views, -1) for column in columns]
    return np.ascontiguousarray(np.concatenate(parts, axis=2).swapaxes(0, 1))


def _encoded(
    run: Run,
    kind: type[FinishedRecord[IdentityT]],
    identity: IdentityT,
    make_manifest: Callable[[], int],
    read: Callable[..., pa.Table],
    batch_size: int,
    detector: Detector,
) -> None:
    if run.completed(kind, identity) is not None:
        return
    rows = run.begin(kind, identity, make_manifest).manifest_rows
    plan, checkpoint = resources.plan_scoring(rows, batch_size), detector.checkpoint
    run.write(
        EMBEDDINGS,
        lambda manifest: read_then_encode(
            manifest,
            plan,
            batch_size,
            read,
            {"near": run.place, "limits": checkpoint.limits, "spec": checkpoint.view},
            Embed,
            {
                "encoder": checkpoint.encoder,
                "segments": checkpoint.outputs,
                "fingerprint": checkpoint.encoder_fingerprint,
            },
        ),
        rows,
    )
    run.succeed(kind(identity=identity, manifest_rows=rows))
