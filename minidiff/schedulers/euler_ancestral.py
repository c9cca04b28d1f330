"""Euler ancestral: Euler's method to a lower noise level than asked for, then fresh noise up to it.

    sigma_up²   = sigma'² (sigma² - sigma'²) / sigma²               what DDPM would add
    sigma_down² = sigma'² - sigma_up²
    y'          = y + (sigma_down - sigma) (y - x0) / sigma + sigma_up noise

From k-diffusion (https://github.com/crowsonkb/k-diffusion). Checked against
``diffusers.EulerAncestralDiscreteScheduler``. It is DDIM with eta = 1, so DDPM, written in sigma.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minidiff.configured import register_to_config
from minidiff.schedulers.base import Grid, Past, Plan, Stochastic, Update
from minidiff.schedulers.prediction import Scalar
from minidiff.schedulers.sigma_space import NoiseLevel, SigmaSpaceScheduler, noise_levels, upcast


class EulerAncestralStep(NamedTuple):
    """The numbers of one Euler ancestral step."""

    level: NoiseLevel
    move: Scalar  # sigma_down - sigma
    up: Scalar  # sigma_up


def ancestral(sigma: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
    """Return sigma_down and sigma_up of steps between noise levels (N,).

    Zero-SNR rescaling may make the first level smaller than the second, which is NaN in the reference; no noise then.
    """
    up = (following**2 * (sigma**2 - following**2).clamp(min=0) / sigma**2) ** 0.5
    return (following**2 - up**2).clamp(min=0) ** 0.5, up  # far apart, rounding makes it negative


class EulerAncestralDiscreteScheduler(Stochastic, SigmaSpaceScheduler):
    """Sample with Euler's method and fresh noise at every step; the last draw is multiplied by 0."""

    refuses_indices = True
    time_dtype = torch.float64
    prediction_types = ("epsilon", "v_prediction")

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        super().__init__()

    def _grid(self, count: int) -> Grid:
        return self._closed(*self._spaced(count))

    def _coefficients(self, plan: Plan) -> tuple[EulerAncestralStep, ...]:
        sigma = plan.sigmas[:-1]
        down, up = ancestral(sigma, plan.sigmas[1:])
        return tuple(map(EulerAncestralStep, noise_levels(sigma), down - sigma, up))

    def wants_noise(self, plan: Plan, i: int) -> bool:
        return True

    def _update(self, plan: Plan, i: int, x: Tensor, out: Tensor, past: Past, noise: Tensor | None) -> Update:
        step, y = plan.coefficients[i], upcast(x)
        x0 = self._x0(step.level, y, out)
        slope = (y - x0) / step.level.sigma
        return Update((y + slope * step.move + noise * step.up).to(out.dtype), (), x0)
