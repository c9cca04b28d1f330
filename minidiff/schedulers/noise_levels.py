"""What the solvers share whose runs are described by noise levels: those of k-diffusion, UniPC and the DPM-Solvers.

A noise level is sigma = sqrt((1 - alpha_bar) / alpha_bar), the ratio of noise to picture in x (or what a flow calls
sigma). Levels may lie between those of training, at timesteps that are no whole numbers, and be spaced by themselves.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from minidiff.schedulers import noise_schedule
from minidiff.schedulers.base import Plan, Scheduler


class NoiseLevelScheduler(Scheduler):
    """Base of the solvers that think in noise levels. A family provides ``_alpha_sigma``."""

    time_dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        noise_schedule.chosen_spacing(self.config)  # raises if it asks for several
        if self.config.get("rescale_betas_zero_snr"):
            self.alphas_cumprod[-1] = noise_schedule.ALMOST_NO_SIGNAL  # so that the first sigma is finite

    def level(self, plan: Plan, i: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        return self._alpha_sigma(plan.sigmas[i].to(dtype))

    def _alpha_sigma(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma, x = alpha x0 + sigma noise, of noise levels."""
        raise NotImplementedError

    @property
    def _respace(self) -> Callable[[float, float, int], np.ndarray] | None:
        return noise_schedule.chosen_spacing(self._own())

    def _respaced(self, count: int, levels: np.ndarray) -> np.ndarray:
        """Return ``count`` Karras, exponential or beta levels between the bounds or else the ends of ``levels``."""
        ends = zip(self._bounds(), levels[[0, -1]].tolist(), strict=True)
        return self._respace(*(end if bound is None else bound for bound, end in ends), count)

    def _bounds(self) -> tuple[float | None, float | None]:
        """Return the least and greatest noise level to respace between, None for those of the timesteps.

        Only Euler and UniPC have these fields; in another class's config they come from elsewhere, and count as in the
        reference.
        """
        return self.config.get("sigma_min"), self.config.get("sigma_max")

    def _levels_of(self, times: np.ndarray) -> np.ndarray:
        """Return the noise levels (N,) at timesteps, which may lie between those of training."""
        training = self._training_sigmas()
        return np.interp(times, np.arange(len(training)), training)

    def _times_of(self, levels: np.ndarray, *, single: bool = False) -> np.ndarray:
        """Return the timesteps (N,), fractions among them, of noise levels; see ``sigma_to_timestep``."""
        return noise_schedule.sigma_to_timestep(levels, np.log(self._training_sigmas()), single=single)

    # ---- the hand-written loop ----------------------------------------------------------------------------------

    def _alpha_sigma_at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return self._alpha_sigma(self._levels_at(timesteps, like))

    def _levels_at(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """Return noise levels at timesteps (B,) of the run (before it: of training), shaped like ``like`` (B, ...)."""
        if self._begin_index is None:
            index = self._where(timesteps)
        else:  # image-to-image noises to the level it begins at, inpainting to the one it has reached
            index = [self._begin_index if self._step_index is None else self._step_index] * timesteps.numel()
        return self.sigmas.to(like.device, like.dtype)[index].reshape(-1, *[1] * (like.ndim - 1))

    def _where(self, timesteps: Tensor) -> Tensor | list[int]:
        """Return where timesteps (B,) are in the run; before it, in training."""
        if self._plan is None:
            return len(self) - 1 - timesteps.reshape(-1).long()  # the training grid begins with its last timestep
        return [self._index_of(t) for t in timesteps.reshape(-1).tolist()]
