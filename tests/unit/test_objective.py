"""The training objectives: the signs and limits of their gradients, and finite values for any input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipflow_ray.config import ObjectiveConfig
from clipflow_ray.model.objective import Objective

KINDS = ["proxy", "both", "both_logsig", "natural"]
EXTREMES = [-1e6, -100.0, -1.4, -0.0, 0.0, 1.4, 100.0, 1e6]


def objective(kind: str, boundary: float = -1.5, **settings_: float) -> Objective:
    result = Objective(ObjectiveConfig(kind=kind, **settings_))
    result.anchor(torch.tensor([boundary]))
    return result


def loss_and_gradients(loss: Objective, natural: list[float], proxy: list[float]) -> tuple[float, Tensor, Tensor]:
    n, p = torch.tensor(natural, requires_grad=True), torch.tensor(proxy, requires_grad=True)
    value = loss(n, p)
    value.backward()
    to_natural, to_proxy = (t.grad if t.grad is not None else torch.zeros_like(t) for t in (n, p))
    return float(value.detach()), to_natural, to_proxy


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(
    natural=st.lists(st.sampled_from(EXTREMES) | st.floats(-1e6, 1e6, width=32), min_size=1, max_size=6),
    proxy=st.lists(st.sampled_from(EXTREMES) | st.floats(-1e6, 1e6, width=32), min_size=1, max_size=6),
)
def test_loss_and_gradients_are_finite_on_any_likelihoods(kind: str, natural: list[float], proxy: list[float]) -> None:
    value, to_natural, to_proxy = loss_and_gradients(objective(kind), natural, proxy)
    assert np.isfinite(value)
    assert to_natural.isfinite().all() and to_proxy.isfinite().all()
    # For every batch: no natural is pushed down, no proxy is pushed up, and gradients are bounded.
    assert (to_natural <= 0).all() and (to_proxy >= 0).all()
    assert to_natural.abs().sum() <= 1.001 and to_proxy.abs().sum() <= 1.001


@pytest.mark.parametrize(("kind", "far"), [("proxy", -5.0), ("both", -5.0), ("both_logsig", -25.0)])
def test_a_proxy_far_below_the_boundary_stops_contributing(kind: str, far: float) -> None:
    loss = objective(kind)
    value, _, gradient = loss_and_gradients(loss, [-1.4, -1.3], [far, -1e6])
    assert gradient.abs().max() < 1e-9
    without_proxies = {"proxy": 0.0, "both": 1.35, "both_logsig": float(np.logaddexp(0, [1.4, 1.3]).mean())}
    assert value == pytest.approx(without_proxies[kind], abs=1e-6)


@pytest.mark.parametrize("kind", ["proxy", "both", "both_logsig"])
def test_a_proxy_above_the_boundary_is_pushed_down(kind: str) -> None:
    _, _, gradient = loss_and_gradients(objective(kind), [-1.4, -1.4], [1.0, 1.0])
    assert (gradient > 0.3).all()


@pytest.mark.parametrize("kind", ["natural", "both", "both_logsig"])
def test_naturals_are_pushed_up(kind: str) -> None:
    _, gradient, _ = loss_and_gradients(objective(kind), [-1.4, -3.0], [-1.0])
    assert (gradient < -0.3).all()


def test_the_natural_objective_is_mean_negative_likelihood_and_ignores_proxies() -> None:
    for proxy in ([0.0], [1e6, -1e6]):
        value, _, gradient = loss_and_gradients(objective("natural"), [-1.0, -2.0, -6.0], proxy)
        assert value == pytest.approx(3.0)
        assert not gradient.any()


def test_the_proxy_objective_gives_naturals_no_gradient() -> None:
    _, gradient, _ = loss_and_gradients(objective("proxy"), [-1.0, 1e6], [0.0])
    assert not gradient.any()


@settings(max_examples=30, deadline=None)
@given(
    boundary=st.floats(-5, 5),
    margin=st.floats(0, 2),
    temperature=st.floats(0.01, 1),
    weight=st.floats(0, 3),
    proxy=st.lists(st.floats(-10, 10), min_size=1, max_size=5),
)
def test_the_proxy_term_is_a_soft_hinge_at_the_margin_below_the_boundary(
    boundary: float, margin: float, temperature: float, weight: float, proxy: list[float]
) -> None:
    settings_ = {"margin": margin, "temperature": temperature, "proxy_weight": weight}
    value, _, _ = loss_and_gradients(objective("proxy", boundary, **settings_), [0.0], proxy)
    excess = np.array(proxy) - (boundary - margin)
    expected = weight * temperature * np.logaddexp(0.0, excess / temperature).mean()
    assert value == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert value >= 0.0
    both, _, _ = loss_and_gradients(objective("both", boundary, **settings_), [-1.25, -1.75], proxy)
    assert both == pytest.approx(expected + 1.5, rel=1e-3, abs=1e-4)


def test_the_logsigmoid_pair_is_the_cross_entropy_of_its_two_classes() -> None:
    natural, proxy = [-1.0, 0.5], [-2.0, 0.0, 1.0]
    value, _, _ = loss_and_gradients(objective("both_logsig", proxy_weight=0.7), natural, proxy)
    sigmoid = [1 / (1 + np.exp(-np.array(values))) for values in (natural, proxy)]
    assert value == pytest.approx(-np.log(sigmoid[0]).mean() - 0.7 * np.log(1 - sigmoid[1]).mean(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_boundary_starts_at_the_five_percent_quantile_of_naturals(kind: str) -> None:
    values = np.random.default_rng(0).normal(-1.4, 0.2, 1000).astype(np.float32)
    loss = Objective(ObjectiveConfig(kind=kind))
    loss.anchor(torch.from_numpy(values).requires_grad_())
    assert float(loss.boundary) == pytest.approx(np.quantile(values, 0.05), abs=1e-5)
    assert not loss.boundary.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_several_segments_is_the_mean_of_theirs(kind: str) -> None:
    natural, proxy = torch.randn(40, 2) - 1.0, torch.randn(30, 2) * 2.0
    both, alone = Objective(ObjectiveConfig(kind=kind), 2), []
    both.anchor(natural)
    for at in (0, 1):
        one = Objective(ObjectiveConfig(kind=kind))
        one.anchor(natural[:, [at]])
        alone.append(one(natural[:, [at]], proxy[:, [at]]))
    torch.testing.assert_close(both(natural, proxy), torch.stack(alone).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_objective_both_moves_its_boundary_with_the_naturals(kind: str) -> None:
    loss = objective(kind, boundary=-2.0)
    for quantile in (-1.0, -3.0):
        loss.follow(torch.tensor(quantile))
    # A running mean with decay 0.9: -2 -> -1.9 -> -2.01.
    assert float(loss.boundary) == pytest.approx(-2.01 if kind == "both" else -2.0, abs=1e-6)


def test_the_boundary_is_part_of_the_state_of_the_objective() -> None:
    loss = objective("both", boundary=-0.75)
    restored = Objective(ObjectiveConfig(kind="both"))
    restored.load_state_dict(loss.state_dict())
    assert float(restored.boundary) == -0.75
