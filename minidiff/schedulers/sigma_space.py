"""What the solvers of k-diffusion share (Euler, Heun, LMS, DPM2): they work on samples that are not scaled down.

    y = x0 + sigma eps = x sqrt(sigma² + 1)         where x = alpha x0 + sigma_t eps is what the network is shown

The flow from noise to data is then dy / dsigma = eps = (y - x0) / sigma, and a step of Euler's method from sigma to
sigma' is the mean of y and x0 in the ratio of the levels:

    y' = (sigma' / sigma) y + (1 - sigma' / sigma) x0

Karras et al. 2022, https://arxiv.org/abs/2206.00364, eq. 4 and Algorithm 1.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.schedulers import noise_schedule
from minidiff.schedulers.base import Grid, Plan
from minidiff.schedulers.noise_levels import NoiseLevelScheduler
from minidiff.schedulers.prediction import Scalar, predict_x0_unscaled


class NoiseLevel(NamedTuple):
    """A noise level and what is worked out from it, in float32 as in the reference."""

    sigma: Scalar
    scale: Scalar  # sqrt(sigma² + 1)
    square: Scalar  # sigma² + 1
    ratio: Scalar  # sigma / sqrt(sigma² + 1)


def noise_levels(sigmas: Tensor) -> list[NoiseLevel]:
    """Return the ``NoiseLevel`` of each of sigmas (N,)."""
    square = sigmas**2 + 1
    return list(map(NoiseLevel, sigmas, square**0.5, square, sigmas / square**0.5))


def upcast(x: Tensor) -> Tensor:
    """Return half precision as float32: samples are as large as sigma, which leaves half precision few digits."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class SigmaSpaceScheduler(NoiseLevelScheduler):
    """Base of the solvers that work on unscaled samples. Their steps hold a ``level``: that of the network's input."""

    starts_ready = True
    refuses_indices: ClassVar[bool] = False  # step() refuses integers, which are never a timestep but often an index

    # ---- the noise levels of a run ------------------------------------------------------------------------------

    def _spaced(self, count: int, timesteps: Sequence[float] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return timesteps (N,) and noise levels (N,), largest first, without the last level."""
        if timesteps is not None:
            if self._respace is not None or self._tells_log_sigma():
                raise ValueError("timesteps= cannot be combined with Karras, exponential, beta or continuous spacing")
            times = noise_schedule.custom_timesteps(timesteps, len(self), whole=False).numpy()
        else:
            times = self._spaced_timesteps(count).numpy()
            if self.config.timestep_spacing == "linspace":  # these solvers do not round it
                times = np.linspace(0, len(self) - 1, count, dtype=np.float32)[::-1]
        times = times.astype(np.float32)
        levels = self._levels_of(times)
        if self._respace is None:
            return times, levels
        levels = self._respaced(count, levels[::-1])
        return self._times_of(levels), levels

    def _closed(self, times: np.ndarray, levels: np.ndarray, last: float = 0.0) -> Grid:
        """Add the level after the last step."""
        closed = np.append(levels, last).astype(np.float32)
        return Grid(torch.from_numpy(times.astype(np.float32)), torch.from_numpy(closed))

    def _tells_log_sigma(self) -> bool:
        """Say whether the network is told log(sigma) / 4 instead of a timestep, as in EDM."""
        return False

    def _init_noise_sigma(self, sigmas: Tensor) -> float:
        largest = sigmas.max()
        if self.config.timestep_spacing in ("linspace", "trailing"):
            return largest.item()
        return ((largest**2 + 1) ** 0.5).item()

    @property
    def init_noise_sigma(self) -> Tensor:
        """The standard deviation of the sample that the run starts from, () float32."""
        return torch.tensor(super().init_noise_sigma)

    def _require_training(self, num_train_timesteps: int | None) -> None:
        if num_train_timesteps not in (None, len(self)):
            raise ValueError(f"num_train_timesteps={num_train_timesteps} is not the configuration's {len(self)}")

    # ---- samples, clean and noisy -------------------------------------------------------------------------------

    def scale_input(self, plan: Plan, i: int, x: Tensor) -> Tensor:
        return x / plan.coefficients[i].level.scale

    def denoised(self, plan: Plan, i: int, x: Tensor, out: Tensor) -> Tensor:
        return self._x0(plan.coefficients[i].level, upcast(x), out)

    def _x0(self, level: NoiseLevel, y: Tensor, out: Tensor) -> Tensor:
        return predict_x0_unscaled(self._predicts, y, out, *level)

    def _alpha_sigma(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones((), dtype=sigma.dtype), sigma

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return v = alpha noise - sigma_t x0 at timesteps (B,).

        The reference (``EulerDiscreteScheduler``) looks timesteps up in tables that run in opposite directions and
        returns the velocity of the mirrored one; minidiff does not.
        """
        sigma = self._levels_at(timesteps, sample)
        alpha = 1 / (sigma**2 + 1) ** 0.5
        return alpha * noise - sigma * alpha * sample

    # ---- the hand-written loop ----------------------------------------------------------------------------------

    def _clock(self, timestep: float | Tensor) -> int:
        index = isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point())
        if self.refuses_indices and index:
            raise ValueError(
                f"{type(self).__name__}.step: {timestep!r} is an integer, as from enumerate(); pass one of timesteps"
            )
        return super()._clock(timestep)
