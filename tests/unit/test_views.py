"""The natural views of an image that training uses, their proxies, and the embeddings of both."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipflow_ray import proxies
from clipflow_ray.columns import MANIFEST_SCHEMA, manifest_table
from clipflow_ray.config import (
    OPENAI_VIEW,
    TEST_TOWER,
    EncoderConfig,
    ImageLimits,
    InventoryOptions,
    ProxyConfig,
    Segment,
)
from clipflow_ray.data.scoring import Embed
from clipflow_ray.images import by_size, view
from clipflow_ray.model.encoder import Encoder
from clipflow_ray.place import Place
from clipflow_ray.train.parts import Parts
from clipflow_ray.train.views import distorted, read_and_distort
from tests.conftest import encoded, photo

SIZE = 224
PLAIN = (Segment(feature="projected", size=SIZE),)
each_size = pytest.mark.parametrize("size", [SIZE, 336, 448])


def test_pairs_change_proxies_and_leave_natural_views_as_they_are() -> None:
    rgb = np.random.default_rng(0).integers(60, 200, (300, 260, 3), dtype=np.uint8)
    families = {name: ProxyConfig().families[name] for name in ("low_pass", "tone")}
    single, paired = (
        distorted(
            rgb,
            "a.jpg",
            OPENAI_VIEW,
            PLAIN,
            ProxyConfig(natural_views=2, proxies_per_view=1, families=families, pairs=share),
        )
        for share in (0.0, 0.9999)
    )
    assert [label for label, _ in single][::2] == [label for label, _ in paired][::2] == ["natural", "natural"]
    for (label, alone), (both, changed) in zip(single, paired, strict=True):
        assert both == (label if label == "natural" else f"{label}+{'tone' if label == 'low_pass' else 'low_pass'}")
        assert (alone == changed).all() == (label == "natural")


# Slots of two sizes, each plain and paired. The first size is not that of the first view of the spec.
SMALL = OPENAI_VIEW.model_copy(update={"sizes": (64, 48)})
SEGMENTS = (
    Segment(feature="block1.cls", size=48, training="paired"),
    Segment(feature="projected", size=64),
    Segment(feature="block1.mean", size=48),
    Segment(feature="projected", size=48),
    Segment(feature="block1.cls", size=64, training="paired"),
)
SLOT_SIZES = (48, 48, 64, 64)  # paired, plain, paired, plain


def qualities(plain: np.ndarray, changed: np.ndarray) -> set[tuple[int, str]]:
    """The qualities and subsamplings with which Pillow's JPEG makes `changed` of `plain`."""
    found = set()
    for quality in range(40, 101):
        for subsampling in ("4:4:4", "4:2:0"):
            out = io.BytesIO()
            Image.fromarray(plain).save(out, "JPEG", quality=quality, subsampling=subsampling)
            if np.array_equal(np.asarray(Image.open(out)), changed):
                found.add((quality, subsampling))
    return found


def test_a_paired_view_is_the_jpeg_of_the_plain_one_with_one_quality_for_a_natural_view_and_its_proxies() -> None:
    config = ProxyConfig(natural_views=4, proxies_per_view=2, paired_quality=(60, 90))
    made = distorted(photo(3, (90, 70)), "a.jpg", SMALL, SEGMENTS, config)
    assert [family == "natural" for family, _ in made] == [True, False, False] * 4
    drawn = set()
    for first in range(0, len(made), 3):
        packed = np.stack([views for _, views in made[first : first + 3]])
        paired48, plain48, paired64, plain64 = by_size(packed, SLOT_SIZES)
        for plain in (plain64, plain48):
            assert len({view.tobytes() for view in plain}) == 3  # the proxies differ from the photograph
        pairs = [(plain48, paired48), (plain64, paired64)]
        common = set.intersection(*(qualities(*pair) for both in pairs for pair in zip(*both, strict=True)))
        ((quality, subsampling),) = common
        assert 60 <= quality <= 90
        drawn.add((quality, subsampling))
    assert len(drawn) == 4 and {subsampling for _, subsampling in drawn} == {"4:4:4", "4:2:0"}


def test_views_of_two_sizes_have_the_same_families_and_the_first_is_the_view_of_inference() -> None:
    config = ProxyConfig(natural_views=2, proxies_per_view=3)
    rgb = photo(4, (90, 70))
    made = distorted(rgb, "a.jpg", SMALL, SEGMENTS, config)
    _, plain48, _, plain64 = by_size(made[0][1][None], SLOT_SIZES)
    for size, found in ((64, plain64), (48, plain48)):
        np.testing.assert_array_equal(found[0], proxies.natural(view(rgb, SMALL, size)))
    alone = distorted(rgb, "a.jpg", SMALL.model_copy(update={"sizes": (48,)}), SEGMENTS[2:3], config)
    assert [family for family, _ in alone] == [family for family, _ in made]
    for (_, own), (_, views) in zip(alone, made, strict=True):
        np.testing.assert_array_equal(own, by_size(views[None], SLOT_SIZES)[1].ravel())


def manifest(folder: Path) -> pa.Table:
    """Two photographs of the sources `lake` and `tower`, and a file that is no image."""
    rows = []
    for at, name in enumerate(("lake/0.jpg", "tower/1.jpg", "tower/2.jpg")):
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(encoded(photo(at, (300, 500))) if at < 2 else b"text")
        known: dict[str, Any] = {"row_id": name, "uri": str(file), "member": "", "group": name.partition("/")[0]}
        rows.append(dict.fromkeys(MANIFEST_SCHEMA.names) | known | {"input_format": "images"})
    return manifest_table(rows)


