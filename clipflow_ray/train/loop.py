"""Fitting the flow on embeddings in memory: batches, objective, optimizer, validation. Knows nothing of Ray."""

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from clipflow_ray import proxies
from clipflow_ray.config import FitConfig, TrainConfig
from clipflow_ray.errors import TrainingError
from clipflow_ray.model.flow import Flow
from clipflow_ray.model.objective import Objective, boundary_of
from clipflow_ray.statistics import auroc
from clipflow_ray.train.features import Features
from clipflow_ray.train.split import Split

SELECTION: Final = "selection"
_MIN_OF_SOURCE: Final = 10
_MAX_SOURCES: Final = 32  # 496 pairs take a second
_CPU: Final = torch.device("cpu")


class Loop:
    """The model, objective and optimizer of one of `world` workers, and its epochs; `wrap` makes the model parallel."""

    def __init__(
        self,
        config: TrainConfig,
        data: Split,
        segments: tuple[int, ...],
        rank: int = 0,
        world: int = 1,
        device: torch.device = _CPU,
        wrap: Callable[[Flow], nn.Module] = lambda flow: flow,
    ) -> None:
        self.config, self.data, self.rank, self.world, self.device = config, data, rank, world, device
        torch.manual_seed(config.fit.seed)  # the same initial weights on every rank
        self.flow = Flow(segments, config.flow)
        self.flow.fit_standardizer(torch.from_numpy(data.natural.embedding))
        self.model: nn.Module = wrap(self.flow)
        self.objective = Objective(config.objective, len(segments)).to(self.device)
        self.optimizer = torch.optim.Adam(
            self.flow.parameters(), lr=config.fit.learning_rate, weight_decay=config.fit.weight_decay
        )
        self.natural = self._share(data.natural)
        self.proxy = self._share(data.proxy)
        self.steps = max(1, len(data.natural) // config.fit.batch_size)
        self.history: list[dict[str, float]] = []
        with torch.no_grad():
            self.objective.anchor(self._per_segment(data.natural))

    def epoch(self, number: int) -> dict[str, float]:
        """Train for one epoch and return its figures: the loss, and what `validate` finds.

        Raises TrainingError when the loss is not finite.
        """
        loss = self._train(number)
        figures = {"epoch": float(number), "loss": loss, **validate(self.flow, self.data, self.device)}
        self.history.append(figures)
        return figures

    def _train(self, epoch: int) -> float:
        fit = self.config.fit
        share = max(1, fit.batch_size // self.world)
        generator = torch.Generator().manual_seed(_seed(fit.seed, epoch, self.rank))
        natural = _cycled(len(self.natural), share * self.steps, generator)
        proxy = _cycled(len(self.proxy), share * self.steps, generator)
        self.model.train()
        total = 0.0
        for step in range(self.steps):
            rows = slice(step * share, (step + 1) * share)
            batch = torch.cat([self.natural[natural[rows]], self.proxy[proxy[rows]]]).to(self.device)
            likely, unlikely = self.model(batch).per_segment.split([share, share])
            loss = self.objective(likely, unlikely)
            if not torch.isfinite(loss):
                raise TrainingError(f"The loss is {loss.item()} in epoch {epoch}: lower the learning rate.")
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.flow.parameters(), fit.gradient_clip)
            rate = learning_rate(fit, epoch * self.steps + step, fit.epochs * self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.objective.follow(self._mean_over_workers(boundary_of(likely)))
            total += loss.item()
        return total / self.steps

    def _share(self, part: Features) -> Tensor:
        """This rank's rows; a rank never has none."""
        rows = part.embedding[self.rank :: self.world]
        return torch.from_numpy(np.ascontiguousarray(rows if len(rows) else part.embedding))

    def _per_segment(self, part: Features) -> Tensor:
        result: Tensor = self.flow(torch.from_numpy(part.embedding).to(self.device)).per_segment
        return result

    def _mean_over_workers(self, value: Tensor) -> Tensor:
        if self.world > 1:
            torch.distributed.all_reduce(value)
        return value / self.world


def validate(flow: Flow, data: Split, device: torch.device) -> dict[str, float]:
    """Figures on sources that training never saw; none of them involves an AI-generated image.

    `auroc_<family>` ranks validation naturals against that family's proxies, `auroc_pairs` against all that two
    families made; `selection` is the held-out family's, or the mean over these where none is held out. `tpr_5` is the
    share of held-out proxies (of all proxies where none is held out) beyond the threshold that flags 5 % of the
    calibration naturals: of other sources than theirs, as in use. `auroc_sources` is `source_separation`, and not
    there where that is None. `nll_*` are nats per dimension.
    """
    flow.eval()
    with torch.inference_mode():

        def suspicion(part: Features) -> np.ndarray[Any, np.dtype[np.float32]]:
            result: np.ndarray[Any, np.dtype[np.float32]] = (
                -flow(torch.from_numpy(part.embedding).to(device)).per_dim.cpu().numpy()
            )
            return result

        natural, calibration = suspicion(data.validation_natural), suspicion(data.calibration)
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
        "nll_natural": float(natural.mean()),
        "nll_natural_median": float(np.median(natural)),
        "tpr_5": float(np.mean(beyond)),
        "auroc_seen": float(np.mean(seen)),
        SELECTION: float(np.mean([ranked[name] for name in held_out] or seen)),
        **({} if apart is None else {"auroc_sources": apart}),
        **{f"auroc_{family}": value for family, value in ranked.items()},
    }


def source_separation(score: np.ndarray[Any, Any], group: np.ndarray[Any, Any]) -> float | None:
    """How well scores [N] tell natural sources apart: the mean over pairs of sources of AUROC or 1 - AUROC, the larger.

    A likelihood that knows how a picture was made differs between cameras and pipelines too; this is what predicts,
    over sets of features, how well AI-generated images are told from photographs (see the model card). The 32 largest
    sources of at least ten images count; None where there are fewer than two.
    """
    names, counts = np.unique(group, return_counts=True)
    largest = np.argsort(-counts, kind="stable")[:_MAX_SOURCES]
    parts = [score[group == name] for name in names[largest][counts[largest] >= _MIN_OF_SOURCE]]
    pairs = [auroc(one, other) for one, other in combinations(parts, 2)]
    return float(np.mean([max(value, 1.0 - value) for value in pairs])) if pairs else None


def learning_rate(fit: FitConfig, step: int, steps: int) -> float:
    """Linear warm-up over a share of all steps, then a cosine to zero."""
    warmup = max(1, round(fit.warmup_fraction * steps))
    if step < warmup:
        return fit.learning_rate * (step + 1) / warmup
    return fit.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _cycled(size: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` indices below `size`: permutation after permutation."""
    rounds = -(-count // size)
    return torch.cat([torch.randperm(size, generator=generator) for _ in range(rounds)])[:count]


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
