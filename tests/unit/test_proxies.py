"""Proxy families against their own claims, on a photo-like image with spectra computed here by full-plane FFTs."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import restoration

from clipflow_ray import images, proxies
from clipflow_ray.config import OPENAI_VIEW, ProxyConfig
from clipflow_ray.errors import ConfigError
from clipflow_ray.images import Pixels
from clipflow_ray.proxies import FAMILIES

SIZE = 224
LEARNED = [name for name in FAMILIES if name.startswith("learned_")]
CONFIG = ProxyConfig(families=ProxyConfig().families | {name: {"mix": (0.5, 1.0)} for name in LEARNED})
DRAWS = range(24)
FEW = range(2)
each_family = pytest.mark.parametrize("family", sorted(FAMILIES))
# The sizes of CLIP towers. No side of a patch divides 378, the size of ViT-H-14-378, except 2.
each_size = pytest.mark.parametrize("size", [SIZE, 336, 378, 448])


def radii_of(size: int) -> np.ndarray:
    result: np.ndarray = 2.0 * np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None, :])
    return result


radii = radii_of(SIZE)


@lru_cache
def photo_like(seed: int = 0, size: int = SIZE) -> np.ndarray:
    """uint8 [size, size, 3] with amplitude 1/f, correlated channels, and nothing near black or white."""
    rng = np.random.default_rng(seed)
    amplitude = 1.0 / np.maximum(radii_of(size), 2.0 / size)
    amplitude[0, 0] = 0.0
    shared, channels = rng.standard_normal((size, size)), []
    for mean in (118.0, 128.0, 136.0):
        noise = 0.8 * shared + 0.6 * rng.standard_normal((size, size))
        plane = np.fft.ifft2(np.fft.fft2(noise) * amplitude).real
        channels.append(mean + 22.0 * plane / plane.std())
    image: Pixels = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)
    return image


def source_of(size: int) -> np.ndarray:
    return photo_like(size=size).transpose(2, 0, 1).astype(np.float32)


VIEW = photo_like()
SOURCE = source_of(SIZE)


def spectrum(channels_first: np.ndarray) -> np.ndarray:
    return np.fft.fft2(channels_first.astype(np.float64), axes=(1, 2))


def applied(family: str, seed: int = 0, size: int = SIZE, **ranges: tuple[float, ...]) -> np.ndarray:
    """The family alone, float in and out, before clipping and rounding."""
    return FAMILIES[family](source_of(size), np.random.default_rng(seed), **ranges)


def drawn(family: str, draw: int, size: int = SIZE) -> np.ndarray:
    return proxies.proxy(photo_like(size=size), family, proxies.generator(0, "a.jpg", draw), CONFIG)


def log_energy_gain(view: np.ndarray, above: float) -> float:
    energies = [np.square(np.abs(spectrum(v.transpose(2, 0, 1))))[:, above < radii].mean() for v in (view, VIEW)]
    return float(np.log(energies[0] / energies[1]))


@each_family
def test_a_proxy_depends_on_its_seed_alone(family: str) -> None:
    first = drawn(family, 3)
    for other in FAMILIES:
        drawn(other, 4)
    np.random.default_rng().random(7)
    np.testing.assert_array_equal(drawn(family, 3), first)
    assert (drawn(family, 4) != first).any()


@each_family
def test_a_proxy_of_a_larger_view_depends_on_its_seed_alone(family: str) -> None:
    first = drawn(family, 3, 448)
    drawn(family, 4, 336)
    np.testing.assert_array_equal(drawn(family, 3, 448), first)
    assert (drawn(family, 4, 448) != first).any()


@each_size
@each_family
def test_a_proxy_is_a_changed_view_of_the_same_shape_and_mean_colour(family: str, size: int) -> None:
    view = photo_like(size=size)
    before = view.copy()
    for draw in DRAWS if size == SIZE else FEW:
        changed = drawn(family, draw, size)
        assert changed.dtype == np.uint8 and changed.shape == (size, size, 3)
        difference = changed.astype(float) - view
        assert difference.std() > 0.5
        assert np.abs(difference.mean(axis=(0, 1))).max() < 2.0
    np.testing.assert_array_equal(view, before)


def test_resampling_stripes_out_of_existence_keeps_their_mean_colour() -> None:
    stripes = np.full((SIZE, SIZE, 3), 100, np.uint8)
    stripes[:, ::2] = 150
    halving = ProxyConfig(families={"resample": {"factor": (2.0, 2.0)}})
    for draw in DRAWS:  # some of them by nearest neighbours, which see every second column alone
        changed = proxies.proxy(stripes, "resample", proxies.generator(0, "stripes", draw), halving)
        assert np.abs(changed.mean(axis=(0, 1)) - 125.0).max() < 1.0


@each_size
@pytest.mark.parametrize(
    ("family", "nothing"),
    [
        ("radial_gain_up", {"start": (0.3, 0.3), "log_gain": (0.0, 0.0)}),
        ("replicas", {"factors": (2, 4), "mix": (0.0, 0.0)}),
        ("log_amplitude_field", {"sigma": (0.0, 0.0), "start": (0.1, 0.1)}),
        ("phase_jitter", {"start": (0.2, 0.2), "sigma": (0.0, 0.0)}),
        ("lattice_peaks", {"periods": (2, 4, 8, 16), "amplitude": (0.0, 0.0)}),
        ("resample", {"factor": (1.0, 1.0)}),
        ("self_blend", {"shift": (1.0, 3.0), "mix": (0.0, 0.0)}),
        ("texture_loss", {"radius": (2.0, 2.0), "level": (10.0, 10.0), "mix": (0.0, 0.0)}),
        ("tone", {"contrast": (0.0, 0.0), "saturation": (0.0, 0.0), "min_change": (0.0,)}),
        ("rotated_amplitude", {"start": (0.1, 0.1), "mix": (0.0, 0.0)}),
        ("warp", {"cells": (8, 8), "shift": (0.0, 0.0)}),
        ("defocus", {"sigma": (0.0, 0.0), "area": (0.5, 0.5)}),
        ("halo", {"sigma": (2.0, 2.0), "amount": (0.0, 0.0)}),
        ("glow", {"sigma": (4.0, 4.0), "mix": (0.0, 0.0)}),
        ("chroma_bleed", {"sigma": (0.0, 0.0), "shift": (0.0, 0.0)}),
        ("median", {"radius": (1, 1), "mix": (0.0, 0.0)}),
        ("palette", {"colours": (16.0, 16.0), "mix": (0.0, 0.0)}),
        ("patch_bottleneck", {"sides": (4, 8), "kept": (1.0, 1.0)}),
        ("patch_resynthesis", {"sides": (4, 8), "mix": (0.0, 0.0)}),
        ("amplitude_transplant", {"start": (0.1, 0.1), "mix": (0.0, 0.0)}),
        ("chroma_gain", {"start": (0.1, 0.1), "log_gain": (0.0, 0.0)}),
        ("dct_shrinkage", {"sides": (2, 4, 8, 16), "level": (1e-4, 1e-4)}),
        ("total_variation", {"level": (9.0, 9.0), "mix": (0.0, 0.0)}),
        ("non_local_means", {"level": (9.0, 9.0), "mix": (0.0, 0.0)}),
        ("bilateral", {"sigma": (2.0, 2.0), "level": (20.0, 20.0), "mix": (0.0, 0.0)}),
        *((name, {"mix": (0.0, 0.0)}) for name in LEARNED),
    ],
)
def test_a_family_of_no_strength_changes_nothing(family: str, nothing: dict[str, tuple[float, ...]], size: int) -> None:
    for seed in DRAWS if size == SIZE else FEW:
        np.testing.assert_allclose(applied(family, seed, size, **nothing), source_of(size), atol=0.01)


def ramp(radius: np.ndarray, start: float) -> np.ndarray:
    return np.clip((radius - start) / (1.0 - start), 0.0, 1.0)


@each_size
@pytest.mark.parametrize(
    ("family", "ranges", "expected"),
    [
        ("radial_gain_up", {"start": (0.3, 0.3), "log_gain": (0.9, 0.9)}, lambda r: np.exp(0.9 * ramp(r, 0.3))),
        ("radial_gain_down", {"start": (0.2, 0.2), "log_gain": (1.1, 1.1)}, lambda r: np.exp(-1.1 * ramp(r, 0.2))),
        ("low_pass", {"cutoff": (0.5, 0.5), "order": (3.0, 3.0)}, lambda r: (1.0 + (r / 0.5) ** 6) ** -0.5),
        (
            "slope",
            {"start": (0.1, 0.1), "exponent": (0.4, 0.4), "min_magnitude": (0.1,)},
            lambda r: np.maximum(r / 0.1, 1.0) ** -0.4,
        ),
        (
            "slope",
            {"start": (0.1, 0.1), "exponent": (-0.01, -0.01), "min_magnitude": (0.2,)},
            lambda r: np.maximum(r / 0.1, 1.0) ** 0.2,
        ),
    ],
)
def test_a_radial_family_multiplies_the_amplitude_by_its_formula(
    family: str, ranges: dict[str, Any], expected: Callable[[np.ndarray], np.ndarray], size: int
) -> None:
    ratio = spectrum(applied(family, size=size, **ranges)) / spectrum(source_of(size))
    wanted = np.broadcast_to(expected(radii_of(size)), ratio.shape)
    np.testing.assert_allclose(ratio.real, wanted, rtol=2e-2, atol=2e-3)
    np.testing.assert_allclose(ratio.imag, 0.0, atol=2e-2)


@pytest.mark.parametrize(
    ("family", "low", "high"),
    [
        ("radial_gain_up", 0.05, 5.0),
        ("radial_gain_down", -5.0, -0.05),
        ("low_pass", -20.0, -0.3),
        ("resample", -20.0, -0.3),
    ],
)
def test_the_default_ranges_move_the_high_band_the_claimed_way(family: str, low: float, high: float) -> None:
    gains = [log_energy_gain(drawn(family, draw), above=0.7) for draw in DRAWS]
    assert low < min(gains) and max(gains) < high


def test_slope_moves_the_high_band_up_and_down_and_never_leaves_it() -> None:
    gains = np.array([log_energy_gain(drawn("slope", draw), above=0.7) for draw in range(24)])
    assert (np.abs(gains) > 0.15).all()
    assert (gains > 0).any() and (gains < 0).any()


@pytest.mark.parametrize("period", [2, 4, 8, 16])
def test_lattice_peaks_stand_at_multiples_of_the_size_over_the_period(period: int) -> None:
    added = applied("lattice_peaks", periods=(period,), amplitude=(4.0, 4.0)) - SOURCE
    energy = np.square(np.abs(spectrum(added)))[0]
    step = SIZE // period
    lattice = energy[::step, ::step].copy()
    lattice[0, 0] = 0.0
    assert lattice.sum() > 0.7 * energy.sum()  # the rest is the modulation by local contrast around each peak
    assert added.std() == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize("factor", [2, 4])
def test_replicas_put_copies_of_the_low_band_above_and_keep_it_below(factor: int) -> None:
    source = np.stack([photo_like(seed)[:, :, 0] for seed in range(3)]).astype(np.float32)  # unrelated channels
    before = spectrum(source)
    bins = (np.arange(SIZE) + SIZE // (2 * factor)) % (SIZE // factor) - SIZE // (2 * factor)
    copied = before[:, bins][:, :, bins]  # what a strided sampling shows at each frequency
    origin = radii[bins][:, bins]
    above = (radii > 1.0 / factor + 0.12) & (origin > 0) & (origin < 0.9 / factor)
    below = radii < 1.0 / factor - 0.02

    def coherence(after: np.ndarray) -> float:
        # The kernel's gain is unknown here but the same for all channels, so it cancels between two of them.
        left, right = after[0] * copied[1], after[1] * copied[0]
        return float(np.cos(np.angle(left * right.conj()))[above].mean())

    assert abs(coherence(before)) < 0.05
    found = []
    for seed in DRAWS:  # all three ways of enlarging; the softest is partly drowned by its own border
        changed = FAMILIES["replicas"](source, np.random.default_rng(seed), factors=(factor,), mix=(1.0, 1.0))
        after = spectrum(changed)
        np.testing.assert_allclose(after[:, below], before[:, below], rtol=1e-3, atol=1.0)
        found.append(coherence(after))
    assert min(found) > 0.2 and max(found) > 0.99


@pytest.mark.parametrize("family", ["radial_gain_up", "low_pass", "slope", "replicas", "phase_jitter", "self_blend"])
def test_a_flat_view_has_no_spectrum_to_change(family: str) -> None:
    flat = np.full((SIZE, SIZE, 3), (90, 128, 170), np.uint8)
    for draw in DRAWS:
        changed = proxies.proxy(flat, family, proxies.generator(0, "flat", draw), CONFIG)
        np.testing.assert_array_equal(changed, flat)


def test_phase_jitter_changes_phases_above_the_start_and_no_amplitude() -> None:
    before, after = spectrum(SOURCE), spectrum(applied("phase_jitter", start=(0.3, 0.3), sigma=(0.8, 0.8)))
    low, high = radii < 0.29, radii > 0.5
    np.testing.assert_allclose(after[:, low], before[:, low], rtol=1e-3, atol=1.0)
    assert np.angle(after / before)[:, high].std() == pytest.approx(0.8, rel=0.1)
    # Bins that are their own conjugate hold a real number, which has no phase to turn.
    free = np.ones((SIZE, SIZE), bool)
    free[:: SIZE // 2, :: SIZE // 2] = False
    ratio = (np.abs(after) / np.abs(before))[:, free & (radii > 0)]
    np.testing.assert_allclose(ratio, 1.0, atol=1e-2)


def test_the_log_amplitude_field_has_its_deviation_and_is_smooth_where_frequencies_adjoin() -> None:
    gain = spectrum(applied("log_amplitude_field", sigma=(0.4, 0.4), start=(0.0, 0.0))) / spectrum(SOURCE)
    field = np.fft.fftshift(np.log(np.abs(gain[0])))
    centre = SIZE // 2
    assert field[np.fft.fftshift(radii) > 0.15].std() == pytest.approx(0.4, rel=0.25)
    # One of two conjugate half planes is drawn; columns 0 and Nyquist, where they meet, are averages of both.
    half = field[1:, centre + 20 : -1]
    steps = np.abs(np.diff(half, axis=0)).mean(axis=1)
    assert steps.max() < 0.1, f"a jump of {steps.max():.2f} between rows {steps.argmax()} and {steps.argmax() + 1}"


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), levels=st.sampled_from([2, 3, 256]), scale=st.sampled_from([1, 85, 255]))
def test_the_natural_round_trip_keeps_every_8_bit_view(seed: int, levels: int, scale: int) -> None:
    drawn_levels = np.random.default_rng(seed).integers(0, levels, (SIZE, SIZE, 3))
    view = np.minimum(drawn_levels * scale, 255).astype(np.uint8)
    kept = proxies.natural(view)
    assert kept.dtype == np.uint8
    np.testing.assert_array_equal(kept, view)


@pytest.mark.parametrize("families", [{}, {"low_pass": {}, "sepia": {}}])
def test_an_unknown_family_or_none_is_refused_with_the_list_of_those_there(families: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="phase_jitter") as refusal:
        proxies.check(ProxyConfig(families=families))
    assert all(name in str(refusal.value) for name in set(families) - set(FAMILIES))


def test_the_default_families_are_all_there() -> None:
    proxies.check(CONFIG)
    assert set(CONFIG.families) == set(FAMILIES)
    assert not set(LEARNED) & set(ProxyConfig().families)


def test_each_seed_row_and_draw_has_its_own_random_stream() -> None:
    keys = [(s, row, *draw) for s in (0, 1) for row in ("a", "b", "1/a") for draw in ((), (0,), (1,), (0, 1), (1, 0))]
    streams = {tuple(proxies.generator(*key).integers(2**62, size=2).tolist()) for key in keys}
    assert len(streams) == len(keys)
    again = proxies.generator(*keys[0]).integers(2**62, size=2)
    np.testing.assert_array_equal(again, proxies.generator(*keys[0]).integers(2**62, size=2))


def test_texture_loss_takes_weak_detail_and_leaves_edges() -> None:
    rng = np.random.default_rng(0)
    step = np.repeat(np.where(np.arange(SIZE) < SIZE // 2, 60.0, 190.0)[None, :], SIZE, axis=0)
    noisy = np.repeat((step + 4.0 * rng.standard_normal((SIZE, SIZE)))[None], 3, axis=0).astype(np.float32)
    ranges = {"radius": (3.0, 3.0), "level": (16.0, 16.0), "mix": (1.0, 1.0)}
    smooth = FAMILIES["texture_loss"](noisy, rng, **ranges)
    assert (smooth - step)[:, 20:-20, 20:80].std() < 0.25 * (noisy - step)[:, 20:-20, 20:80].std()
    edge = smooth[:, :, SIZE // 2].mean() - smooth[:, :, SIZE // 2 - 1].mean()
    assert edge > 0.9 * 130.0


def test_tone_scales_contrast_and_colour_by_its_draws() -> None:
    ranges: dict[str, Any] = {"contrast": (0.3, 0.3), "saturation": (-0.4, -0.4), "min_change": (0.1,)}
    changed = applied("tone", **ranges)
    grey, before = changed.mean(axis=0), SOURCE.mean(axis=0)
    assert grey.std() / before.std() == pytest.approx(np.exp(0.3), rel=1e-3)
    assert (changed - grey).std() / (SOURCE - before).std() == pytest.approx(np.exp(-0.1), rel=1e-3)


def test_tone_never_changes_less_than_it_must() -> None:
    ranges: dict[str, Any] = {"contrast": (0.01, 0.01), "saturation": (-0.02, -0.02), "min_change": (0.25,)}
    changed = applied("tone", **ranges)
    assert changed.mean(axis=0).std() / SOURCE.mean(axis=0).std() == pytest.approx(np.exp(0.125), rel=1e-3)


def test_rotated_amplitude_swaps_power_between_directions_and_keeps_phases() -> None:
    before, after = spectrum(SOURCE), spectrum(applied("rotated_amplitude", start=(0.0, 0.0), mix=(1.0, 1.0)))
    band = radii > 0.2
    np.testing.assert_allclose(np.abs(after)[:, band], np.abs(before.transpose(0, 2, 1))[:, band], rtol=0.1, atol=50.0)
    assert np.abs(np.angle(after / before)[:, band]).max() < 0.1


def test_an_amplitude_transplant_keeps_phases_and_takes_the_amplitude_of_one_of_several_photographs() -> None:
    ranges: dict[str, Any] = {"start": (0.2, 0.2), "mix": (1.0, 1.0)}
    before, band = spectrum(SOURCE), radii > 0.35
    donors = {}
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "gravel.png", "motorcycle_left.png", "rocket.jpg"):
        rgb = np.array(Image.open(Path(skimage.data.__file__).parent / name).convert("RGB"))
        donors[name] = np.abs(spectrum(images.view(rgb, OPENAI_VIEW, 224).transpose(2, 0, 1)))[:, band]
    taken = set()
    for seed in range(12):
        after = spectrum(applied("amplitude_transplant", seed, **ranges))
        assert np.abs(np.angle(after / before)[:, band & (np.abs(after[0]) > 100.0)]).max() < 0.1
        np.testing.assert_allclose(after[:, radii < 0.19], before[:, radii < 0.19], rtol=1e-3, atol=1.0)
        apart = {name: np.median(np.abs(np.log(np.abs(after)[:, band] / own))) for name, own in donors.items()}
        nearest = min(apart, key=lambda name: apart[name])
        assert apart[nearest] < 0.02 < 0.3 < sorted(apart.values())[1]
        taken.add(nearest)
    assert len(taken) >= 3


@pytest.mark.parametrize(
    ("size", "names"),
    [
        (336, {"astronaut.png", "coffee.png", "gravel.png", "motorcycle_left.png", "rocket.jpg"}),
        (448, {"astronaut.png", "gravel.png", "motorcycle_left.png"}),
    ],
)
def test_an_amplitude_transplant_takes_photographs_that_are_large_enough(size: int, names: set[str]) -> None:
    band = radii_of(size) > 0.35
    donors = {}
    for name in names:
        with Image.open(Path(skimage.data.__file__).parent / name) as opened:
            width, height = (size * side // min(opened.size) for side in opened.size)
            rgb = np.asarray(opened.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
        top, left = round((height - size) / 2.0), round((width - size) / 2.0)
        donors[name] = np.abs(spectrum(rgb[top : top + size, left : left + size].transpose(2, 0, 1)))[:, band]
    taken = set()
    for seed in range(24):
        after = spectrum(applied("amplitude_transplant", seed, size, start=(0.2, 0.2), mix=(1.0, 1.0)))
        apart = {name: np.median(np.abs(np.log(np.abs(after)[:, band] / own))) for name, own in donors.items()}
        nearest = min(apart, key=lambda name: apart[name])
        assert apart[nearest] < 0.02 < 0.3 < sorted(apart.values())[1]
        taken.add(nearest)
    assert taken == names


def test_an_amplitude_transplant_enlarges_the_photographs_if_none_is_large_enough() -> None:
    applied("amplitude_transplant", size=520, start=(0.2, 0.2), mix=(1.0, 1.0))


def test_chroma_gain_moves_colour_up_and_down_and_keeps_luminance() -> None:
    ranges: dict[str, Any] = {"start": (0.2, 0.2), "log_gain": (1.5, 1.5)}
    colour = np.square(np.abs(spectrum(SOURCE - SOURCE.mean(axis=0))))[:, radii > 0.7].mean()
    gains = []
    for seed in DRAWS:
        changed = applied("chroma_gain", seed, **ranges)
        np.testing.assert_allclose(changed.mean(axis=0), SOURCE.mean(axis=0), atol=0.01)
        now = np.square(np.abs(spectrum(changed - changed.mean(axis=0))))[:, radii > 0.7].mean()
        gains.append(0.5 * np.log(now / colour))
    assert -1.5 < min(gains) < -0.5 and 0.5 < max(gains) < 1.5


@pytest.mark.parametrize(
    ("family", "ranges"),
    [
        ("dct_shrinkage", {"sides": (8,), "level": (16.0, 16.0)}),
        ("total_variation", {"level": (25.0, 25.0), "mix": (1.0, 1.0)}),
        ("non_local_means", {"level": (10.0, 10.0), "mix": (1.0, 1.0)}),
        ("bilateral", {"sigma": (2.0, 2.0), "level": (40.0, 40.0), "mix": (1.0, 1.0)}),
    ],
)
def test_a_denoiser_takes_weak_noise_and_leaves_edges(family: str, ranges: dict[str, tuple[float, ...]]) -> None:
    rng = np.random.default_rng(0)
    step = np.repeat(np.where(np.arange(SIZE) < SIZE // 2, 60.0, 190.0)[None, :], SIZE, axis=0)
    noisy = np.repeat((step + 5.0 * rng.standard_normal((SIZE, SIZE)))[None], 3, axis=0).astype(np.float32)
    smooth = FAMILIES[family](noisy, rng, **ranges)
    assert (smooth - step)[:, 20:-20, 20:80].std() < 0.5 * (noisy - step)[:, 20:-20, 20:80].std()
    edge = smooth[:, :, SIZE // 2 + 1].mean() - smooth[:, :, SIZE // 2 - 2].mean()
    assert edge > 0.8 * 130.0


@each_size
@pytest.mark.parametrize("family", ["dct_shrinkage", "total_variation", "non_local_means", "bilateral"])
def test_a_denoiser_leaves_a_flat_view_as_it_is_up_to_its_border(family: str, size: int) -> None:
    flat = np.full((3, size, size), 90.0, np.float32)
    for seed in range(4):
        changed = FAMILIES[family](flat, np.random.default_rng(seed), **CONFIG.families[family])
        np.testing.assert_allclose(changed, 90.0, atol=0.3)


@each_size
@pytest.mark.parametrize(("sigma", "level"), [(1.0, 10.0), (1.7, 25.0), (2.0, 40.0)])
def test_the_bilateral_filter_is_that_of_scikit_image(sigma: float, level: float, size: int) -> None:
    pixels = np.ascontiguousarray(photo_like(size=size) / np.float32(255.0))
    wanted = restoration.denoise_bilateral(
        pixels, sigma_color=level / 255.0 / np.sqrt(3.0), sigma_spatial=sigma, mode="symmetric", channel_axis=-1
    )
    found = applied("bilateral", size=size, sigma=(sigma, sigma), level=(level, level), mix=(1.0, 1.0))
    # scikit-image rounds colour distances to 10,000 steps. A later release than 0.26 may correct its spatial weights:
    # then keep ours, and drop this test.
    np.testing.assert_allclose(found, 255.0 * wanted.transpose(2, 0, 1), atol=0.3)


def test_a_dct_shrinkage_in_blocks_of_two_takes_haar_details_below_its_level() -> None:
    pixels = np.zeros((3, SIZE, SIZE), np.float32) + 128.0
    pixels[:, ::2, ::2] += 8.0  # details of 4 in each block for any shift of the grid
    ranges = {"sides": (2,), "level": (5.0, 5.0)}
    changed = FAMILIES["dct_shrinkage"](pixels, np.random.default_rng(0), **ranges)
    np.testing.assert_allclose(changed, 130.0, atol=1e-3)


def test_pairs_are_as_frequent_as_asked_and_apply_one_family_after_another() -> None:
    families = {name: CONFIG.families[name] for name in ("low_pass", "tone", "resample")}
    config = ProxyConfig(families=families, pairs=0.4)
    labels = [proxies.label("tone", proxies.generator(0, "a", number), config) for number in range(200)]
    assert set(labels) == {"tone", "tone+low_pass", "tone+resample"}
    assert 50 < sum("+" in label for label in labels) < 110
    for label in set(labels):
        made = proxies.drawn(VIEW, label, proxies.generator(0, "b"), config)
        rng, expected = proxies.generator(0, "b"), VIEW
        for family in label.split("+"):
            expected = proxies.proxy(expected, family, rng, config)
        np.testing.assert_array_equal(made, expected)


def test_a_pair_involves_both_of_its_families() -> None:
    labels = np.array(["tone", "tone+low_pass", "natural", "low_pass+resample"])
    assert proxies.involves(labels, ["low_pass"]).tolist() == [False, True, False, True]
    assert proxies.involves(labels, ["tone", "resample"]).tolist() == [True, True, False, True]
    assert proxies.involves(labels, ["pass"]).tolist() == [False] * 4
    assert proxies.merged(labels).tolist() == ["tone", "pairs", "natural", "pairs"]


def test_warp_moves_pixels_by_about_the_shift_and_makes_no_new_colours() -> None:
    column = np.broadcast_to(np.arange(SIZE, dtype=np.float32), (3, SIZE, SIZE))
    moved = FAMILIES["warp"](column, np.random.default_rng(0), cells=(8, 8), shift=(2.0, 2.0))
    shift = (moved - column)[:, 20:-20, 20:-20]
    assert 1.0 < shift.std() < 3.0
    assert np.abs(np.diff(shift, axis=2)).max() < 1.0  # smooth: neighbours move together


def test_defocus_blurs_one_part_and_leaves_another_as_it_was() -> None:
    changed = applied("defocus", sigma=(4.0, 4.0), area=(0.5, 0.5))
    difference = np.abs(changed - SOURCE).max(axis=0)
    assert 0.2 < (difference < 1e-3).mean() < 0.8
    assert difference.max() > 10.0


def test_halo_amplifies_what_a_blur_takes_away() -> None:
    low, high = (log_gain_of("halo", band, sigma=(2.0, 2.0), amount=(1.0, 1.0)) for band in ((0, 0.02), (0.5, 1)))
    assert abs(low) < 0.1 and high == pytest.approx(2.0 * np.log(2.0), abs=0.05)


def log_gain_of(family: str, band: tuple[float, float], **ranges: Any) -> float:
    inside = (radii > band[0]) & (radii <= band[1])
    energy = [np.square(np.abs(spectrum(v)))[:, inside].mean() for v in (applied(family, **ranges), SOURCE)]
    return float(np.log(energy[0] / energy[1]))


def test_glow_darkens_nothing() -> None:
    changed = applied("glow", sigma=(6.0, 6.0), mix=(0.7, 0.7))
    assert (changed - SOURCE).min() > -1e-3 and (changed - SOURCE).mean() > 10.0


def test_chroma_bleed_keeps_luminance_and_softens_colour() -> None:
    changed = applied("chroma_bleed", sigma=(4.0, 4.0), shift=(0.0, 3.0))
    np.testing.assert_allclose(changed.mean(axis=0), SOURCE.mean(axis=0), atol=0.01)
    colour, before = changed - changed.mean(axis=0), SOURCE - SOURCE.mean(axis=0)
    assert np.abs(np.diff(colour, axis=2)).mean() < 0.3 * np.abs(np.diff(before, axis=2)).mean()


def test_a_median_takes_specks_and_leaves_edges() -> None:
    step = np.repeat(np.where(np.arange(SIZE) < SIZE // 2, 60.0, 190.0)[None, :], SIZE, axis=0)
    speckled = np.repeat(step[None], 3, axis=0).astype(np.float32)
    speckled[:, 5::20, 5::20] = 255.0
    changed = FAMILIES["median"](speckled, np.random.default_rng(0), radius=(1, 1), mix=(1.0, 1.0))
    np.testing.assert_array_equal(changed, np.broadcast_to(step, changed.shape))


@pytest.mark.parametrize("colours", [8.0, 32.0])
def test_a_palette_has_as_many_colours_as_drawn(colours: float) -> None:
    changed = applied("palette", colours=(colours, colours), mix=(1.0, 1.0))
    assert len(np.unique(changed.reshape(3, -1), axis=1).T) in range(int(colours) // 2, int(colours) + 1)


@pytest.mark.parametrize("size", [SIZE, 336, 448])
@pytest.mark.parametrize("side", [4, 8])
def test_a_patch_bottleneck_leaves_patches_of_the_drawn_rank(side: int, size: int) -> None:
    changed = applied("patch_bottleneck", size=size, sides=(side,), kept=(0.1, 0.1))
    patches = patches_of(changed, side)
    values = np.linalg.svd(patches - patches.mean(axis=0), compute_uv=False)
    kept = round(0.1 * 3 * side * side)
    assert values[kept] < 1e-3 * values[0] < values[kept - 1]


@pytest.mark.parametrize("size", [SIZE, 336, 448])
@pytest.mark.parametrize("side", [4, 8])
def test_patch_resynthesis_keeps_the_brightness_of_each_patch_and_shows_what_was_elsewhere(
    side: int, size: int
) -> None:
    changed = applied("patch_resynthesis", size=size, sides=(side,), mix=(1.0, 1.0))
    before, after = patches_of(source_of(size), side), patches_of(changed, side)
    np.testing.assert_allclose(after.mean(axis=1), before.mean(axis=1), atol=0.01)
    assert (np.abs(after - before).max(axis=1) > 1.0).mean() > 0.9
    assert (after - before).std() < before.std()  # the nearest, not just any


def test_patch_resynthesis_takes_the_nearest_patch_of_the_same_block() -> None:
    side, size, half = 8, 448, 224
    changed = applied("patch_resynthesis", seed=5, size=size, sides=(side,), mix=(1.0, 1.0))
    rng = np.random.default_rng(5)
    rng.choice((side,))
    dy, dx = rng.integers(1, side, size=2)
    shifted = np.roll(source_of(size), (-dy, -dx), axis=(1, 2))
    for block in [(slice(None), rows, columns) for rows in _halves(half) for columns in _halves(half)]:
        before, candidates = patches_of(source_of(size)[block], side), patches_of(shifted[block], side)
        after = patches_of(changed[block], side)
        own, others, made = (each - each.mean(axis=1, keepdims=True) for each in (before, candidates, after))
        for at in range(0, len(own), 97):
            apart = np.square(others.astype(np.float64) - own[at]).sum(axis=1)
            np.testing.assert_allclose(np.square(made[at] - own[at]).sum(), apart.min(), rtol=1e-3)


def _halves(half: int) -> tuple[slice, slice]:
    return slice(0, half), slice(half, 2 * half)


def patches_of(planes: np.ndarray, side: int) -> np.ndarray:
    size = planes.shape[1]
    rows, columns = np.ogrid[0:size:side, 0:size:side]
    cells = [planes[:, y : y + side, x : x + side].ravel() for y in rows.ravel() for x in columns.ravel()]
    return np.stack(cells)
