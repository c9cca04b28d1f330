"""Data of which everything is known: a mixture of Gaussians in one dimension, in float64.

With p_0 = sum_k w_k N(m_k, s_k²) and x = alpha x0 + sigma eps, the noisy density is again a mixture,

    p(x) = sum_k w_k N(x; alpha m_k, v_k),   v_k = alpha² s_k² + sigma²

so the best denoiser is the mean of each component's, weighted by its share of p(x):

    E[x0 | x] = sum_k share_k(x) (m_k + alpha s_k² (x - alpha m_k) / v_k)

The flow from noise to data moves every sample without overtaking another one, so in one dimension it keeps the share of
probability on its left: the exact solution from one noise level to another is quantile to quantile, F_b^-1(F_a(x)).
No solver and no step size is involved. Every value of a tensor is a sample of its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Mixture(NamedTuple):
    """A mixture of Gaussians; the noise level of every method is sigma / alpha, with alpha² + sigma² = 1."""

    weights: Tensor  # (K,), sum 1
    means: Tensor  # (K,)
    stds: Tensor  # (K,)

    def shares(self, x: Tensor, level: float) -> tuple[Tensor, Tensor]:
        """Return each component's share of p(x), and v_k, (..., K) and (K,)."""
        alpha, sigma = signal_and_noise(level)
        v = alpha**2 * self.stds**2 + sigma**2
        log_p = self.weights.log() - v.log() / 2 - (x[..., None] - alpha * self.means) ** 2 / (2 * v)
        return log_p.softmax(dim=-1), v

    def x0(self, x: Tensor, level: float) -> Tensor:
        """Return E[x0 | x]."""
        alpha, _ = signal_and_noise(level)
        shares, v = self.shares(x, level)
        return (shares * (self.means + alpha * self.stds**2 * (x[..., None] - alpha * self.means) / v)).sum(dim=-1)

    def eps(self, x: Tensor, level: float) -> Tensor:
        """Return E[eps | x]: what a perfectly trained network would predict."""
        alpha, sigma = signal_and_noise(level)
        return (x - alpha * self.x0(x, level)) / sigma

    def cdf(self, x: Tensor, level: float) -> Tensor:
        """Return the probability F(x) of a smaller value."""
        alpha, sigma = signal_and_noise(level)
        std = (alpha**2 * self.stds**2 + sigma**2).sqrt()
        return (self.weights * torch.special.ndtr((x[..., None] - alpha * self.means) / std)).sum(dim=-1)

    def quantile(self, share: Tensor, level: float) -> Tensor:
        """Return the x with F(x) = share, for shares in (0, 1), by bisection."""
        low, high = torch.full_like(share, -100.0), torch.full_like(share, 100.0)
        for _ in range(64):  # 200 / 2^64 is below the rounding of any x
            middle = (low + high) / 2
            below = self.cdf(middle, level) < share
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def flow(self, x: Tensor, start: float, end: float) -> Tensor:
        """Return where the flow from noise to data brings x from one noise level to another, exactly."""
        return self.quantile(self.cdf(x, start), end)


def signal_and_noise(level: float) -> tuple[float, float]:
    """Return alpha and sigma of the noise level sigma / alpha."""
    alpha = (1 + level**2) ** -0.5
    return alpha, level * alpha


TWO_PEAKS = Mixture(
    torch.tensor([0.3, 0.7], dtype=torch.float64),
    torch.tensor([-0.9, 0.6], dtype=torch.float64),
    torch.tensor([0.4, 0.5], dtype=torch.float64),
)
SHARES = torch.linspace(0.02, 0.98, 24, dtype=torch.float64).reshape(1, 1, 4, 6)  # the samples every run moves
