"""The training loop: fit one epoch after the other and validate after each. Independent of Ray."""

from collections.abc import Callable
from itertools import combinations
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from clipflow_ray import proxies
from clipflow_ray.config import TrainConfig
from clipflow_ray.model.fitting import Fitting
from clipflow_ray.model.flow import Flow
from clipflow_ray.statistics import auroc
from clipflow_ray.train.features import Features
from clipflow_ray.train.split import Split

SELECTION: Final = "selection"
_MIN_OF_SOURCE: Final = 10
_MAX_SOURCES: Final = 32  # 496 pairs take a second
_CPU: Final = torch.device("cpu")


class Loop(Fitting):
    """Fits the flow on the training part of `data`, as worker `rank` of `world`, and keeps each epoch's figures."""

    def __init__(
        self,
        config: TrainConfig,
        data: Split,
        widths: tuple[int, ...],
        rank: int = 0,
        world: int = 1,
        device: torch.device = _CPU,
        wrap: Callable[[Flow], nn.Module] = lambda flow: flow,
    ) -> None:
        natural, proxy = data.natural.embedding, data.proxy.embedding
        super().__init__(config.flow, config.objective, config.fit, widths, natural, proxy, rank, world, device, wrap)
        self.data = data
        self.history: list[dict[str, float]] = []

    def epoch(self, number: int) -> dict[str, float]:
        """Train for one epoch and return its number, its mean loss and the figures of `validate`.

        Raises TrainingError if the loss is not finite.
        """
        loss = self.train(number)
        figures = {"epoch": float(number), "loss": loss, **validate(self.flow, self.data, self.device)}
        self.history.append(figures)
        return figures


def validate(flow: Flow, data: Split, device: torch.device) -> dict[str, float]:
    """Return figures, by name, on images that do not train. No AI-generated image is used.

    Sets the flow's scale by the calibration naturals first, because the score depends on it.

    - `auroc_<family>`: AUROC of that family's proxies against validation naturals. `auroc_pairs` is the same for all
      proxies that a pair of families made.
    - `auroc_seen`: mean of these AUROCs without that of the held-out family.
    - `selection`: AUROC of the held-out family, or `auroc_seen` if no family is held out.
    - `tpr_5`: share of held-out proxies (of all proxies if no family is held out) beyond the threshold that flags 5 %
      of the calibration naturals. The two come from different sources, as in use.
    - `auroc_sources`: the result of `source_separation`; absent if that is None.
    - `nll_natural`, `nll_natural_median`: negative log-likelihood of validation naturals, in nats per dimension.
    """
    flow.eval()
    flow.fit_scale(torch.from_numpy(data.calibration.embedding).to(device))
    with torch.inference_mode():

        def suspicion(part: Features) -> np.ndarray[Any, np.dtype[np.float32]]:
            result: np.ndarray[Any, np.dtype[np.float32]] = (
                flow(torch.from_numpy(part.embedding).to(device)).score.cpu().numpy()
            )
            return result

        found = flow(torch.from_numpy(data.validation_natural.embedding).to(device))
        natural, nll = found.score.cpu().numpy(), -found.per_dim.cpu().numpy()
        calibration = suspicion(data.calibration)
        scores: dict[str, np.ndarray[Any, Any]] = {}
        for part in (data.validation_proxy, data.held_out):
            family = proxies.merged(part.family)
            scores |= {str(name): suspicion(part.where(family == name)) for name in np.unique(family)}
    flow.train()
    ranked = {family: auroc(natural, proxy) for family, proxy in scores.items()}
    held_out = [str(family) for family in np.unique(data.held_out.family)]
    beyond = np.concatenate([scores[name] for name in held_out or scores]) > np.quantile(calibration, 0.95)
    seen = [value for family, value in ranked.items() if family not in held_out]
    plain = data.validation_natural.view == 0
    apart = source_separation(
        np.r_[natural[plain], calibration], np.r_[data.validation_natural.group[plain], data.calibration.group]
    )
    return {
        "nll_natural": float(nll.mean()),
        "nll_natural_median": float(np.median(nll)),
        "tpr_5": float(np.mean(beyond)),
        "auroc_seen": float(np.mean(seen)),
        SELECTION: float(np.mean([ranked[name] for name in held_out] or seen)),
        **({} if apart is None else {"auroc_sources": apart}),
        **{f"auroc_{family}": value for family, value in ranked.items()},
    }


def source_separation(score: np.ndarray[Any, Any], group: np.ndarray[Any, Any]) -> float | None:
    """Return how well scores [N] separate the natural sources that `group` [N] names, from 0.5 to 1.

    The figure is the mean over pairs of sources of the AUROC or its complement, whichever is larger. A likelihood that
    reflects how a picture was made also differs between cameras and pipelines. It uses the 32 largest sources of at
    least ten images. Returns None if there are fewer than two such sources.
    """
    names, counts = np.unique(group, return_counts=True)
    largest = np.argsort(-counts, kind="stable")[:_MAX_SOURCES]
    parts = [score[group == name] for name in names[largest][counts[largest] >= _MIN_OF_SOURCE]]
    pairs = [auroc(one, other) for one, other in combinations(parts, 2)]
    return float(np.mean([max(value, 1.0 - value) for value in pairs])) if pairs else None
