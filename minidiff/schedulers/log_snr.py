"""What the exponential-integrator solvers share (UniPC and the DPM-Solver family): a run described by noise levels.

A noise level sigma stands for x = alpha_t x0 + sigma_t eps with

    variance preserving   alpha_t = 1 / sqrt(sigma² + 1),  sigma_t = sigma alpha_t
    flow matching         alpha_t = 1 - sigma,             sigma_t = sigma

and the solvers integrate over lambda = log(alpha_t / sigma_t), half the logarithm of the signal-to-noise ratio.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from minidiff.schedulers import noise_schedule
from minidiff.schedulers.base import Grid, Plan, Scheduler


class LogSnrScheduler(Scheduler):
    """Base of the solvers that work in lambda."""

    time_dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        noise_schedule.chosen_spacing(self.config)  # raises if it asks for several
        if "final_sigmas_type" in self.config:
            self._require("final_sigmas_type", ("zero", "sigma_min"))
        if self.config.get("rescale_betas_zero_snr"):
            self.alphas_cumprod[-1] = noise_schedule.ALMOST_NO_SIGNAL  # so that the first sigma is finite

    @property
    def _respace(self) -> Callable[[float, float, int], np.ndarray] | None:
        return noise_schedule.chosen_spacing(self._own())

    @property
    def alpha_t(self) -> Tensor:
        """alpha_t of every training timestep (T,)."""
        return torch.sqrt(self.alphas_cumprod)

    @property
    def sigma_t(self) -> Tensor:
        """sigma_t of every training timestep (T,)."""
        return torch.sqrt(1 - self.alphas_cumprod)

    @property
    def lambda_t(self) -> Tensor:
        """lambda of every training timestep (T,)."""
        return self.alpha_t.log() - self.sigma_t.log()

    def _respaced(self, count: int) -> np.ndarray:
        """Return ``count`` Karras, exponential or beta noise levels, largest first, float64."""
        training = self._training_sigmas()
        low, high = self.config.get("sigma_min"), self.config.get("sigma_max")
        low = training[0].item() if low is None else low
        high = training[-1].item() if high is None else high
        return self._respace(low, high, count)

    def _closed(self, timesteps: np.ndarray, sigmas: np.ndarray, sigma_min: float) -> Grid:
        """Add the last noise level: 0, or ``sigma_min``."""
        last = 0.0 if self._own().get("final_sigmas_type") == "zero" else sigma_min
        closed = np.append(sigmas, last).astype(np.float32)
        return Grid(torch.from_numpy(timesteps.astype(np.int64)), torch.from_numpy(closed))

    def level(self, plan: Plan, i: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        return self._alpha_sigma(plan.sigmas[i].to(dtype))

    def _alpha_sigma(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_t and sigma_t of noise levels."""
        if self.config.get("use_flow_sigmas"):
            return 1 - sigma, sigma
        alpha = 1 / ((sigma**2 + 1) ** 0.5)
        return alpha, sigma * alpha

    def _alpha_sigma_at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_t and sigma_t at timesteps (B,): those of the run, or before ``set_timesteps`` of training.

        The reference looks up a training timestep in tables that run in opposite directions and so, before
        ``set_timesteps``, adds the noise of timestep T - 1 - t. Training with that is hopeless, so minidiff does not.
        """
        if self._plan is None:
            if self.config.get("use_flow_sigmas"):
                raise ValueError("use_flow_sigmas has no table of training timesteps: call set_timesteps first")
            return super()._alpha_sigma_at(timesteps, like)
        return self._alpha_sigma(self._levels_at(timesteps, like))
