"""Fit a flow on embeddings in memory: batches, objective, optimizer. Independent of Ray and of any split."""

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clipflow_ray.config import FitConfig, FlowConfig, ObjectiveConfig
from clipflow_ray.errors import TrainingError
from clipflow_ray.model.flow import Flow
from clipflow_ray.model.objective import Objective, boundary_of

F32 = NDArray[np.float32]

_CPU: Final = torch.device("cpu")


class Fitting:
    """The flow, the objective and the optimizer of worker `rank` of `world`.

    `natural` [N, D] and `proxy` [M, D] are raw embeddings, float32. M may be 0 if the objective uses naturals alone.
    `segments` are the widths of the features that make up D. `wrap` makes the flow data-parallel.
    """

    def __init__(
        self,
        flow: FlowConfig,
        objective: ObjectiveConfig,
        fit: FitConfig,
        segments: tuple[int, ...],
        natural: F32,
        proxy: F32,
        rank: int = 0,
        world: int = 1,
        device: torch.device = _CPU,
        wrap: Callable[[Flow], nn.Module] = lambda flow: flow,
    ) -> None:
        self.fit, self.rank, self.world, self.device = fit, rank, world, device
        torch.manual_seed(fit.seed)  # the same initial weights on every rank
        self.flow = Flow(segments, flow)
        self.flow.fit_standardizer(torch.from_numpy(natural))
        self.model: nn.Module = wrap(self.flow)
        self.objective = Objective(objective, len(segments)).to(self.device)
        self.optimizer = torch.optim.Adam(self.flow.parameters(), lr=fit.learning_rate, weight_decay=fit.weight_decay)
        self.natural, self.proxy = self._share(natural), self._share(proxy)
        self.steps = max(1, len(natural) // fit.batch_size)
        with torch.no_grad():
            self.objective.anchor(self.flow(torch.from_numpy(natural).to(self.device)).per_segment)

    def train(self, epoch: int) -> float:
        """Train for one epoch and return the mean loss of its steps. Raises TrainingError if a loss is not finite."""
        fit = self.fit
        share = max(1, fit.batch_size // self.world)
        of_proxies = 0 if self.objective.config.kind == "natural" else share
        generator = torch.Generator().manual_seed(_seed(fit.seed, epoch, self.rank))
        natural = _cycled(len(self.natural), share * self.steps, generator)
        proxy = _cycled(len(self.proxy), of_proxies * self.steps, generator)
        self.model.train()
        total = 0.0
        for step in range(self.steps):
            naturals = self.natural[natural[step * share : (step + 1) * share]]
            proxies = self.proxy[proxy[step * of_proxies : (step + 1) * of_proxies]]
            batch = torch.cat([naturals, proxies]).to(self.device)
            likely, unlikely = self.model(batch).per_segment.split([share, of_proxies])
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

    def _share(self, embedding: F32) -> Tensor:
        """Return this rank's rows, or all rows if there are too few for every rank to get one."""
        rows = embedding[self.rank :: self.world]
        return torch.from_numpy(np.ascontiguousarray(rows if len(rows) else embedding))

    def _mean_over_workers(self, value: Tensor) -> Tensor:
        if self.world > 1:
            torch.distributed.all_reduce(value)
        return value / self.world


def learning_rate(fit: FitConfig, step: int, steps: int) -> float:
    """Return the rate of one step: a linear warm-up over `warmup_fraction` of all steps, then a cosine to zero."""
    warmup = max(1, round(fit.warmup_fraction * steps))
    if step < warmup:
        return fit.learning_rate * (step + 1) / warmup
    return fit.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _cycled(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` indices below `size`: random permutations, one after the other."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    rounds = -(-count // size)
    return torch.cat([torch.randperm(size, generator=generator) for _ in range(rounds)])[:count]


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
