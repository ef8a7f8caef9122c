"""The directory format of a trained detector: safetensors and JSON, no pickle.

checkpoint.json          configs, encoder fingerprint, training summary, metrics, sha256 of each tensor file
flow.safetensors         the flow with the naturals' mean and std, stored as float16
calibration.safetensors  scores of held-out naturals and their sources, at the precision of the training
calibration-PRECISION.safetensors  the same at another precision of the encoder
reference.safetensors    natural embeddings (float16) and two probes, for the baselines of `evaluate`
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from clipflow_ray.config import (
    OPENAI_VIEW,
    EncoderConfig,
    FlowConfig,
    ImageLimits,
    ObjectiveConfig,
    Precision,
    ProxyConfig,
    Segment,
    ViewSpec,
    packaged,
)
from clipflow_ray.errors import CalibrationError, CheckpointError
from clipflow_ray.model.calibration import Calibration
from clipflow_ray.model.flow import Flow
from clipflow_ray.model.record import (
    FORMAT_VERSION,
    CalibratedRecord,
    CalibrationStep,
    CheckpointRecord,
    TrainingRecord,
)
from clipflow_ray.place import Place

RECORD: Final = "checkpoint.json"
_CALIBRATION: Final = "calibration.safetensors"


@dataclass(frozen=True)
class Calibrated:
    """The encoder at one precision: its fingerprint, and the calibration of the scores that it gives, if there is one.

    A calibration of another precision would not do: the scores differ a little.
    """

    encoder_fingerprint: str
    calibration: Calibration | None = field(repr=False)


@dataclass(frozen=True)
class Checkpoint:
    """A flow with everything that is needed to use it. It can be pickled, so that a driver can pass it to actors.

    The repr omits the tensors: Ray Data prints the arguments of actors, and printing the tensors took a second.

    `view` holds the views that the encoder takes. `widths` are those of `segments`, in their order. `reference` may be
    empty. Otherwise it holds `natural` (float16 [N, D], raw embeddings) and `probe` (float32 [D + 1], logistic
    weights on standardised features and bias). Newer checkpoints also hold a probe with ReLU between its layers:
    `mlp.N.weight` [in, out] and `mlp.N.bias`.

    `encoder`, `encoder_fingerprint` and `calibration` are those of one precision. `further` holds the other precisions
    of the same encoder, and `at` exchanges them. `trained` is the precision of the encoder that the flow was fitted on;
    None stands for that of `encoder`.
    """

    encoder: EncoderConfig
    encoder_fingerprint: str
    view: ViewSpec
    segments: tuple[Segment, ...]
    widths: tuple[int, ...]
    flow_config: FlowConfig
    flow_state: dict[str, Tensor] = field(repr=False)
    limits: ImageLimits = field(default_factory=ImageLimits)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    proxies: ProxyConfig = field(default_factory=ProxyConfig)
    calibration: Calibration | None = field(default=None, repr=False)
    reference: dict[str, Tensor] = field(default_factory=dict, repr=False)
    training: TrainingRecord | None = field(default=None, repr=False)
    lineage: tuple[CalibrationStep, ...] = ()
    further: Mapping[Precision, Calibrated] = field(default_factory=dict)
    trained: Precision | None = None

    @property
    def model_id(self) -> str:
        """16 hex digits over the flow's tensors and the fingerprint of the encoder that it was fitted on.

        It is the same at every precision.
        """
        digest = hashlib.sha256(self.as_trained.encoder_fingerprint.encode())
        digest.update(save(_contiguous(self.flow_state)))
        return digest.hexdigest()[:16]

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """The precisions with a calibration, that of `encoder` first."""
        own = () if self.calibration is None else (self.encoder.precision,)
        return (*own, *(name for name, each in self.further.items() if each.calibration is not None))

    @property
    def as_trained(self) -> "Checkpoint":
        """This checkpoint at the precision at which the flow was fitted."""
        return self if self.trained is None else self._at(self.trained)

    def at(self, precision: Precision) -> "Checkpoint":
        """This checkpoint with encoder and calibration of `precision`.

        Raises CalibrationError if it has no calibration for it.
        """
        if not self.precisions:
            raise CalibrationError("The checkpoint has no calibration; train it with a calibration split.")
        if precision not in self.precisions:
            raise CalibrationError(
                f"The checkpoint is calibrated for {' and '.join(self.precisions)}, not for {precision}, whose scores "
                "differ a little. Choose another precision, or run `clipflow-ray calibrate`, which calibrates for both."
            )
        return self._at(precision)

    def of_encoder(self, fingerprint: str) -> "Checkpoint":
        """This checkpoint at the precision whose encoder has this fingerprint; unchanged if there is none."""
        found = [name for name, each in self.further.items() if each.encoder_fingerprint == fingerprint]
        return self._at(found[0]) if found else self

    def _at(self, precision: Precision) -> "Checkpoint":
        own = self.encoder.precision
        if precision == own:
            return self
        new, old = self.further[precision], Calibrated(self.encoder_fingerprint, self.calibration)
        trained = self.trained or own
        return replace(
            self,
            encoder=self.encoder.model_copy(update={"precision": precision}),
            encoder_fingerprint=new.encoder_fingerprint,
            calibration=new.calibration,
            further={name: each for name, each in self.further.items() if name != precision} | {own: old},
            trained=None if trained == precision else trained,
        )

    @property
    def outputs(self) -> tuple[Segment, ...]:
        """The encoder's outputs that scoring needs, each once, as plain segments."""
        return tuple(dict.fromkeys(each.model_copy(update={"training": "plain"}) for each in self.segments))

    def flow(self) -> Flow:
        """The flow in eval mode, rebuilt from its config and state. Raises CheckpointError if they do not fit."""
        flow = Flow(self.widths, self.flow_config)
        # Checkpoints of versions 1 and 2 have no scale of the segments' likelihoods; that of a new flow is theirs.
        scale = {name: value for name, value in flow.state_dict().items() if name in ("centre", "spread")}
        try:
            flow.load_state_dict(scale | self.flow_state, strict=True)
        except RuntimeError as error:
            raise CheckpointError(f"The flow's tensors do not fit its config: {error}") from error
        return flow.eval().requires_grad_(False)


