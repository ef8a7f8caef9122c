"""Fitting a flow on embeddings in memory."""

import numpy as np
import torch

from clipflow_ray.config import FitConfig, FlowConfig, ObjectiveConfig
from clipflow_ray.model.fitting import Fitting

FIT = FitConfig(epochs=3, batch_size=16, learning_rate=2e-3)


def fitted(natural: np.ndarray, proxy: np.ndarray) -> tuple[list[float], dict[str, torch.Tensor]]:
    objective = ObjectiveConfig(kind="natural")
    fitting = Fitting(FlowConfig(blocks=2, hidden=8), objective, FIT, (natural.shape[1],), natural, proxy)
    return [fitting.train(epoch) for epoch in range(FIT.epochs)], fitting.flow.state_dict()


def test_an_objective_on_naturals_alone_needs_no_proxies_and_ignores_given_ones() -> None:
    rng = np.random.default_rng(0)
    natural, proxy = ((1.0 + 0.1 * rng.normal(size=(count, 6))).astype(np.float32) for count in (100, 40))
    losses, without = fitted(natural, proxy[:0])
    again, beside = fitted(natural, proxy)
    assert losses == again and losses[-1] < losses[0]
    assert all(torch.equal(without[name], beside[name]) for name in without)
