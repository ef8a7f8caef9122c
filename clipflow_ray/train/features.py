"""Embeddings of natural views and of proxies, encoded once, stored as parquet and reused by later trainings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from clipflow_ray import __version__, proxies
from clipflow_ray.config import ProxyConfig, TrainConfig, stable_hash
from clipflow_ray.data import resources
from clipflow_ray.data.pipeline import read_then_encode
from clipflow_ray.data.scoring import Embed
from clipflow_ray.errors import TrainingError
from clipflow_ray.inputs.listing import listing_hash
from clipflow_ray.inputs.manifest import write_manifest
from clipflow_ray.model.encoder import feature_widths, fingerprint
from clipflow_ray.model.weights import load_record
from clipflow_ray.place import Place, places
from clipflow_ray.runs.folder import MANIFEST, Run
from clipflow_ray.runs.record import RunRecord
from clipflow_ray.train.record import FeaturesIdentity, FeaturesRecord
from clipflow_ray.train.views import read_and_distort

F32 = NDArray[np.float32]

PARTS: Final = "embeddings"
_ENCODE_ROWS: Final = 8


@dataclass(frozen=True)
class Features:
    """Embeddings of N views, float32 [N, D], and what each view is, [N] each.

    `row_id`, `group` and `stratum` are those of the image. `family` is `natural` for a natural view, else the proxy
    family. `view` numbers the natural views of an image from 0, and 0 is the view that inference uses. A proxy has the
    number of the natural view with which it was made.
    """

    embedding: F32
    row_id: NDArray[np.str_]
    group: NDArray[np.str_]
    stratum: NDArray[np.str_]
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
    stored = tuple(dict.fromkeys((*config.encoder.feature, *config.extra_features)))
    tower = load_record(config.encoder)
    feature_widths(config.encoder, tower, stored)  # a feature that the tower lacks is refused here
    encoder_fingerprint = fingerprint(config.encoder, tower)
    identity = FeaturesIdentity(
        input=config.input,
        inventory=config.inventory,
        listing=listing_hash(inputs, config.inventory),
        encoder_fingerprint=encoder_fingerprint,
        proxies=config.proxies,
        calibration=tuple(sorted(config.split.calibration)),
        limits=config.limits,
        tool_version=__version__,
        features=stored,
    )
    run = _reusable(config, stable_hash(identity.model_dump(mode="json", exclude={"features"})), stored)
    if run.finished:
        return run

    def list_inputs() -> int:
        return write_manifest(inputs, run.place / MANIFEST, config.inventory)

    begun = run.begin(RunRecord[FeaturesIdentity], identity, list_inputs)
    plan = resources.plan_scoring(begun.manifest_rows, _ENCODE_ROWS)

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
                "spec": tower.view,
                "config": config.proxies,
                "plain_groups": config.split.calibration,
                "options": config.inventory,
            },
            Embed,
            {"encoder": config.encoder, "features": stored, "fingerprint": encoder_fingerprint},
        ),
        begun.manifest_rows,
    )
    status = run.table(PARTS).to_table(columns=["status", "error_code"])
    errors = int(np.sum(status["status"].to_numpy() == "error"))
    run.succeed(FeaturesRecord(identity=identity, manifest_rows=begun.manifest_rows, errors=errors))
    return run


def load(run: Run, feature: Sequence[str], config: ProxyConfig) -> Features:
    """Load the named features of a finished run, concatenated and sorted by row id.

    Raises TrainingError if the run has no readable image.
    """
    columns = ["row_id", "group", "stratum", "families", *feature]
    table = run.table(PARTS).to_table(columns=columns).sort_by("row_id")
    counts = np.array([len(names) for names in table["families"].to_pylist()])
    total = int(counts.sum())
    if total == 0:
        raise TrainingError("No input image could be read. The column `error_code` of the embeddings says why.")
    parts = [table[name].combine_chunks().flatten().to_numpy().reshape(total, -1) for name in feature]
    families = np.array([name for names in table["families"].to_pylist() for name in names])
    first = np.concatenate([np.arange(count) for count in counts])
    return Features(
        embedding=np.concatenate(parts, axis=1),
        row_id=np.repeat(np.array(table["row_id"].to_pylist()), counts),
        group=np.repeat(np.array(table["group"].to_pylist()), counts),
        stratum=np.repeat(np.array([name or "" for name in table["stratum"].to_pylist()]), counts),
        family=families,
        view=first // (1 + config.proxies_per_view),
    )


def widths(run: Run, feature: Sequence[str]) -> tuple[int, ...]:
    """The width of each named feature in a finished run."""
    table = run.table(PARTS).to_table(columns=["families", *feature], filter=pc.field("status") == "ok").slice(0, 1)
    views = len(table["families"][0])
    return tuple(len(table[name][0]) // views for name in feature)


def _reusable(config: TrainConfig, key: str, stored: tuple[str, ...]) -> Run:
    """Return a finished run under the output that stores at least these features, else a new run."""
    root = Place.at(config.output, config.s3) / "features"
    for name in root.names():
        run = Run(root / name)
        record = run.completed(FeaturesRecord) if name.startswith(key) else None
        if record is not None and set(stored) <= set(record.identity.features):
            return run
    return Run(root / f"{key}-{stable_hash(','.join(stored))[:4]}")