def save_checkpoint(checkpoint: Checkpoint, where: Place | str | Path) -> None:
    """Write a checkpoint folder, and replace an old checkpoint there.

    On a local disk, the folder is written as a whole or not at all, and CheckpointError is raised if the old folder is
    not a checkpoint. On S3, the record is written last. It holds the hashes of the other files, so that a reader
    detects an incomplete checkpoint.
    """
    place, checkpoint = _place(where), checkpoint.as_trained
    files = {"flow.safetensors": save(_contiguous(checkpoint.flow_state))}
    strata: tuple[str, ...] = ()
    if checkpoint.calibration is not None:
        strata = checkpoint.calibration.strata
        files[_CALIBRATION] = save(_tensors_of(checkpoint.calibration))
    further: dict[Precision, CalibratedRecord] = {}
    for precision, each in checkpoint.further.items():
        if each.calibration is not None:
            files[_calibration_file(precision)] = save(_tensors_of(each.calibration))
            further[precision] = CalibratedRecord(
                encoder_fingerprint=each.encoder_fingerprint, calibration_strata=each.calibration.strata
            )
    if checkpoint.reference:
        files["reference.safetensors"] = save(_contiguous(checkpoint.reference))
    record = CheckpointRecord(
        model_id=checkpoint.model_id,
        encoder=checkpoint.encoder,
        encoder_fingerprint=checkpoint.encoder_fingerprint,
        view=checkpoint.view,
        segments=checkpoint.segments,
        widths=checkpoint.widths,
        flow=checkpoint.flow_config,
        limits=checkpoint.limits,
        objective=checkpoint.objective,
        proxies=checkpoint.proxies,
        calibration_strata=strata,
        further=further,
        training=checkpoint.training,
        lineage=checkpoint.lineage,
        sha256={name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    ).model_dump(mode="json")
    record["record_sha256"] = _record_sha256(record)
    files[RECORD] = (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()
    if place.is_local and Path(place.uri).exists():
        load_checkpoint(place)  # raises if the folder is not a checkpoint, so that nothing else is replaced
    place.write_folder(files)


def load_checkpoint(where: Place | str | Path) -> Checkpoint:
    """Read and verify a checkpoint; `where` may be the name of a packaged one.

    Raises CheckpointError if it is missing, altered or not finite.
    """
    place = _place(packaged(where) if isinstance(where, str) else where)
    uri = place.uri
    try:
        plain = json.loads((place / RECORD).read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"No checkpoint at {uri}: there is no {RECORD}. Name the directory that training wrote."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{RECORD} of {uri} cannot be read as JSON: {error}") from error
    if not isinstance(plain, dict):
        raise CheckpointError(f"{RECORD} of {uri} is not a checkpoint record.")
    if plain.get("format_version") not in range(1, FORMAT_VERSION + 1):
        raise CheckpointError(
            f"{uri} has format version {plain.get('format_version')}; this package reads 1 to {FORMAT_VERSION}."
        )
    if plain.get("record_sha256") != _record_sha256(plain):
        raise CheckpointError(f"{RECORD} of {uri} was altered (sha256 differs); fetch or train the checkpoint again.")
    try:
        record = CheckpointRecord.model_validate(_current(plain))
        tensors = {name: _tensors(place / name, digest) for name, digest in record.sha256.items()}
        calibration = None
        if _CALIBRATION in tensors:
            calibration = _calibration(tensors[_CALIBRATION], record.calibration_strata)
        return Checkpoint(
            encoder=record.encoder,
            encoder_fingerprint=record.encoder_fingerprint,
            view=record.view,
            segments=record.segments,
            widths=record.widths,
            flow_config=record.flow,
            flow_state=tensors["flow.safetensors"],
            limits=record.limits,
            objective=record.objective,
            proxies=record.proxies,
            calibration=calibration,
            reference=tensors.get("reference.safetensors", {}),
            training=record.training,
            lineage=record.lineage,
            further={
                precision: Calibrated(
                    each.encoder_fingerprint,
                    _calibration(tensors[_calibration_file(precision)], each.calibration_strata),
                )
                for precision, each in record.further.items()
            },
        )
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{uri} has a missing or invalid field: {error}") from error


def _place(where: Place | str | Path) -> Place:
    return where if isinstance(where, Place) else Place.at(where)


def _current(plain: dict[str, Any]) -> dict[str, Any]:
    """A record of an older version as one of the current version.

    Version 1 recorded only the kind of the view, because all views were those of OpenAI's towers. The weights of such a
    checkpoint may have another mean and standard deviation. Both affect only the encoder, which takes them from its
    weights. Until version 2, all features were those of one view, and `segments` held their widths. Until version 3
    there was one precision.
    """
    if plain["format_version"] == 1:
        plain = plain | {"view": {**OPENAI_VIEW.model_dump(), "kind": plain["encoder"]["view"], "size": 224}}
    if plain["format_version"] <= 2:
        encoder, view = dict(plain["encoder"]), dict(plain["view"])
        view["sizes"] = [view.pop("size")]
        segments = [{"feature": name, "size": view["sizes"][0]} for name in encoder.pop("feature")]
        plain = plain | {"encoder": encoder, "view": view, "widths": plain["segments"], "segments": segments}
    return plain | {"format_version": FORMAT_VERSION}


def _record_sha256(record: dict[str, Any]) -> str:
    plain = {key: value for key, value in record.items() if key != "record_sha256"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _tensors(place: Place, sha256: str) -> dict[str, Tensor]:
    try:
        with place.stream() as file:
            data = file.read()
    except OSError as error:
        raise CheckpointError(f"The checkpoint lacks {place.uri}: {error}") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(f"{place.uri} was altered (sha256 differs); fetch or train the checkpoint again.")
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise CheckpointError(f"{place.uri} is not a safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{place.uri} holds values that are not finite in {name!r}.")
    return tensors


def _calibration_file(precision: Precision) -> str:
    return f"calibration-{precision}.safetensors"


def _tensors_of(calibration: Calibration) -> dict[str, Tensor]:
    arrays = {"scores": calibration.scores, "sources": calibration.sources}
    weights = {} if calibration.weights is None else {"weights": calibration.weights}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in (arrays | weights).items()}


def _calibration(tensors: dict[str, Tensor], strata: tuple[str, ...]) -> Calibration:
    """The calibration of a file. One from before sources were kept counts as of one source."""
    scores = tensors["scores"].numpy().astype(np.float32)
    sources = tensors["sources"].numpy() if "sources" in tensors else np.zeros(len(scores), np.int32)
    return Calibration(scores, strata, sources, tensors["weights"].numpy() if "weights" in tensors else None)


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
