"""The views of an evaluation: distortions, and the re-encodings that both classes share."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from clipflow_ray import images
from clipflow_ray.cli import app
from clipflow_ray.columns import manifest_table
from clipflow_ray.config import OPENAI_VIEW, ImageLimits, InventoryOptions
from clipflow_ray.evaluate.views import CASES, VARIANTS, aligned, distorted, read_variants, recompressed
from clipflow_ray.inputs.listing import rows
from clipflow_ray.place import Place
from tests.conftest import encoded, photo


def test_every_distortion_gives_an_image_and_the_same_one_for_the_same_draw() -> None:
    rgb = photo(1, (300, 200))
    for name, level in CASES:
        made = distorted(rgb, name, level, draw=3)
        assert made.dtype == np.uint8 and made.ndim == 3 and made.shape[2] == 3
        np.testing.assert_array_equal(made, distorted(rgb, name, level, draw=3))


@pytest.mark.parametrize("name", ["jpeg", "webp", "blur"])
def test_a_stronger_level_is_farther_from_the_original(name: str) -> None:
    rgb = photo(2)
    levels = [level for kind, level in CASES if kind == name]
    distances = [np.abs(distorted(rgb, name, level, 0).astype(int) - rgb).mean() for level in levels]
    assert distances == sorted(distances) and distances[0] < distances[-1]


def test_the_position_of_a_crop_depends_on_its_draw_and_not_on_the_image() -> None:
    corners = np.stack(np.meshgrid(np.arange(100), np.arange(200), indexing="ij"), axis=2).astype(np.uint8)
    index = np.concatenate([corners, corners[..., :1]], axis=2)
    for draw in range(20):
        crop, whole = distorted(index, "crop", 0.5, draw), distorted(np.repeat(index, 2, axis=0), "crop", 0.5, draw)
        assert crop.shape == (50, 100, 3) and whole.shape == (100, 100, 3)
        assert abs(int(crop[0, 0, 0]) - int(whole[0, 0, 0])) <= 1 and crop[0, 0, 1] == whole[0, 0, 1]
    assert len({tuple(distorted(index, "crop", 0.5, draw)[0, 0]) for draw in range(20)}) > 10


@pytest.mark.parametrize(("size", "shape"), [((600, 1536), (300, 768, 3)), ((300, 200), (300, 200, 3))])
def test_web_shrinks_the_long_edge_to_768_and_enlarges_nothing(
    size: tuple[int, int], shape: tuple[int, int, int]
) -> None:
    assert distorted(photo(3, size), "web", 60, 0).shape == shape


def test_every_distortion_of_a_tiny_image_gives_an_image() -> None:
    for name, level in CASES:
        assert min(distorted(photo(4, (32, 33)), name, level, 0).shape[:2]) >= 1


@pytest.mark.parametrize("size", [(100, 900), (448, 448), (1000, 700)])
def test_aligned_images_are_all_jpegs_of_one_size(size: tuple[int, int]) -> None:
    image = Image.open(io.BytesIO(aligned(photo(5, size))))
    assert (image.format, image.size, image.mode) == ("JPEG", (448, 448), "RGB")


def test_a_recompressed_image_is_a_jpeg_of_quality_85_and_keeps_its_size() -> None:
    rgb = photo(6, (100, 333))
    made = images.decode(recompressed(rgb), ImageLimits())
    assert (made.format, made.width, made.height, made.jpeg_quality) == ("JPEG", 333, 100, 85)
    assert JpegImagePlugin.get_sampling(Image.open(io.BytesIO(recompressed(rgb)))) == 2  # Pillow's number of 4:2:0


def test_every_variant_gives_the_view_and_the_size_of_its_own_encoding(tmp_path: Path) -> None:
    rgb = photo(7, (300, 260))
    (tmp_path / "a.png").write_bytes(encoded(rgb, "PNG"))
    (tmp_path / "b.png").write_bytes(b"broken")
    options = InventoryOptions()
    listed = manifest_table([*rows([Place.at(tmp_path)], options)])
    table = read_variants(listed, Place.at(tmp_path), ImageLimits(), OPENAI_VIEW, options)
    good, broken = sorted(table.to_pylist(), key=lambda row: row["uri"])
    encodings = [aligned(rgb), recompressed(rgb)]
    seen = [rgb, *(np.array(Image.open(io.BytesIO(data)).convert("RGB")) for data in encodings)]
    views = np.frombuffer(good["view"], np.uint8).reshape(len(VARIANTS), 224, 224, 3)
    for pixels, view in zip(seen, views, strict=True):
        np.testing.assert_array_equal(view, images.view(pixels, OPENAI_VIEW, 224))
    assert [good["aligned_bytes"], good["recompressed_bytes"]] == [len(data) for data in encodings]
    assert good["bytes"] == len(encoded(rgb, "PNG"))
    assert broken["status"] == "error" and not broken["view"]
    assert broken["aligned_bytes"] is None and broken["recompressed_bytes"] is None


def test_the_help_gives_the_true_cost_of_robustness() -> None:
    callbacks = [command.callback for command in app.registered_commands if command.callback is not None]
    (evaluate,) = (callback for callback in callbacks if callback.__name__ == "evaluate")
    (option,) = (hint.__metadata__[0] for name, hint in evaluate.__annotations__.items() if name == "robustness")
    assert f"costs {len(CASES)} encodings" in option.help
