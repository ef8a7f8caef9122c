"""Embeddings of natural views and of proxies, encoded once, stored as parquet and reused by later trainings."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from clipflow_ray import __version__, proxies
from clipflow_ray.config import ProxyConfig, Segment, TrainConfig, stable_hash
from clipflow_ray.data import resources
from clipflow_ray.data.pipeline import read_then_encode
from clipflow_ray.data.scoring import Embed
from clipflow_ray.errors import TrainingError
from clipflow_ray.inputs.listing import listing_hash, rows
from clipflow_ray.inputs.manifest import write_manifest
from clipflow_ray.model.encoder import fingerprint, resolved, view_of, widths_of
from clipflow_ray.model.weights import load_record
from clipflow_ray.place import Place, places
from clipflow_ray.runs.folder import MANIFEST, Run
from clipflow_ray.runs.record import RunRecord
from clipflow_ray.train.parts import assigned
from clipflow_ray.train.record import FeaturesIdentity, FeaturesRecord
from clipflow_ray.train.views import read_and_distort

log = logging.getLogger(__name__)

F32 = NDArray[np.float32]

PARTS: Final = "embeddings"
_ENCODE_ROWS: Final = 8


@dataclass(frozen=True)
class Features:
    """Embeddings of N views, float32 [N, D], and what each view is, [N] each.

    The columns of a segment are from views that were made for its training, plain or paired. `row_id`, `group`,
    `stratum` and `part` (see `train.parts`) are those of the image. `family` is `natural` for a natural view, else the
    proxy family. `view` numbers the natural views of an image from 0, and 0 is the view that inference uses. A proxy
    has the number of the natural view with which it was made.
    """

    embedding: F32
    row_id: NDArray[np.str_]
    group: NDArray[np.str_]
    stratum: NDArray[np.str_]
    part: NDArray[np.str_]
    family: NDArray[np.str_]
    view: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.embedding)

    def where(self, mask: NDArray[np.bool_]) -> "Features":
        """The rows that `mask` [N] selects."""
        return Features(**{name: values[mask] for name, values in vars(self).items()})


def extract(config: TrainConfig) -> Run:
    """Encode the views of the inputs that are not encoded yet, and return the finished run.

    The name of the run's folder is a hash of all settings that affect the embeddings. A changed setting gets a new
    folder; with equal settings the folder is reused. Raises ResourceError, InputError, WeightsError or ConfigError
    before the encoding starts.
    """
    proxies.check(config.proxies)
    inputs = places(config.input, config.s3)
    tower = load_record(config.encoder)
    wanted = tuple(dict.fromkeys((*config.segments, *config.extra_segments)))
    stored = resolved(wanted, config.encoder, tower)
    widths_of(stored, config.encoder, tower)  # a feature that the tower lacks is refused here
    spec = view_of(stored, tower)
    listed = list(rows(inputs, config.inventory))
    identity = FeaturesIdentity(
        input=config.input,
        inventory=config.inventory,
        listing=listing_hash(listed),
        # Without the sizes, so that a run with more segments can be reused. The segments name their sizes.
        encoder_fingerprint=fingerprint(config.encoder, tower, tower.view.sizes),
        proxies=config.proxies,
        parts=assigned(
            ((row["row_id"], row["group"]) for row in listed if row["problem"] is None),
            config.split,
            config.allow_small,
        ),
        limits=config.limits,
        tool_version=__version__,
        segments=stored,
    )
    run = _reusable(config, stable_hash(identity.model_dump(mode="json", exclude={"segments"})), stored)
    if run.finished:
        return run

    def list_inputs() -> int:
        resources.check_reading()
        return write_manifest(inputs, run.place / MANIFEST, config.inventory)

    begun = run.begin(RunRecord[FeaturesIdentity], identity, list_inputs)
    finished = run.committed(PARTS)
    plan = resources.plan_scoring(begun.manifest_rows - finished, _ENCODE_ROWS, config.pool, resumed=finished > 0)
    log.info("encoding with %s", plan.in_words)

    run.write(
        PARTS,
        lambda manifest: read_then_encode(
            manifest,
            plan,
            _ENCODE_ROWS,
            read_and_distort,
            {
                "near": run.place,
                "limits": config.limits,
                "spec": spec,
                "segments": stored,
                "config": config.proxies,
                "parts": identity.parts,
                "options": config.inventory,
            },
            Embed,
            {
                "encoder": config.encoder,
                "segments": stored,
                "fingerprint": fingerprint(config.encoder, tower, spec.sizes),
            },
        ),
        begun.manifest_rows,
    )
    status = run.table(PARTS).to_table(columns=["status", "error_code"])
    errors = int(np.sum(status["status"].to_numpy() == "error"))
    run.succeed(FeaturesRecord(identity=identity, manifest_rows=begun.manifest_rows, errors=errors))
    return run


def load(run: Run, segments: Sequence[Segment], config: ProxyConfig) -> Features:
    """Load the embeddings of resolved segments from a finished run, concatenated and sorted by row id.

    Raises TrainingError if the run has no readable image.
    """
    names = [segment.name for segment in segments]
    columns = ["row_id", "group", "stratum", "families", *names]
    table = run.table(PARTS).to_table(columns=columns).sort_by("row_id")
    counts = np.array([len(families) for families in table["families"].to_pylist()])
    total = int(counts.sum())
    if total == 0:
        raise TrainingError("No input image could be read. The column `error_code` of the embeddings says why.")
    record = run.completed(FeaturesRecord)
    assert record is not None  # only finished runs are loaded
    ids, groups = table["row_id"].to_pylist(), table["group"].to_pylist()
    parts = [table[name].combine_chunks().flatten().to_numpy().reshape(total, -1) for name in names]
    first = np.concatenate([np.arange(count) for count in counts])
    return Features(
        embedding=np.concatenate(parts, axis=1),
        row_id=np.repeat(np.array(ids), counts),
        group=np.repeat(np.array(groups), counts),
        stratum=np.repeat(np.array([name or "" for name in table["stratum"].to_pylist()]), counts),
        part=np.repeat(record.identity.parts.of(ids, groups), counts),
        family=np.array([family for families in table["families"].to_pylist() for family in families]),
        view=first // (1 + config.proxies_per_view),
    )


def _reusable(config: TrainConfig, key: str, stored: tuple[Segment, ...]) -> Run:
    """Return a finished run under the output that stores at least these segments, else a new run."""
    root = Place.at(config.output, config.s3) / "features"
    for name in root.names():
        run = Run(root / name)
        record = run.completed(FeaturesRecord) if name.startswith(key) else None
        if record is not None and set(stored) <= set(record.identity.segments):
            return run
    return Run(root / f"{key}-{stable_hash(','.join(segment.name for segment in stored))[:4]}")
