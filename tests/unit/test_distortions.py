"""The distortions of the robustness evaluation, and format alignment."""

import io

import numpy as np
import pytest
from PIL import Image

from clipflow_ray.cli import app
from clipflow_ray.evaluate.views import CASES, aligned, distorted
from tests.conftest import photo


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


def test_the_help_gives_the_true_cost_of_robustness() -> None:
    callbacks = [command.callback for command in app.registered_commands if command.callback is not None]
    (evaluate,) = (callback for callback in callbacks if callback.__name__ == "evaluate")
    (option,) = (hint.__metadata__[0] for name, hint in evaluate.__annotations__.items() if name == "robustness")
    assert f"costs {len(CASES)} encodings" in option.help
