"""Closed configs, YAML with overrides, and the hash that identifies a run."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from clipflow_ray.audit import run
from clipflow_ray.audit.record import AuditPlan
from clipflow_ray.audit.report import CONFIG_FILE_ONLY, command_line, settings_with_flags
from clipflow_ray.cli import app
from clipflow_ray.cli.options import s3_options
from clipflow_ray.config import (
    TEST_TOWER,
    AuditConfig,
    Config,
    EncoderConfig,
    FlowConfig,
    ImageLimits,
    Segment,
    TrainConfig,
    load_yaml,
    slots,
    stable_hash,
    validated,
)
from clipflow_ray.errors import ConfigError

AUDIT = {"input": ["photos"], "output": "out"}


@pytest.mark.parametrize(
    ("values", "named"),
    [({"aplha": 0.1}, "aplha"), ({"limits": {"min_sde": 3}}, "limits.min_sde"), ({"s3": {"secret": "x"}}, "s3.secret")],
)
def test_an_unknown_key_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        validated(AuditConfig, AUDIT | values)


def test_every_wrong_setting_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        validated(AuditConfig, {"input": ["photos"], "alpha": 1.0, "batch_size": 0})
    assert all(name in str(caught.value) for name in ("output", "alpha", "batch_size"))


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, float("nan")])
def test_alpha_lies_strictly_between_zero_and_one(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha"):
        validated(AuditConfig, AUDIT | {"alpha": alpha})


def test_a_config_cannot_be_changed_after_it_was_made() -> None:
    limits = ImageLimits()
    with pytest.raises(ValueError, match="frozen"):
        limits.max_bytes = 1  # type: ignore[misc]


@pytest.mark.parametrize("model", ["hf-hub:timm/PE-Core-T-16-384", "local-dir:/models/tower"])
def test_a_folder_or_repository_brings_its_own_weights(model: str) -> None:
    made = validated(EncoderConfig, {"model": model})
    assert (made.model, made.pretrained) == (model, "")
    assert validated(EncoderConfig, made.model_dump(mode="json")) == made
    with pytest.raises(ConfigError, match="must be left out"):
        validated(EncoderConfig, {"model": model, "pretrained": "openai"})


@pytest.mark.parametrize(
    "values",
    [{"pretrained": "seed:1"}, {"model": TEST_TOWER}, {"model": TEST_TOWER, "pretrained": "openai"}],
)
def test_seed_weights_and_the_test_tower_are_accepted_only_together(values: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="encoder"):
        validated(TrainConfig, AUDIT | {"encoder": values})
    assert validated(EncoderConfig, {"model": TEST_TOWER, "pretrained": "seed:1"}).pretrained == "seed:1"


@pytest.mark.parametrize(
    "name", ["", "pooled", "Projected", "block0.cls", "block.cls", "block3", "block3.max", "block3.cls\n"]
)
def test_wrong_feature_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="feature"):
        validated(TrainConfig, AUDIT | {"segments": [{"feature": name}]})


def test_segments_keep_their_order_and_are_named_by_feature_size_and_training() -> None:
    given = [
        {"feature": "block12.mean", "size": 448, "training": "paired"},
        {"feature": "projected", "size": 224},
        {"feature": "block3.cls", "size": 448, "training": "paired"},
    ]
    made = validated(TrainConfig, AUDIT | {"segments": given}).segments
    assert [each.name for each in made] == ["block12.mean@448.paired", "projected@224", "block3.cls@448.paired"]
    assert [each.output for each in made] == ["block12.mean@448", "projected@224", "block3.cls@448"]
    assert slots(made) == ((224, "plain"), (448, "paired"))


@pytest.mark.parametrize("change", [{"size": 0}, {"size": -224}, {"training": "pairs"}, {"view": 224}])
def test_a_wrong_size_or_training_of_a_segment_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"segments\.0\.{next(iter(change))}"):
        validated(TrainConfig, AUDIT | {"segments": [{"feature": "projected", **change}]})
    assert Segment(feature="projected").training == "plain"


def test_features_in_the_encoders_settings_are_refused_with_what_replaces_them() -> None:
    with pytest.raises(ConfigError, match="features are named in `segments` now, such as"):
        validated(TrainConfig, AUDIT | {"encoder": {"feature": ["block6.mean"]}})


def test_overrides_win_over_the_file_and_empty_ones_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "audit.yaml"
    path.write_text("input: [photos]\noutput: out\nalpha: 0.2\nbatch_size: 7\n", encoding="utf-8")
    overrides = {"alpha": 0.05, "input": (), "output": None, "checkpoint": None}
    config = load_yaml(AuditConfig, str(path), overrides)
    assert (config.input, config.output, config.alpha, config.batch_size) == (("photos",), "out", 0.05, 7)
    assert config.checkpoint == AuditConfig(input=("a",), output="b").checkpoint


def test_the_flags_of_s3_replace_what_they_name_and_keep_the_rest_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "audit.yaml"
    path.write_text("s3: {endpoint_url: 'http://mine', unsigned: true}\n", encoding="utf-8")
    for flags, expected in (
        ((None, None, False), ("http://mine", None, True)),
        ((None, "eu-north-1", False), ("http://mine", "eu-north-1", True)),
        (("http://other", None, True), ("http://other", None, True)),
    ):
        config = load_yaml(AuditConfig, str(path), {"output": "out", "s3": s3_options(*flags)})
        assert (config.s3.endpoint_url, config.s3.region, config.s3.unsigned) == expected
    alone = load_yaml(AuditConfig, None, {"output": "out", "s3": s3_options(None, None, False)})
    assert alone.s3 == AuditConfig(output="out").s3


def names(config: Config) -> Iterator[str]:
    """The names of all settings, and of the settings that they hold."""
    for name, value in config:
        yield name
        yield from names(value) if isinstance(value, Config) else ()


def test_each_setting_of_an_audit_has_a_flag_or_is_one_of_the_config_file_only() -> None:
    config = AuditConfig(output="")
    program: Any = typer.main.get_command(app)  # typer has its own copy of click, without a public name
    options = {option for parameter in program.commands["audit"].params for option in parameter.opts}
    missing = {name for name, _ in settings_with_flags(config) if f"--{name.replace('_', '-')}" not in options}
    assert not missing, "add a flag, or list the setting in CONFIG_FILE_ONLY"
    assert not {name for name in CONFIG_FILE_ONLY if f"--{name.replace('_', '-')}" in options}
    assert set(names(config)) >= CONFIG_FILE_ONLY


def test_the_command_line_of_a_report_gives_the_settings_of_its_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {
        "input": ["s3://bucket/a b/", "photos"],
        "output": "s3://bucket/out",
        "checkpoint": "checkpoint",
        "precision": "bfloat16",
        "alpha": 0.0123456,
        "s3": {"endpoint_url": "http://store", "region": "eu-north-1", "unsigned": True, "request_payer": True},
        "inventory": {
            "input_format": "parquet",
            "group_by": "prefix:2",
            "uri_column": "address",
            "bytes_column": "image",
            "group_column": "site",
            "label_column": "kind",
            "include": ["*.jpg", "a b/**"],
            "exclude": ["thumbs"],
        },
        "limits": {"max_bytes": 9, "max_pixels": 8, "max_side": 7, "min_side": 6, "max_seconds": 5.5},
        "pool": {"encoders": "1-3", "gpus_per_encoder": 0.5, "accelerator_type": "A100", "decoders": 5},
        "batch_size": 7,
        "sample": 0.25,
        "dedupe": "sha256",
        "gallery": 0,
        "keep_embeddings": True,
        "export": "csv-all",
        "max_error_rate": 0.5,
    }
    config = validated(AuditConfig, changed)
    default = dict(settings_with_flags(AuditConfig(output="")))
    assert not [name for name, value in settings_with_flags(config) if value == default[name]], "change each setting"
    given_to_plan: list[AuditConfig] = []

    def plan(settings: AuditConfig) -> AuditPlan:
        given_to_plan.append(settings)
        return AuditPlan(
            objects=0,
            to_score=0,
            bytes=0,
            by_suffix={},
            precision="float32",
            encoders=1,
            images_per_second=1.0,
            hours=0.0,
        )

    monkeypatch.setattr(run, "plan", plan)
    words = shlex.split(command_line(config))
    typer.main.get_command(app).main([*words[1:], "--dry-run"], standalone_mode=False)
    assert given_to_plan == [config]


def test_overrides_without_a_file_make_a_config() -> None:
    assert load_yaml(AuditConfig, None, {"input": ("a", "b"), "output": "c"}).input == ("a", "b")


def test_a_zero_override_is_not_taken_for_an_empty_one() -> None:
    with pytest.raises(ConfigError, match="batch_size"):
        load_yaml(AuditConfig, None, AUDIT | {"batch_size": 0})


@pytest.mark.parametrize(
    "content",
    [b"- input\n- output\n", b"just words", b"a: [", b"a: \0", b"\xff\xfe\x00caf\xe9: 1", b"1: 2", b"limits: 3"],
)
def test_a_file_that_holds_no_settings_is_refused_as_config_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        load_yaml(AuditConfig, str(path), dict(AUDIT))


def test_a_missing_config_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            load_yaml(AuditConfig, str(path), dict(AUDIT))


def test_yaml_cannot_make_python_objects(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "evil.yaml"
    path.write_text(f"input: !!python/object/apply:os.mkdir ['{canary}']\n", encoding="utf-8")
    with pytest.raises(ConfigError):
        load_yaml(AuditConfig, str(path), {"output": "out"})
    assert not canary.exists()


scalars = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=5)
plain = st.dictionaries(st.text(max_size=5), scalars | st.lists(scalars, max_size=3), min_size=2, max_size=5)


@settings(max_examples=50, deadline=None)
@given(plain, st.randoms())
def test_the_hash_ignores_key_order(values: dict[str, Any], random: Random) -> None:
    items = list(values.items())
    random.shuffle(items)
    assert stable_hash(dict(items)) == stable_hash(values)
    assert len(bytes.fromhex(stable_hash(values))) == 8


@settings(max_examples=50, deadline=None)
@given(plain, st.data())
def test_the_hash_changes_with_any_value(values: dict[str, Any], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(values)))
    other = data.draw(scalars.filter(lambda value: repr(value) != repr(values[key])))
    assert stable_hash(values | {key: other}) != stable_hash(values)
    assert stable_hash({k: v for k, v in values.items() if k != key}) != stable_hash(values)


@pytest.mark.parametrize("change", [{"blocks": 9}, {"hidden": 191}, {"clamp": 1.91}, {"translation_clamp": 1.0}])
def test_the_hash_of_a_config_changes_with_any_setting(change: dict[str, Any]) -> None:
    assert stable_hash(FlowConfig(**change)) != stable_hash(FlowConfig())
    assert stable_hash(FlowConfig(), "a", "b") != stable_hash(FlowConfig(), "b", "a")


def test_the_hash_is_that_of_the_first_release() -> None:
    """The value is the sha256 of '["x", {"a": 1, "b": [2.5, null]}]'. Caches and runs are named by such hashes."""
    assert stable_hash("x", {"b": [2.5, None], "a": 1}) == "a14e677bcf4bd8b3"
