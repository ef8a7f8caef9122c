"""The natural views of an image that training uses, and their proxies."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipflow_ray import proxies
from clipflow_ray.config import OPENAI_VIEW, ProxyConfig
from clipflow_ray.train.views import distorted

SIZE = 224
each_size = pytest.mark.parametrize("size", [SIZE, 336, 448])


def test_pairs_change_proxies_and_leave_natural_views_as_they_are() -> None:
    rgb = np.random.default_rng(0).integers(60, 200, (300, 260, 3), dtype=np.uint8)
    families = {name: ProxyConfig().families[name] for name in ("low_pass", "tone")}
    single, paired = (
        distorted(rgb, "a.jpg", OPENAI_VIEW, ProxyConfig(families=families, pairs=share)) for share in (0.0, 0.9999)
    )
    assert [label for label, _ in single][::2] == [label for label, _ in paired][::2] == ["natural", "natural"]
    for (label, alone), (both, changed) in zip(single, paired, strict=True):
        assert both == (label if label == "natural" else f"{label}+{'tone' if label == 'low_pass' else 'low_pass'}")
        assert (alone == changed).all() == (label == "natural")


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
