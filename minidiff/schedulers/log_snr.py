"""What the exponential-integrator solvers share (UniPC, DEIS and the DPM-Solver family): they integrate over lambda.

A noise level sigma stands for x = alpha_t x0 + sigma_t eps with

    variance preserving   alpha_t = 1 / sqrt(sigma² + 1),  sigma_t = sigma alpha_t
    flow matching         alpha_t = 1 - sigma,             sigma_t = sigma

and lambda = log(alpha_t / sigma_t) is half the logarithm of the signal-to-noise ratio.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidiff.schedulers.base import Grid, Plan, Scheduler
from minidiff.schedulers.noise_levels import NoiseLevelScheduler


class LogSnrScheduler(NoiseLevelScheduler):
    """Base of the solvers that work in lambda."""

    prediction_types = ("epsilon", "sample", "v_prediction", "flow_prediction")

    def __init__(self) -> None:
        super().__init__()
        if "final_sigmas_type" in self.config:
            self._require("final_sigmas_type", ("zero", "sigma_min"))

    # ---- the noise levels of a run ------------------------------------------------------------------------------

    def _grid(self, count: int, **custom: Any) -> Grid:
        """Return a flow's levels, respaced ones, or those of the timesteps: one more than asked for, but the last."""
        if self.config.use_flow_sigmas:
            levels = 1.0 - np.linspace(1, 1 / self.config.num_train_timesteps, count + 1)
            return self._flow_grid(self._shifted(levels)[::-1][:-1])
        if self._respace is not None:
            return self._level_grid(self._respaced(count, self._training_sigmas()))
        return self._time_grid(self._spaced_timesteps(count, extra=True))

    def _shifted(self, levels: np.ndarray) -> np.ndarray:
        """Shift a flow's levels to the noisy end: Esser et al. 2024, https://arxiv.org/abs/2403.03206, eq. 23."""
        shift = self.config.flow_shift
        return shift * levels / (1 + (shift - 1) * levels)

    def _flow_grid(self, levels: np.ndarray) -> Grid:
        return self._closed(levels * self.config.num_train_timesteps, levels, self._least(levels))

    def _level_grid(self, levels: np.ndarray) -> Grid:
        # The reference rounds timesteps with Karras sigmas and cuts off the fraction with the others.
        times = self._times_of(levels)
        return self._closed(times.round() if self._rounds() else times, levels, self._least(levels))

    def _time_grid(self, times: Tensor) -> Grid:
        return self._closed(times.numpy(), self._levels_of(times.numpy()), self._training_sigmas()[0])

    def _rounds(self) -> bool:
        return bool(self.config.use_karras_sigmas)

    def _least(self, levels: np.ndarray) -> float:
        """Return the level that a run over ``levels`` ends at, if not at 0: the last one once more."""
        return levels[-1]

    def _closed(self, times: np.ndarray, levels: np.ndarray, least: float) -> Grid:
        """Add the level after the last step: 0, or ``least``."""
        last = 0.0 if self._own().get("final_sigmas_type") == "zero" else least
        closed = np.append(levels, last).astype(np.float32)
        return Grid(torch.from_numpy(times.astype(np.int64)), torch.from_numpy(closed))

    # ---- alpha_t and sigma_t ------------------------------------------------------------------------------------

    def _alpha_sigma(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.use_flow_sigmas:
            return 1 - sigma, sigma
        alpha = 1 / ((sigma**2 + 1) ** 0.5)
        return alpha, sigma * alpha

    def _seen_sigma(self, plan: Plan, sigma: Tensor) -> Tensor:
        """Return the sigma of each input: x0 of a flow's prediction is x - sigma out with the noise level itself."""
        return plan.sigmas if self.config.prediction_type == "flow_prediction" else sigma

    def _alpha_sigma_at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_t and sigma_t at timesteps (B,): those of the run, or before ``set_timesteps`` of training.

        The reference looks up a training timestep in tables that run in opposite directions and so, before
        ``set_timesteps``, adds the noise of timestep T - 1 - t. Training with that is hopeless, so minidiff does not.
        """
        if self._plan is not None:
            return super()._alpha_sigma_at(timesteps, like)
        if self.config.use_flow_sigmas:
            raise ValueError("use_flow_sigmas has no table of training timesteps: call set_timesteps first")
        return Scheduler._alpha_sigma_at(self, timesteps, like)


def remembered(h: Sequence[float], start: int, k: int) -> int:
    """Return how many predictions before the k-th differ in noise level, counted back from it to the run's start."""
    count = 0
    while k - count > start and h[k - count - 1] and not math.isnan(h[k - count - 1]):
        count += 1
    return count
