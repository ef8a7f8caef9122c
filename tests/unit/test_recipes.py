"""Recipes: complete training configs, one for each tower. No published weights are loaded."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import open_clip
import pytest
import typer
import yaml

from clipflow_ray.cli import app
from clipflow_ray.config import (
    OPENAI_VIEW,
    RECIPES,
    EncoderConfig,
    InventoryOptions,
    TrainConfig,
    load_yaml,
    train_config_file,
)
from clipflow_ray.errors import ConfigError
from clipflow_ray.model.encoder import resolved, widths_of
from clipflow_ray.model.weights import TowerRecord, architecture_of
from clipflow_ray.train import run

ROOT = Path(__file__).parents[2]
OTHERS = [name for name in RECIPES if name not in ("default", "fast")]


def recipe(name: str | None, **overrides: object) -> TrainConfig:
    return load_yaml(TrainConfig, train_config_file(name), {"output": "out", **overrides})


def record_of(encoder: EncoderConfig) -> TowerRecord:
    """The record of a tower, but for its weights and preprocessing, which do not matter to its segments."""
    architecture = architecture_of(encoder.model)
    size = architecture["vision_cfg"]["image_size"]
    return TowerRecord("", architecture, OPENAI_VIEW.model_copy(update={"sizes": (size,)}))


def test_the_recipes_are_these_and_lie_beside_the_jobs_too() -> None:
    assert list(RECIPES) == [
        "default",
        "fast",
        "metaclip2-worldwide",
        "pe-core-l-14-336",
        "siglip2-b-16-256",
        "vit-l-14-336",
    ]
    assert os.readlink(ROOT / "jobs/recipes") == "../clipflow_ray/assets/recipes"
    assert {path.stem for path in (ROOT / "jobs/recipes").iterdir()} == set(RECIPES)


@pytest.mark.parametrize("name", OTHERS)
def test_a_recipe_names_weights_that_open_clip_lists_and_the_segments_of_the_rule_of_depth(name: str) -> None:
    config = recipe(name)
    assert (config.encoder.model, config.encoder.pretrained) in open_clip.list_pretrained()
    record = record_of(config.encoder)
    assert config.segments == resolved((), config.encoder, record)
    assert len(widths_of(config.segments, config.encoder, record)) == 3


@pytest.mark.parametrize("name", OTHERS)
def test_two_lines_that_name_the_tower_train_what_its_recipe_trains(name: str, tmp_path: Path) -> None:
    config, path = recipe(name), tmp_path / "mine.yaml"
    path.write_text(f"encoder:\n  {{model: {config.encoder.model}, pretrained: {config.encoder.pretrained}}}\n")
    own = recipe(str(path))
    assert own.segments == ()
    segments = resolved(own.segments, own.encoder, record_of(own.encoder))
    assert own.model_copy(update={"segments": segments}) == config


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_states_what_it_trains_and_does_not_rely_on_defaults(name: str) -> None:
    stated = yaml.safe_load(Path(RECIPES[name]).read_text(encoding="utf-8"))
    assert set(stated) >= {"encoder", "segments", "proxies", "fit", "split"} and set(stated["fit"]) == {
        "epochs",
        "learning_rate",
    }
    assert all("size" in segment for segment in stated["segments"])


def test_the_recipe_default_is_the_packaged_training_without_its_sources_and_its_precision() -> None:
    packaged = recipe(str(ROOT / "jobs/train_default.yaml"))
    assert packaged.split.validation and packaged.split.calibration and packaged.encoder.precision == "bfloat16"
    changes = {
        "encoder": packaged.encoder.model_copy(update={"precision": "float32"}),
        "inventory": InventoryOptions(),
        "split": packaged.split.model_copy(update={"validation": (), "calibration": ()}),
    }
    assert recipe("default") == packaged.model_copy(update=changes)


def test_the_recipe_fast_is_the_default_without_its_largest_view() -> None:
    default = recipe("default")
    assert [segment.size for segment in default.segments] == [224, 224, 448]
    assert recipe("fast") == default.model_copy(update={"segments": default.segments[:2]})


def test_a_file_comes_before_a_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("default").mkdir()
    assert train_config_file("default") == RECIPES["default"]
    Path("default").rmdir()
    Path("default").write_text("flow: {blocks: 2}\n", encoding="utf-8")
    assert train_config_file("default") == "default" and recipe("default").flow.blocks == 2
    assert train_config_file(None) == RECIPES["default"]


def test_an_unknown_name_is_refused_in_a_sentence_that_names_the_recipes() -> None:
    with pytest.raises(
        ConfigError, match=r"'vit-l' is neither a config file nor a recipe\. The recipes are default, fast, m"
    ):
        train_config_file("vit-l")


@pytest.mark.parametrize(
    ("words", "name"),
    [([], "default"), (["--config", "default"], "default"), (["--config", "vit-l-14-336"], "vit-l-14-336")],
)
def test_train_takes_the_name_of_a_recipe_and_without_a_config_the_default(
    words: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[TrainConfig] = []

    def train(config: TrainConfig) -> run.Trained:
        given.append(config)
        return run.Trained("", "", {})

    monkeypatch.setattr(run, "train", train)
    flags = ["--input", "photos", "--output", "mine", "--seed", "1"]
    typer.main.get_command(app).main(["train", *flags, *words], standalone_mode=False)
    expected = recipe(name, input=("photos",), output="mine")
    assert given == [expected.model_copy(update={"fit": expected.fit.model_copy(update={"seed": 1})})]


def test_a_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "clipflow_ray"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = listed.stdout.splitlines()
    assert {f"clipflow_ray/assets/recipes/{name}.yaml" for name in RECIPES} <= set(files)
    for name in (*files, "pyproject.toml", "README.md", "LICENSE"):
        copy = tmp_path / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(tmp_path / "source")], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not set(files) - set(archive.namelist())
