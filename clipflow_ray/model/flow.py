"""Normalizing flow: embedding -> log-likelihood.

One-sided affine coupling (RealNVP, Dinh et al. 2017, arXiv 1605.08803) over standardised CLIP features,
with fixed seeded permutations, soft-clamped log-scales (as in FrEIA's coupling blocks) and a learnable scale and
offset per dimension after each block. Each named feature has a flow of its own, and the log-likelihoods are added. So
each flow must learn to separate proxies from naturals; one joint flow could rely on the easiest feature alone.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from clipflow_ray.config import FlowConfig

_GLOBAL_LOG_SCALE_LIMIT: Final = 2.0
_HALF_LOG_2PI: Final = 0.5 * math.log(2.0 * math.pi)


@dataclass(frozen=True)
class LogLikelihood:
    """`log_base` and `log_det`, float32 [N], in nats; their sum is the log-likelihood of standardised features.

    `per_segment`, float32 [N, S], is the log-likelihood of each of the S segments divided by the segment's width.
    `score`, float32 [N], is the sum over segments of the standardised negative log-likelihood, see `Flow.fit_scale`.
    `dim` is D, the sum of the widths.
    """

    log_base: Tensor
    log_det: Tensor
    per_segment: Tensor
    score: Tensor
    dim: int

    @property
    def total(self) -> Tensor:
        """log p(x), float32 [N], in nats."""
        return self.log_base + self.log_det

    @property
    def per_dim(self) -> Tensor:
        """log p(x) / D, float32 [N], in nats per dimension."""
        return self.total / self.dim


class CouplingBlock(nn.Module):
    """y1 = x1; y2 = x2 * exp(s(x1)) + t(x1), then scale and offset per dimension. A new block is the identity."""

    permutation: Tensor

    def __init__(self, dim: int, config: FlowConfig, index: int) -> None:
        super().__init__()
        self.config = config
        self.passive = dim // 2
        active = dim - self.passive
        order = np.random.default_rng(index).permutation(dim)
        self.register_buffer("permutation", torch.from_numpy(order))
        self.subnet = nn.Sequential(
            nn.Linear(self.passive, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 2 * active)
        )
        last = self.subnet[-1]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.log_scale = nn.Parameter(torch.zeros(dim))
        self.offset = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, D] -> ([N, D], log-determinant [N])."""
        x1, x2 = x[:, self.permutation].tensor_split([self.passive], dim=1)
        s, t = self._scale_and_translation(x1)
        log_scale = self._global_log_scale()
        y = torch.cat([x1, x2 * torch.exp(s) + t], dim=1) * torch.exp(log_scale) + self.offset
        return y, s.sum(dim=1) + log_scale.sum()

    def inverse(self, y: Tensor) -> Tensor:
        """[N, D] -> [N, D], the inverse of `forward`."""
        y = (y - self.offset) * torch.exp(-self._global_log_scale())
        y1, y2 = y.tensor_split([self.passive], dim=1)
        s, t = self._scale_and_translation(y1)
        return torch.cat([y1, (y2 - t) * torch.exp(-s)], dim=1)[:, torch.argsort(self.permutation)]

    def _scale_and_translation(self, passive: Tensor) -> tuple[Tensor, Tensor]:
        s, t = self.subnet(passive).chunk(2, dim=1)
        s = self.config.clamp * torch.tanh(s / self.config.clamp)
        limit = self.config.translation_clamp
        return s, t if limit is None else limit * torch.tanh(t / limit)

    def _global_log_scale(self) -> Tensor:
        return self.log_scale.clamp(-_GLOBAL_LOG_SCALE_LIMIT, _GLOBAL_LOG_SCALE_LIMIT)


