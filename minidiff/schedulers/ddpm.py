"""DDPM: ancestral sampling of the diffusion process a network was trained on.

With alpha_bar_t at this timestep, alpha_bar_s at the next (1 after the last) and beta = 1 - alpha_bar_t / alpha_bar_s:

    x_s = sqrt(alpha_bar_s) beta / (1 - alpha_bar_t) x0
        + sqrt(1 - beta) (1 - alpha_bar_s) / (1 - alpha_bar_t) x_t
        + std noise

Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. 6, 7 and 15. Checked against ``diffusers.DDPMScheduler``.
It is DDIM with eta = 1 (variance_type ``fixed_small``).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minidiff.configured import register_to_config
from minidiff.schedulers import noise_schedule
from minidiff.schedulers.base import Device, Grid, Past, Plan, Scheduler, Stochastic, Update
from minidiff.schedulers.prediction import Scalar

VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")


class DDPMStep(NamedTuple):
    """The numbers of one DDPM step."""

    alpha: Scalar  # sqrt(alpha_bar_t)
    sigma: Scalar  # sqrt(1 - alpha_bar_t)
    to_x0: Scalar  # the coefficient of the predicted x0
    to_x: Scalar  # the coefficient of x
    std: Scalar  # of the noise, where the network does not predict it
    log_small: Scalar  # log of the least and of the greatest variance that make sense, those of fixed_small and
    log_large: Scalar  # fixed_large: a network with learned_range says where between the two it lies


class DDPMScheduler(Stochastic, Scheduler):
    """Sample by the reversed diffusion process of DDPM, drawing noise at every step but the last."""

    beta_schedules = (*noise_schedule.BETA_SCHEDULES, "laplace", "sigmoid")
    finds_by_timestep = starts_ready = True

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        variance_type: str | None = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        # DPM-Solver files say `variance_type: null`; it means fixed_small here, as it does in the reference.
        self._require("variance_type", (*VARIANCES, None))
        super().__init__()
        self.variance_type = variance_type

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, timesteps: Sequence[int] | None = None
    ) -> None:
        """Plan a run, over these ``timesteps`` if given; see ``Scheduler.set_timesteps``."""
        self._begin(self.plan(num_inference_steps, device=device, timesteps=timesteps))

    def _grid(self, count: int, timesteps: Sequence[int] | None = None) -> Grid:
        if timesteps is None:
            return self._grid_of(self._spaced_timesteps(count))
        return self._grid_of(noise_schedule.custom_timesteps(timesteps, len(self)))

    def _coefficients(self, plan: Plan) -> tuple[DDPMStep, ...]:
        alpha_bar_t = self.alphas_cumprod[list(plan.times)]
        alpha_bar_s = torch.cat([alpha_bar_t[1:], torch.ones(1)])
        self._require_signal(alpha_bar_t)
        beta_bar_t, beta_bar_s = 1 - alpha_bar_t, 1 - alpha_bar_s
        alpha = alpha_bar_t / alpha_bar_s
        beta = 1 - alpha
        small = (beta_bar_s / beta_bar_t * beta).clamp(min=1e-20)
        columns = (
            alpha_bar_t**0.5,
            beta_bar_t**0.5,
            alpha_bar_s**0.5 * beta / beta_bar_t,
            alpha**0.5 * beta_bar_s / beta_bar_t,
            self._std(small, beta),
            small.log(),
            beta.log(),
        )
        return tuple(map(DDPMStep, *columns))

    def _std(self, small: Tensor, large: Tensor) -> Tensor:
        """Return the standard deviation of the noise; what a network predicts is worked out at each step instead."""
        if self.variance_type == "fixed_large_log":
            raise ValueError(
                "variance_type='fixed_large_log' takes the square root of a logarithm below 0, which is NaN at every "
                "step in the reference too: use 'fixed_large', the same variance without the logarithm"
            )
        if self.variance_type == "fixed_small_log":
            return torch.exp(0.5 * torch.log(small))
        return (large if self.variance_type == "fixed_large" else small) ** 0.5

    def wants_noise(self, plan: Plan, i: int) -> bool:
        return plan.times[i] > 0

    def denoised(self, plan: Plan, i: int, x: Tensor, out: Tensor) -> Tensor:
        return super().denoised(plan, i, x, self._split(out, x)[0])

    def _update(self, plan: Plan, i: int, x: Tensor, out: Tensor, past: Past, noise: Tensor | None) -> Update:
        step, x0 = plan.coefficients[i], self.denoised(plan, i, x, out)
        moved = step.to_x0 * x0 + step.to_x * x
        if self.wants_noise(plan, i):
            moved = moved + self._scaled(noise, step, self._split(out, x)[1])
        return Update(moved, (), x0)

    def _split(self, out: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split the network's output (B, 2C, ...) into its prediction and its variance, if it has learned one."""
        if self.variance_type not in ("learned", "learned_range"):
            return out, None
        channels = x.shape[1]
        if out.shape[1] != 2 * channels:
            raise ValueError(
                f"variance_type={self.variance_type!r} needs a network with {2 * channels} output channels (prediction "
                f"and variance for {channels}), found {out.shape[1]}; a network without learned variance samples with "
                "variance_type='fixed_small'"
            )
        return tuple(out.split(channels, dim=1))

    def _scaled(self, noise: Tensor, step: DDPMStep, predicted: Tensor | None) -> Tensor:
        """Return the noise of the step, with the network's own variance if it predicts one."""
        if predicted is None:
            return step.std * noise
        if self.variance_type == "learned":
            return predicted**0.5 * noise
        part = (predicted + 1) / 2  # Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, eq. 15
        return torch.exp(0.5 * (part * step.log_large + (1 - part) * step.log_small)) * noise
