"""Likelihood objectives: the likelihood of proxies is minimized, that of naturals optionally maximized.

The idea is that of the abstract of CLIP-Flow (arXiv 2508.09477); the bounds are ours to choose. Lowering a
likelihood without a bound destroys the ranking (Schmier et al., arXiv 2208.14024, show that the ideal density is
zero there), so a proxy that is unlikely enough stops contributing.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from clipflow_ray.config import ObjectiveConfig

_BOUNDARY_QUANTILE = 0.05
_BOUNDARY_DECAY = 0.9


def boundary_of(natural: Tensor) -> Tensor:
    """The 5 % quantile of naturals [N, S] (nats per dimension), of each segment: [S]."""
    return torch.quantile(natural.detach(), _BOUNDARY_QUANTILE, dim=0)


class Objective(nn.Module):
    """A loss over log-likelihoods per dimension (nats), chosen by `config.kind`:

    - `natural`: -mean l_nat, maximum likelihood; proxies are ignored.
    - `proxy`: weight * T * softplus((l_prx - c) / T), where c lies `margin` below the 5 % quantile of the naturals
      under the untrained flow; naturals give that one statistic and no gradient.
    - `both`: the sum of the two, where c follows the naturals' 5 % quantile (running mean): BGAD's boundary,
      with a soft hinge.
    - `both_logsig`: softplus(-l_nat) + weight * softplus(l_prx), the logsigmoid pair of CFLOW-AD and BGAD.

    Likelihoods are [N, S], of each of the S segments of the features; the loss is the mean over all of them, and the
    boundary [S] belongs to each.
    """

    boundary: Tensor

    def __init__(self, config: ObjectiveConfig, segments: int = 1) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("boundary", torch.zeros(segments))

    def anchor(self, natural: Tensor) -> None:
        """Start the boundary at the 5 % quantile of naturals [N, S] (nats per dimension) under the new flow."""
        self.boundary.copy_(boundary_of(natural))

    def follow(self, quantile: Tensor) -> None:
        """Move the boundary of `both` towards a batch's 5 % quantile of naturals (the mean over workers)."""
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