class Flow(nn.Module):
    """Embedding [N, D] -> LogLikelihood, including the feature normalisation.

    `segments` are the widths of the S segments. Each segment is L2-normalised to length sqrt(width). Then each
    dimension is standardised by the naturals' `mean` and `std`, which are buffers and so part of a checkpoint. Segments
    are independent: each has `config.blocks` coupling blocks of its own.

    `centre` and `spread` [S] standardise the likelihoods of the segments before they are added. Until `fit_scale` sets
    them, the score is the negative log-likelihood per dimension.
    """

    mean: Tensor
    std: Tensor
    centre: Tensor
    spread: Tensor
    widths: Tensor

    def __init__(self, segments: tuple[int, ...], config: FlowConfig) -> None:
        super().__init__()
        self.segments = segments
        self.dim = sum(segments)
        self.register_buffer("widths", torch.tensor(segments), persistent=False)
        self.register_buffer("centre", torch.zeros(len(segments)))
        self.register_buffer("spread", self.dim / self.widths)
        self.register_buffer("mean", torch.zeros(self.dim))
        self.register_buffer("std", torch.ones(self.dim))
        self.blocks = nn.ModuleList(
            CouplingBlock(width, config, index) for width in segments for index in range(config.blocks)
        )

    def fit_standardizer(self, natural: Tensor) -> None:
        """Set `mean` and `std` from natural embeddings [N, D]."""
        unit = self._unit_length(natural)
        self.mean.copy_(unit.mean(dim=0))
        self.std.copy_(unit.std(dim=0).clamp_min(1e-6))

    def fit_scale(self, natural: Tensor) -> None:
        """Set `centre` and `spread` to mean and standard deviation of `per_segment` over natural embeddings [N, D].

        So no segment drowns another in the score.
        """
        with torch.no_grad():
            per_segment = self(natural).per_segment
        self.centre.copy_(per_segment.mean(dim=0))
        self.spread.copy_(per_segment.std(dim=0, correction=0).clamp_min(1e-6))

    def standardize(self, embedding: Tensor) -> Tensor:
        """[N, D] raw embeddings -> [N, D] with zero mean and unit standard deviation on the naturals."""
        return (self._unit_length(embedding) - self.mean) / self.std

    def forward(self, embedding: Tensor) -> LogLikelihood:
        """float32 [N, D] raw embeddings -> their log-likelihood."""
        z, log_det = self.transform(self.standardize(embedding))
        parts = z.split(list(self.segments), dim=1)
        log_base = torch.stack([-0.5 * part.square().sum(dim=1) - part.shape[1] * _HALF_LOG_2PI for part in parts], 1)
        per_segment = (log_base + log_det) / self.widths
        score = ((self.centre - per_segment) / self.spread).sum(dim=1)
        return LogLikelihood(log_base.sum(dim=1), log_det.sum(dim=1), per_segment, score, self.dim)

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised features [N, D] -> (latent [N, D], log-determinant of each segment [N, S])."""
        latent, log_dets = [], []
        for part, blocks in zip(x.split(list(self.segments), dim=1), self._stacks(), strict=True):
            log_det = part.new_zeros(len(part))
            for block in blocks:
                part, block_log_det = block(part)
                log_det = log_det + block_log_det
            latent.append(part)
            log_dets.append(log_det)
        return torch.cat(latent, dim=1), torch.stack(log_dets, dim=1)

    def inverse(self, z: Tensor) -> Tensor:
        """Latent [N, D] -> standardised features [N, D]."""
        undone = []
        for part, blocks in zip(z.split(list(self.segments), dim=1), self._stacks(), strict=True):
            for block in reversed(blocks):
                part = block.inverse(part)  # type: ignore[operator]
            undone.append(part)
        return torch.cat(undone, dim=1)

    def _stacks(self) -> list[list[nn.Module]]:
        """The coupling blocks of each segment."""
        blocks = list(self.blocks)
        count = len(blocks) // len(self.segments)
        return [blocks[at : at + count] for at in range(0, len(blocks), count)]

    def _unit_length(self, embedding: Tensor) -> Tensor:
        parts = embedding.split(list(self.segments), dim=1)
        return torch.cat([functional.normalize(p, dim=1) * math.sqrt(p.shape[1]) for p in parts], dim=1)
