"""What the solvers of k-diffusion share (Euler, Heun, LMS, DPM2): they work on samples that are not scaled down.

    y = x0 + sigma eps = x sqrt(sigma² + 1)         where x = alpha x0 + sigma_t eps is what the network is shown

The flow from noise to data is then dy / dsigma = eps = (y - x0) / sigma, and a step of Euler's method from sigma to
sigma' is the mean of y and x0 in the ratio of the levels:

    y' = (sigma' / sigma) y + (1 - sigma' / sigma) x0

Karras et al. 2022, https://arxiv.org/abs/2206.00364, eq. 4 and Algorithm 1.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.schedulers import noise_schedule
from minidiff.schedulers.base import Plan, Scheduler
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
    columns = (sigmas, square**0.5, square, sigmas / square**0.5)
    return [NoiseLevel(*numbers) for numbers in zip(*map(torch.unbind, columns), strict=True)]


def upcast(x: Tensor) -> Tensor:
    """Return half precision as float32: samples are as large as sigma, which leaves half precision few digits."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class SigmaSpaceScheduler(Scheduler):
    """Base of the solvers that work on unscaled samples. Their steps hold a ``level``: that of the network's input."""

    starts_ready = True
    time_dtype = torch.float32
    refuses_indices: ClassVar[bool] = False  # step() refuses integers, which are never a timestep but often an index

    def __init__(self) -> None:
        super().__init__()
        noise_schedule.chosen_spacing(self.config)  # raises if it asks for several
        if self.config.get("rescale_betas_zero_snr"):
            self.alphas_cumprod[-1] = noise_schedule.ALMOST_NO_SIGNAL  # so that the first sigma is finite

    @property
    def _respace(self) -> Callable[[float, float, int], np.ndarray] | None:
        return noise_schedule.chosen_spacing(self._own())

    # ---- the noise levels of a run ------------------------------------------------------------------------------

    def _spaced(self, count: int, timesteps: Sequence[float] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return timesteps (N,) and noise levels (N,), largest first, without the last level."""
        config = self.config
        if timesteps is not None:
            if self._respace is not None or self._tells_log_sigma():
                raise ValueError("timesteps= cannot be combined with Karras, exponential, beta or continuous spacing")
            times = noise_schedule.custom_timesteps(timesteps, config.num_train_timesteps, whole=False).numpy()
        else:
            times = noise_schedule.spaced_timesteps(
                config.timestep_spacing, count, config.num_train_timesteps, config.steps_offset
            ).numpy()
            if config.timestep_spacing == "linspace":  # these solvers do not round it
                times = np.linspace(0, config.num_train_timesteps - 1, count, dtype=np.float32)[::-1]
        times = times.astype(np.float32)
        training = self._training_sigmas()
        sigmas = self._interpolated(times, training)
        if self._respace is None:
            return times, sigmas
        low, high = self._bounds()
        sigmas = self._respace(
            sigmas[-1].item() if low is None else low, sigmas[0].item() if high is None else high, count
        )
        return noise_schedule.sigma_to_timestep(sigmas, np.log(training)), sigmas

    def _bounds(self) -> tuple[float | None, float | None]:
        """Return the least and greatest noise level to respace between, None for those of the timesteps.

        Only Euler has these fields; in another class's config they come from elsewhere, and count as in the reference.
        """
        return self.config.get("sigma_min"), self.config.get("sigma_max")

    def _interpolated(self, times: np.ndarray, training: np.ndarray) -> np.ndarray:
        """Return the noise levels (N,) at timesteps, which may lie between those of training."""
        return np.interp(times, np.arange(len(training)), training)

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

    def level(self, plan: Plan, i: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        return torch.ones((), dtype=dtype), plan.sigmas[i].to(dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x0 + sigma noise at timesteps (B,): those of the run, or before ``set_timesteps`` of training."""
        return original_samples + noise * self._levels_at(timesteps, original_samples)

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
