"""Heun's method in sigma: a step of Euler's, then once more with the mean of the slopes at both ends.

    d_1 = (y - x0(y, sigma)) / sigma,             y_1 = y + (sigma' - sigma) d_1
    d_2 = (y_1 - x0(y_1, sigma')) / sigma',       y'  = y + (sigma' - sigma) (d_1 + d_2) / 2

Two evaluations per step, but for the last, to sigma' = 0, which is Euler's: n steps are 2 n - 1 evaluations.

Karras et al. 2022, https://arxiv.org/abs/2206.00364, Algorithm 1. Checked against ``diffusers.HeunDiscreteScheduler``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minidiff.configured import register_to_config
from minidiff.schedulers import noise_schedule
from minidiff.schedulers.base import Device, Grid, Past, Plan, Update
from minidiff.schedulers.prediction import Scalar, Thresholding
from minidiff.schedulers.sigma_space import NoiseLevel, SigmaSpaceScheduler, noise_levels


class HeunStep(NamedTuple):
    """The numbers of one evaluation."""

    level: NoiseLevel
    corrects: bool  # the second evaluation of a step
    move: Scalar  # sigma' - sigma of the whole step


class HeunDiscreteScheduler(SigmaSpaceScheduler):
    """Sample with Heun's second-order method, two evaluations per step."""

    order = 2
    beta_schedules = (*noise_schedule.BETA_SCHEDULES, "exp")

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        super().__init__()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        num_train_timesteps: int | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Plan a run, over these ``timesteps`` if given; see ``Scheduler.set_timesteps``."""
        self._require_training(num_train_timesteps)
        self._begin(self.plan(num_inference_steps, device=device, timesteps=timesteps))

    @property
    def _thresholding(self) -> Thresholding:
        return Thresholding(limit=self.config.clip_sample_range if self.config.clip_sample else None)

    def _grid(self, count: int, timesteps: Sequence[float] | None = None) -> Grid:
        times, sigmas = self._closed(*self._spaced(count, timesteps))
        return Grid(
            torch.cat([times[:1], times[1:].repeat_interleave(2)]),
            torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]]),
        )

    def _coefficients(self, plan: Plan) -> tuple[HeunStep, ...]:
        moves = plan.sigmas.diff().unbind()
        corrects = [(i - plan.start) % 2 == 1 for i in range(len(moves))]
        moves = [moves[i - 1] if second else moves[i] for i, second in enumerate(corrects)]
        return tuple(map(HeunStep, noise_levels(plan.sigmas[:-1]), corrects, moves))

    def _x0(self, level: NoiseLevel, y: Tensor, out: Tensor) -> Tensor:
        return self._thresholding(super()._x0(level, y, out))

    def _update(self, plan: Plan, i: int, x: Tensor, out: Tensor, past: Past, noise: Tensor | None) -> Update:
        step = plan.coefficients[i]
        x0 = self._x0(step.level, x, out)
        slope = (x - x0) / step.level.sigma
        if not step.corrects:
            return Update(x + slope * step.move, (x, slope), x0)
        begin, first = past
        return Update(begin + (first + slope) / 2 * step.move, (), x0)
