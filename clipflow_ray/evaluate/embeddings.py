"""Embeddings of labelled images, as found, re-encoded and distorted: encoded once, stored and reused."""

import logging
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from numpy.typing import NDArray

from clipflow_ray.columns import manifest_table
from clipflow_ray.config import CalibrateConfig, EvaluateConfig, ImageLimits, InventoryOptions, Segment, stable_hash
from clipflow_ray.data import resources
from clipflow_ray.data.pipeline import read_then_encode
from clipflow_ray.data.scoring import Embed
from clipflow_ray.evaluate.record import DistortionsIdentity, DistortionsRecord, VariantsIdentity, VariantsRecord
from clipflow_ray.evaluate.views import CASES, DRAW, VARIANTS, read_distorted, read_variants
from clipflow_ray.inputs import listing
from clipflow_ray.inputs.format import MissingColumnError, Row
from clipflow_ray.model.checkpoint import Checkpoint
from clipflow_ray.model.detector import Detector
from clipflow_ray.place import Place, places
from clipflow_ray.runs.folder import MANIFEST, Run
from clipflow_ray.runs.record import FinishedRecord, IdentityT

log = logging.getLogger(__name__)

F32 = NDArray[np.float32]

EMBEDDINGS: Final = "embeddings"
GENERATED: Final = "generated"
_ENCODE_ROWS: Final = 16
_DISTORT_ROWS: Final = 4  # a row holds one view for each distortion


def variants(config: EvaluateConfig, detector: Detector) -> Run:
    """Encode every image in every variant, and return the finished run.

    The column `generated` of its rows says under which of the two kinds of inputs an image was listed.
    """
    natural, generated = (places(uris, config.s3) for uris in (config.natural, config.generated))
    identity = VariantsIdentity(
        encoder_fingerprint=detector.encoder.fingerprint,
        segments=detector.checkpoint.outputs,
        natural=config.natural,
        generated=config.generated,
        inventory=config.inventory,
        listing=stable_hash(
            *(listing.listing_hash(_class_rows(inputs, config.inventory)[0]) for inputs in (natural, generated))
        ),
        variants=VARIANTS,
    )
    run = Run(Place.at(config.output, config.s3) / "evaluation")

    def list_inputs() -> int:
        listing.check_apart([*natural, *generated], run.place)
        listed = labelled(natural, generated, config.inventory)
        (run.place / MANIFEST / "part-0.parquet").write_parquet(listed)
        return len(listed)

    encode(run, VariantsRecord, identity, list_inputs, read_variants, _ENCODE_ROWS, detector.checkpoint, config)
    return run


def labelled(natural: Sequence[Place], generated: Sequence[Place], options: InventoryOptions) -> pa.Table:
    """The manifest rows of both classes, with a column `generated`.

    A natural input may hold a generated one, or list some of its images: what is listed under both is generated. The
    inputs of one class may lack the column of groups that the user has named. Raises InputError if both do, or if an
    input cannot be listed.
    """
    positive, lacking = _class_rows(generated, options)
    listed, lacking_too = _class_rows(natural, options)
    if lacking and lacking_too:
        raise lacking
    # The generated inputs themselves are in this set because a natural folder lists the tables and tars that it holds.
    taken = {(row["uri"], row["member"]) for row in positive} | {(place.uri, "") for place in generated}
    negative = [row for row in listed if (row["uri"], row["member"]) not in taken]
    labels = np.repeat([False, True], [len(negative), len(positive)])
    return manifest_table([*negative, *positive]).append_column(GENERATED, pa.array(labels))


def _class_rows(inputs: Sequence[Place], options: InventoryOptions) -> tuple[list[Row], MissingColumnError | None]:
    """The manifest rows of one class; if its inputs lack the named column of groups, without it, and the error."""
    try:
        return [*listing.rows(inputs, options)], None
    except MissingColumnError as error:
        if error.column != options.group_column:
            raise
        unnamed = options.model_copy(update={"group_column": InventoryOptions().group_column})
        return [*listing.rows(inputs, unnamed)], error


def distortions(config: EvaluateConfig, source: Run, draws: dict[str, int], detector: Detector) -> Run:
    """Encode the images of `draws` (row id -> draw) after every distortion, and return the finished run.

    `source` is the finished run of `variants` that lists the images.
    """
    listed = source.completed(VariantsRecord)
    assert listed is not None  # `variants` returns a finished run
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

    encode(run, DistortionsRecord, identity, sample, read_distorted, _DISTORT_ROWS, detector.checkpoint, config)
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


def encode(
    run: Run,
    kind: type[FinishedRecord[IdentityT]],
    identity: IdentityT,
    make_manifest: Callable[[], int],
    read: Callable[..., pa.Table],
    batch_size: int,
    checkpoint: Checkpoint,
    config: EvaluateConfig | CalibrateConfig,
) -> None:
    """Encode the rows of a manifest by the encoder of `checkpoint`, for its outputs, unless the run is finished.

    `read` is the function of the tasks that read and decode; see `read_then_encode`. `config` says how the rows were
    listed, and on what they are encoded. Raises RunConflictError if the folder holds a run of another identity.
    """
    if run.completed(kind, identity) is not None:
        return
    rows = run.begin(kind, identity, make_manifest).manifest_rows
    finished = run.committed(EMBEDDINGS)
    plan = resources.plan_scoring(rows - finished, batch_size, config.pool, resumed=finished > 0)
    log.info("encoding with %s", plan.in_words)
    run.write(
        EMBEDDINGS,
        lambda manifest: read_then_encode(
            manifest,
            plan,
            batch_size,
            read,
            {"near": run.place, "limits": ImageLimits(), "spec": checkpoint.view, "options": config.inventory},
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