PARTS = Parts(by="source", validation=(), calibration=("lake",))


def test_a_calibration_image_gives_one_image_that_is_plain_in_all_views(tmp_path: Path) -> None:
    config = ProxyConfig(natural_views=2, proxies_per_view=1)
    near = Place.at(str(tmp_path))
    read = read_and_distort(manifest(tmp_path), near, ImageLimits(), SMALL, SEGMENTS, config, PARTS, InventoryOptions())
    assert [len(families) for families in read["families"].to_pylist()] == [1, 4, 0]
    assert read["families"].to_pylist()[0] == ["natural"]
    assert read["status"].to_pylist() == ["ok", "ok", "error"]
    rgb = np.array(Image.open(tmp_path / "lake/0.jpg"))
    packed = np.frombuffer(read["view"].to_pylist()[0], np.uint8)[None]
    for size, found in zip(SLOT_SIZES, by_size(packed, SLOT_SIZES), strict=True):
        assert np.abs(found[0].astype(int) - proxies.natural(view(rgb, SMALL, size))).max() <= 2  # two JPEG decoders


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CLIPFLOW_CACHE", str(tmp_path / "cache"))
    yield


def test_each_segment_gets_the_embeddings_of_its_own_size_and_training(tmp_path: Path, cache: None) -> None:
    config = ProxyConfig(natural_views=1, proxies_per_view=1)
    segments = (
        Segment(feature="block1.cls", size=64, training="paired"),
        Segment(feature="projected", size=224),
        Segment(feature="block1.cls", size=64),
    )
    spec = OPENAI_VIEW.model_copy(update={"sizes": (64, 224)})
    near = Place.at(str(tmp_path))
    read = read_and_distort(manifest(tmp_path), near, ImageLimits(), spec, segments, config, PARTS, InventoryOptions())
    tower = EncoderConfig(model=TEST_TOWER, pretrained="seed:0")
    encoder = Encoder(tower, segments, "cpu")
    table = Embed(tower, segments, encoder.fingerprint, 1)(read)
    assert "view" not in table.column_names
    for row, data in enumerate(read["view"].to_pylist()[:2]):
        packed = np.frombuffer(data, np.uint8).reshape(-1, 3 * (64 * 64 + 64 * 64 + 224 * 224)).copy()
        paired, plain, own = by_size(packed, (64, 64, 224))
        assert len(packed) == (1, 2)[row]
        for views, segment in ((paired, segments[0]), (own, segments[1]), (plain, segments[2])):
            wanted = encoder.encode(views, [segment])[segment.output]
            found = np.array(table[segment.name].to_pylist()[row], np.float32).reshape(len(packed), -1)
            np.testing.assert_array_equal(found, wanted)
    same = table[segments[0].name].to_pylist()[0] == table[segments[2].name].to_pylist()[0]
    other = table[segments[0].name].to_pylist()[1] == table[segments[2].name].to_pylist()[1]
    assert same and not other  # a calibration image is plain for a paired segment too
    assert [table[segment.name].to_pylist()[2] for segment in segments] == [[], [], []]


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 600),
    width=st.integers(1, 600),
    seed=st.integers(0, 1000),
    size=st.sampled_from([SIZE, 256, 336, 384, 448]),
)
def test_an_augmented_view_of_any_image_has_the_size_and_is_the_same_for_a_seed(
    height: int, width: int, seed: int, size: int
) -> None:
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    view = proxies.augmented(rgb, np.random.default_rng(seed), size)
    assert view.shape == (size, size, 3) and view.dtype == np.uint8
    np.testing.assert_array_equal(proxies.augmented(rgb, np.random.default_rng(seed), size), view)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (3, 4001)])
def test_tiny_and_very_elongated_images_keep_their_colour_when_augmented(shape: tuple[int, int]) -> None:
    rgb = np.full((*shape, 3), (200, 120, 40), np.uint8)
    for seed in range(8):
        view = proxies.augmented(rgb, np.random.default_rng(seed), SIZE).astype(int)
        assert view.shape == (SIZE, SIZE, 3)
        assert np.abs(view - (200, 120, 40)).max() == 0


def test_augmented_views_differ_by_seed_and_are_mirrored_half_the_time() -> None:
    ramp_image = np.repeat(np.tile(np.linspace(0, 255, 400), (300, 1))[:, :, None], 3, axis=2).astype(np.uint8)
    views = [proxies.augmented(ramp_image, np.random.default_rng(seed), SIZE).astype(int) for seed in range(60)]
    rises = np.array([view[:, -20:].mean() - view[:, :20].mean() for view in views])
    assert 15 < (rises > 0).sum() < 45
    # A view spans 80 to 100 % of 300 columns. The ramp has 255 grey levels over 400 columns.
    spans = np.abs(rises) * SIZE / (SIZE - 20)
    assert spans.min() > 0.78 * 300 * 255 / 400 and spans.max() < 1.02 * 300 * 255 / 400
    assert len({round(float(span), 3) for span in spans}) > 50


@each_size
def test_an_augmented_view_of_an_image_of_its_size_is_not_enlarged(size: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size, size + 76, 3), dtype=np.uint8)
    for seed in range(8):
        view = proxies.augmented(noise, np.random.default_rng(seed), size)
        assert any((crop == view).all() for k in range(77) for crop in _both_ways(noise[:, k : k + size]))


def _both_ways(view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return view, view[:, ::-1]
