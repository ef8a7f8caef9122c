"""The auto-encoders of the learned proxy families: which images they are fitted on, and that they learn."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from clipflow_ray.config import SplitConfig, TrainConfig
from clipflow_ray.errors import InputError
from clipflow_ray.lab import autoencoders
from clipflow_ray.proxies.autoencoder import DECODERS, Autoencoder, Decoder, load
from tests.conftest import encoded, photo

VIEWS = np.stack([photo(at, (224, 224)) for at in range(4)])


def error(autoencoder: Autoencoder) -> float:
    views = torch.from_numpy(VIEWS).permute(0, 3, 1, 2) / 255.0
    with torch.inference_mode():
        return float((autoencoder(views) - views).abs().mean())


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    for at, source in enumerate(("alpine", "harbour", "studio")):
        folder = tmp_path / "photos" / source
        folder.mkdir(parents=True)
        (folder / "0.jpg").write_bytes(encoded(photo(at, (224, 224))))
        (folder / "broken.jpg").write_bytes(b"text")
    return tmp_path / "photos"


def config(sources: Path, output: Path, **split: tuple[str, ...]) -> TrainConfig:
    return TrainConfig(input=(str(sources),), output=str(output), split=SplitConfig(**split))


@pytest.mark.parametrize("decoder", DECODERS)
def test_thirty_steps_rebuild_better_than_one_and_the_same_seed_gives_the_same_weights(decoder: Decoder) -> None:
    one, many, again = (autoencoders.fit(VIEWS, decoder, steps) for steps in (1, 30, 30))
    assert error(many) < 0.7 * error(one)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in many.state_dict().items())


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_packaged_auto_encoders_rebuild_images_that_were_not_trained_on(decoder: Decoder) -> None:
    assert error(load(decoder)) < 0.08 < error(Autoencoder(decoder).eval())


def test_broken_files_and_the_sources_of_validation_and_calibration_are_skipped(sources: Path, tmp_path: Path) -> None:
    split = config(sources, tmp_path / "out", validation=("alpine",), calibration=("studio",))
    assert autoencoders.make(split, steps=1) == 1
    assert all(load(decoder, tmp_path / "out") for decoder in DECODERS)
    assert autoencoders.make(config(sources, tmp_path / "out"), steps=1) == 3
    nothing = config(sources, tmp_path / "out", validation=("alpine", "harbour"), calibration=("studio",))
    with pytest.raises(InputError, match="No readable image"):
        autoencoders.make(nothing, steps=1)


def test_photographs_may_lie_in_parquet_files_with_a_column_of_sources(tmp_path: Path) -> None:
    table = {"image": [encoded(photo(at, (224, 224))) for at in range(3)], "group": ["alpine", "harbour", "harbour"]}
    pq.write_table(pa.table(table), tmp_path / "photos.parquet")
    split = config(tmp_path / "photos.parquet", tmp_path / "out", validation=("alpine",))
    assert autoencoders.make(split, steps=1) == 2
