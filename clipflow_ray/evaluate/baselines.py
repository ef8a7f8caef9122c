"""Simpler detectors on the same embeddings, fitted on natural embeddings that the checkpoint keeps for them."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors

from clipflow_ray.config import FitConfig, ObjectiveConfig
from clipflow_ray.errors import CheckpointError
from clipflow_ray.model.checkpoint import Checkpoint
from clipflow_ray.model.fitting import Fitting
from clipflow_ray.model.flow import Flow

F32 = NDArray[np.float32]
Scorer = Callable[[F32], NDArray[Any]]

BASELINES: Final = ("mahalanobis", "knn", "natural_only_flow", "logistic_probe", "mlp_probe")
_NEIGHBOURS: Final = 5
# A baseline does not change if the defaults of training do, so that figures stay comparable.
_NATURAL_FIT: Final = FitConfig(epochs=10, learning_rate=2e-4)


def fit_baselines(checkpoint: Checkpoint) -> dict[str, Scorer]:
    """Return, by name, functions from raw embeddings float32 [N, D] to suspicion [N].

    The probes were trained on naturals and proxies; the other baselines are fitted on naturals alone. `mlp_probe` is
    absent if the checkpoint keeps no MLP. Raises CheckpointError if the checkpoint keeps no reference embeddings.
    """
    if not checkpoint.reference:
        raise CheckpointError("The checkpoint keeps no reference embeddings; train it again with this version.")
    flow = checkpoint.flow()
    natural = checkpoint.reference["natural"].float()
    probe = checkpoint.reference["probe"].numpy()

    def standardized(embedding: F32) -> F32:
        result: F32 = flow.standardize(torch.from_numpy(embedding)).numpy()
        return result

    bank = flow.standardize(natural).numpy()
    covariance = LedoitWolf().fit(bank)
    neighbours = NearestNeighbors(n_neighbors=_NEIGHBOURS).fit(bank)
    natural_flow = _natural_flow(checkpoint, natural.numpy())
    scorers: dict[str, Scorer] = {
        "mahalanobis": lambda x: np.asarray(covariance.mahalanobis(standardized(x))),
        "knn": lambda x: np.asarray(neighbours.kneighbors(standardized(x))[0].mean(axis=1)),
        "natural_only_flow": lambda x: -natural_flow(torch.from_numpy(x)).per_dim.numpy(),
        "logistic_probe": lambda x: standardized(x) @ probe[:-1] + probe[-1],
    }
    if mlp := _layers(checkpoint.reference):
        scorers["mlp_probe"] = lambda x: mlp(torch.from_numpy(standardized(x)))[:, 0].numpy()
    return scorers


def _layers(reference: dict[str, torch.Tensor]) -> torch.nn.Sequential | None:
    """The MLP probe that the checkpoint keeps (affine layers with ReLU between them), or None."""
    count = sum(name.startswith("mlp.") and name.endswith(".weight") for name in reference)
    layers: list[torch.nn.Module] = []
    for at in range(count):
        weight = reference[f"mlp.{at}.weight"]
        layer = torch.nn.Linear(*weight.shape)
        layer.load_state_dict({"weight": weight.T, "bias": reference[f"mlp.{at}.bias"]})
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1]).requires_grad_(False) if layers else None


def _natural_flow(checkpoint: Checkpoint, natural: F32) -> Flow:
    """The same architecture trained by maximum likelihood on naturals [N, D] alone."""
    with torch.random.fork_rng(devices=[]):
        fitting = Fitting(
            checkpoint.flow_config,
            ObjectiveConfig(kind="natural"),
            _NATURAL_FIT,
            checkpoint.widths,
            natural,
            proxy=natural[:0],
        )
        for epoch in range(_NATURAL_FIT.epochs):
            fitting.train(epoch)
    return fitting.flow.eval().requires_grad_(False)
