"""The whole training: encode, fit, calibrate, and write one checkpoint directory."""

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import numpy as np
import torch
from torch import Tensor

from clipflow_ray import __version__
from clipflow_ray.config import TrainConfig, stable_hash
from clipflow_ray.data import resources
from clipflow_ray.errors import ConfigError
from clipflow_ray.model.calibration import Calibration
from clipflow_ray.model.checkpoint import Checkpoint, save_checkpoint
from clipflow_ray.model.encoder import fingerprint, resolved, view_of, widths_of
from clipflow_ray.model.flow import Flow
from clipflow_ray.model.record import TrainingRecord
from clipflow_ray.model.weights import load_record
from clipflow_ray.place import Place, places, settled
from clipflow_ray.train import features, fit
from clipflow_ray.train.probes import fit_probes
from clipflow_ray.train.record import FeaturesRecord
from clipflow_ray.train.split import Split, split

log = logging.getLogger(__name__)

_MAX_BANK_BYTES: Final = 4_000_000  # a checkpoint should stay below 10 MB


@dataclass(frozen=True)
class Trained:
    """URI of the checkpoint, its model id, and the metrics of the chosen epoch."""

    checkpoint: str
    model_id: str
    metrics: dict[str, float]


def train(config: TrainConfig) -> Trained:
    """Train on the natural images of `config.input` and write `<output>/checkpoint`.

    A repeated call with the same config continues an interrupted training. Raises ClipflowError.
    """
    if not config.input:
        raise ConfigError("Name at least one --input with natural images.")
    config = settled(config, "input", "output")
    tower = load_record(config.encoder)
    segments = resolved(config.segments, config.encoder, tower)
    widths, view = widths_of(segments, config.encoder, tower), view_of(segments, tower)
    config = config.model_copy(update={"segments": segments})
    resources.connect()
    log.info("encoding natural views and proxies for %s", ", ".join(segment.name for segment in segments))
    run = features.extract(config)
    data = split(features.load(run, segments, config.proxies), config.split)
    log.info("fitting the flow on %d natural views and %d proxies", len(data.natural), len(data.proxy))
    fitted = fit.fit(config, run, widths)
    state = {name: t.half() if t.is_floating_point() else t for name, t in fitted.flow_state.items()}
    flow = Flow(widths, config.flow)
    flow.load_state_dict(state)  # the checkpoint stores these rounded weights, so calibrate with them
    calibration = torch.from_numpy(data.calibration.embedding).double()
    flow.eval().double().fit_scale(calibration)
    state |= {"centre": flow.centre.float(), "spread": flow.spread.float()}
    flow.load_state_dict(state)
    with torch.inference_mode():
        scores = flow(calibration).score.float().numpy()
    record = run.completed(FeaturesRecord)
    assert record is not None  # `extract` returns a finished run
    checkpoint = Checkpoint(
        encoder=config.encoder,
        encoder_fingerprint=fingerprint(config.encoder, tower, view.sizes),
        view=view,
        segments=segments,
        widths=widths,
        flow_config=config.flow,
        flow_state=state,
        limits=config.limits,
        objective=config.objective,
        proxies=config.proxies,
        calibration=Calibration.fit(scores, data.calibration.stratum.tolist(), data.calibration.group.tolist()),
        reference=_reference(flow.float(), data),
        training=_summary(config, data, fitted, record),
    )
    place = Place.at(config.output, config.s3) / "checkpoint"
    save_checkpoint(checkpoint, place)
    return Trained(place.uri, checkpoint.model_id, fitted.metrics)


def _summary(config: TrainConfig, data: Split, fitted: fit.Fitted, record: FeaturesRecord) -> TrainingRecord:
    """How the checkpoint was made. Inputs are named by their last component, so no path of this machine is kept."""
    parts = vars(data)
    return TrainingRecord(
        input=tuple(place.name for place in places(config.input, config.s3)),
        listing=record.identity.listing,
        objects=record.manifest_rows,
        unreadable=record.errors,
        config_hash=stable_hash(config.fit, config.flow, config.objective, config.proxies, config.split),
        fit=config.fit,
        split=config.split,
        split_by=record.identity.parts.by,
        views={name: len(part) for name, part in parts.items()},
        images={name: len(np.unique(part.row_id)) for name, part in parts.items()},
        sources={name: tuple(sorted(map(str, np.unique(part.group)))) for name, part in parts.items()},
        metrics=fitted.metrics,
        history=tuple(fitted.history),
        tool_version=__version__,
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _reference(flow: Flow, data: Split) -> dict[str, Tensor]:
    """The natural embeddings and the probes from which `evaluate` makes its baselines."""
    rng = np.random.default_rng(0)
    bank = data.natural.embedding
    most = _MAX_BANK_BYTES // (2 * bank.shape[1])
    if len(bank) > most:
        bank = bank[np.sort(rng.choice(len(bank), most, replace=False))]
    return {"natural": torch.from_numpy(bank).half(), **fit_probes(flow, data.natural.embedding, data.proxy.embedding)}
