"""The flow against autograd's Jacobian, numerical integration and the normal density of scipy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from clipflow_ray.config import FlowConfig
from clipflow_ray.model.flow import CouplingBlock, Flow

SMALL = FlowConfig(blocks=4, hidden=32)


def randomised(segments: tuple[int, ...], config: FlowConfig = SMALL, seed: int = 0, strength: float = 1.0) -> Flow:
    """A flow far from the identity, with scales and translations of order one in every block."""
    flow = Flow(segments, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            fan_in = parameter.shape[1] if parameter.ndim == 2 else 1
            deviation = strength / fan_in**0.5 if "subnet" in name else 0.3 * strength
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
    return flow.eval()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("segments", "config"),
    [
        ((8,), SMALL),
        ((9,), SMALL),
        ((5, 4), SMALL),
        ((64,), FlowConfig()),
        ((9,), FlowConfig(blocks=3, hidden=16, translation_clamp=0.5)),
    ],
)
@torch.no_grad()
def test_the_inverse_undoes_the_flow(segments: tuple[int, ...], config: FlowConfig) -> None:
    flow, x = randomised(segments, config, strength=0.5), normal(100, sum(segments))
    z, _ = flow.transform(x)
    assert (z - x).abs().mean() > 0.1
    assert (flow.inverse(z) - x).abs().max() < 1e-4
    assert (flow.transform(flow.inverse(x))[0] - x).abs().max() < 1e-4


@pytest.mark.parametrize("segments", [(8,), (9,), (5, 4)])
@pytest.mark.parametrize("translation_clamp", [None, 0.5])
def test_the_log_determinant_is_that_of_the_jacobian(
    segments: tuple[int, ...], translation_clamp: float | None
) -> None:
    flow = randomised(segments, FlowConfig(blocks=5, hidden=16, translation_clamp=translation_clamp)).double()
    first = flow.blocks[0]
    assert isinstance(first, CouplingBlock)
    with torch.no_grad():
        first.log_scale[0] = 3.0  # beyond the limit of 2, to which it is clamped
    x = normal(6, sum(segments)).double()
    _, log_det = flow.transform(x)
    for row, claimed in zip(x, log_det.sum(dim=1), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda r: flow.transform(r[None])[0][0], row)
        expected = torch.linalg.slogdet(jacobian).logabsdet
        assert abs(expected) > 0.1
        torch.testing.assert_close(claimed, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_likelihood_is_the_normal_density_of_the_latent_plus_the_log_determinant() -> None:
    flow, embeddings = randomised((12,)), normal(20, 12)
    result = flow(embeddings)
    z, log_det = flow.transform(flow.standardize(embeddings))
    np.testing.assert_allclose(result.log_base, stats.norm.logpdf(z.numpy()).sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(result.per_dim, (result.log_base + log_det[:, 0]) / 12, rtol=1e-5)


@torch.no_grad()
def test_a_new_flow_gives_the_standard_normal_density_of_standardised_features() -> None:
    flow, naturals = Flow((24,), FlowConfig()), normal(500, 24) * 3.0 + 1.0
    flow.fit_standardizer(naturals)
    raw = naturals.numpy().astype(np.float64)
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True) * np.sqrt(24)
    x = (unit - unit.mean(axis=0)) / unit.std(axis=0, ddof=1)
    result = flow(naturals)
    np.testing.assert_allclose(result.per_dim, stats.norm.logpdf(x).mean(axis=1), atol=1e-4)
    np.testing.assert_array_equal(result.log_det, 0.0)
    assert -result.per_dim.mean() == pytest.approx(1.4189, abs=5e-3)


@torch.no_grad()
def test_standardised_naturals_have_zero_mean_and_unit_deviation() -> None:
    flow = Flow((10, 6), SMALL)
    naturals = torch.cat([normal(300, 10) * 5 + 2, normal(300, 6, seed=2) * 0.01 + 0.1], dim=1)
    flow.fit_standardizer(naturals)
    x = flow.standardize(naturals)
    torch.testing.assert_close(x.mean(dim=0), torch.zeros(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(x.std(dim=0), torch.ones(16), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_dimension_that_never_varies_stays_finite() -> None:
    flow, naturals = Flow((6,), SMALL), torch.ones(50, 6)
    flow.fit_standardizer(naturals)
    assert flow(naturals).total.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 50))
@torch.no_grad()
def test_the_likelihood_does_not_depend_on_the_length_of_an_embedding(scale: float, seed: int) -> None:
    flow, embedding = randomised((8, 5), strength=0.5), normal(4, 13, seed=seed)
    torch.testing.assert_close(flow(embedding * scale).per_dim, flow(embedding).per_dim, rtol=1e-3, atol=1e-3)
    assert (flow(-embedding).per_dim - flow(embedding).per_dim).abs().max() > 0.01


@torch.no_grad()
def test_segments_are_normalised_separately() -> None:
    embedding = normal(5, 9)
    stretched = embedding * torch.tensor([7.0] * 4 + [1.0] * 5)
    two, one = randomised((4, 5)), randomised((9,))
    torch.testing.assert_close(two(stretched).total, two(embedding).total, rtol=1e-4, atol=1e-3)
    assert (one(stretched).total - one(embedding).total).abs().min() > 0.01
    parts = two.standardize(embedding).split([4, 5], dim=1)
    for part, width in zip(parts, (4, 5), strict=True):
        torch.testing.assert_close(part.norm(dim=1), torch.full((5,), width**0.5))


def test_every_parameter_gets_a_gradient_once_the_last_layer_is_not_zero() -> None:
    flow = Flow((16,), FlowConfig(blocks=3, hidden=24))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in flow.blocks:
            assert isinstance(block, CouplingBlock)
            last = block.subnet[-1]
            assert isinstance(last, nn.Linear)
            last.weight.add_(torch.randn(last.weight.shape, generator=generator) * 0.1)
    flow(normal(64, 16)).per_dim.mean().backward()
    silent = [n for n, p in flow.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@torch.no_grad()
def scales_and_translations(config: FlowConfig) -> tuple[Tensor, Tensor]:
    """exp(s) and t of a block with large weights, computed from its outputs for an active half of zeros and of ones."""
    torch.manual_seed(0)  # the same hidden layer for every config
    block = CouplingBlock(8, config, index=0)
    last = block.subnet[-1]
    assert isinstance(last, nn.Linear)
    last.weight.copy_(normal(*last.weight.shape) * 50)
    x = normal(200, 8)
    active = block.permutation[block.passive :]
    zero, one = x.index_fill(1, active, 0.0), x.index_fill(1, active, 1.0)
    t = block(zero)[0][:, block.passive :]
    return block(one)[0][:, block.passive :] - t, t


def test_the_translation_is_bounded_by_its_clamp_alone() -> None:
    _, free = scales_and_translations(FlowConfig(hidden=16))
    _, clamped = scales_and_translations(FlowConfig(hidden=16, translation_clamp=0.25))
    assert free.abs().max() > 5.0
    assert 0.24 < clamped.abs().max() <= 0.25
    assert (free.sign() == clamped.sign()).all()


def test_the_scale_of_a_block_stays_within_its_clamp() -> None:
    scales, _ = scales_and_translations(FlowConfig(hidden=16, clamp=0.7, translation_clamp=0.25))
    assert scales.min() >= np.exp(-0.7) - 1e-4 and scales.max() <= np.exp(0.7) + 1e-4
    assert scales.max() > np.exp(0.6) and scales.min() < np.exp(-0.6)


@torch.no_grad()
def test_the_learned_scale_of_a_dimension_stays_within_two_nats() -> None:
    block, x = CouplingBlock(6, SMALL, index=0), normal(3, 6)
    block.log_scale.copy_(torch.tensor([-9.0, -2.5, -1.0, 0.5, 2.5, 9.0]))
    expected = x[:, block.permutation] * torch.tensor([-2.0, -2.0, -1.0, 0.5, 2.0, 2.0]).exp()
    torch.testing.assert_close(block(x)[0], expected)


@torch.no_grad()
def test_segments_have_flows_of_their_own_whose_likelihoods_multiply() -> None:
    flow, x = randomised((6, 4), strength=0.5), normal(20, 10)
    flow.fit_standardizer(normal(200, 10, seed=2))
    alone = []
    for number, (width, first) in enumerate(((6, 0), (4, 6))):
        one = Flow((width,), SMALL).eval()
        one.mean.copy_(flow.mean[first : first + width])
        one.std.copy_(flow.std[first : first + width])
        one.blocks.load_state_dict(torch.nn.ModuleList(flow._stacks()[number]).state_dict())
        alone.append(one(x[:, first : first + width]))
    result = flow(x)
    torch.testing.assert_close(result.total, alone[0].total + alone[1].total)
    torch.testing.assert_close(result.per_segment, torch.stack([each.per_dim for each in alone], dim=1))
    torch.testing.assert_close(result.per_dim, result.total / 10)


@torch.no_grad()
def test_the_score_of_a_new_flow_is_the_negative_log_likelihood_per_dimension() -> None:
    flow, x = randomised((6, 4, 9), strength=0.5), normal(20, 19)
    torch.testing.assert_close(flow(x).score, -flow(x).per_dim)


@torch.no_grad()
def test_fit_scale_gives_each_segment_mean_zero_and_deviation_one_on_the_calibration() -> None:
    flow, calibration = randomised((6, 40, 9), strength=0.5).double(), normal(300, 55).double()
    before = flow(calibration)
    assert before.per_segment.std(dim=0).max() > 1.5 * before.per_segment.std(dim=0).min()
    flow.fit_scale(calibration)
    standard = (flow.centre - flow(calibration).per_segment) / flow.spread
    torch.testing.assert_close(standard.mean(dim=0), torch.zeros(3).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(standard.std(dim=0, correction=0), torch.ones(3).double(), rtol=0, atol=1e-9)
    after = flow(calibration)
    torch.testing.assert_close(after.score, standard.sum(dim=1))
    torch.testing.assert_close(after.total, before.total)  # the likelihood stays in nats
    other = normal(20, 55, seed=2).double()
    flow.fit_scale(calibration[:, torch.arange(55)])
    torch.testing.assert_close(flow(other).score, ((flow.centre - flow(other).per_segment) / flow.spread).sum(dim=1))


@torch.no_grad()
def test_a_segment_that_never_varies_on_the_calibration_stays_finite() -> None:
    flow = randomised((6, 4), strength=0.5)
    flow.fit_scale(normal(1, 10).repeat(30, 1))
    assert flow(normal(5, 10)).score.isfinite().all()


@pytest.mark.parametrize("seed", [0, 1, 2])
@torch.no_grad()
def test_the_density_integrates_to_one_in_two_dimensions(seed: int) -> None:
    flow = randomised((2,), FlowConfig(blocks=3, hidden=16, clamp=0.8), seed, strength=0.7)
    axis = torch.linspace(-15.0, 15.0, 1201)
    grid = torch.cartesian_prod(axis, axis)
    z, log_det = flow.transform(grid)
    log_density = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(dim=1) + log_det[:, 0]
    mass = log_density.double().exp().sum() * (axis[1] - axis[0]).double() ** 2
    assert float(mass) == pytest.approx(1.0, abs=5e-3)
