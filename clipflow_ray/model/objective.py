"""Likelihood objectives: the likelihood of proxies is minimized, that of naturals optionally maximized.

The idea is from the abstract of CLIP-Flow (arXiv 2508.09477), which states no bounds; the bounds are this project's
choice. Minimising a likelihood without a bound destroys the ranking: the ideal density is zero wherever proxies
dominate (Schmier et al., arXiv 2208.14024). So a proxy that is unlikely enough stops contributing.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from clipflow_ray.config import ObjectiveConfig

_BOUNDARY_QUANTILE = 0.05
_BOUNDARY_DECAY = 0.9


def boundary_of(natural: Tensor) -> Tensor:
    """Return the 5 % quantile of naturals [N, S] (nats per dimension) for each segment, [S]."""
    return torch.quantile(natural.detach(), _BOUNDARY_QUANTILE, dim=0)


class Objective(nn.Module):
    """A loss over log-likelihoods per dimension (nats), chosen by `config.kind`:

    - `natural`: -mean l_nat, maximum likelihood; proxies are ignored.
    - `proxy`: weight * T * softplus((l_prx - c) / T). c lies `margin` below the 5 % quantile of the naturals under the
      untrained flow. Naturals set c once and give no gradient.
    - `both`: the sum of the two. c follows the naturals' 5 % quantile as a running mean: BGAD's boundary, with a soft
      hinge.
    - `both_logsig`: softplus(-l_nat) + weight * softplus(l_prx), the logsigmoid pair of CFLOW-AD and BGAD.

    Log-likelihoods are [N, S] for S segments of the features. The loss is the mean over images and segments.
    `boundary` [S] holds one quantile for each segment.
    """

    boundary: Tensor

    def __init__(self, config: ObjectiveConfig, segments: int = 1) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("boundary", torch.zeros(segments))

    def anchor(self, natural: Tensor) -> None:
        """Set the boundary to the 5 % quantile of naturals [N, S] (nats per dimension) under the untrained flow."""
        self.boundary.copy_(boundary_of(natural))

    def follow(self, quantile: Tensor) -> None:
        """Move the boundary of `both` towards a batch's 5 % quantile [S], averaged over the workers."""
        if self.config.kind == "both":
            self.boundary.lerp_(quantile, 1.0 - _BOUNDARY_DECAY)

    def forward(self, natural: Tensor, proxy: Tensor) -> Tensor:
        """Scalar loss of naturals [N, S] and proxies [M, S], both in nats per dimension."""
        weight, temperature = self.config.proxy_weight, self.config.temperature
        if self.config.kind == "natural":
            return -natural.mean()
        if self.config.kind == "both_logsig":
            return softplus(-natural).mean() + weight * softplus(proxy).mean()
        excess = proxy - (self.boundary - self.config.margin)
        pushed = weight * (temperature * softplus(excess / temperature)).mean()
        return pushed if self.config.kind == "proxy" else pushed - natural.mean()
