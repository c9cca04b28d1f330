"""LCM: multistep consistency sampling. Each step jumps to a clean sample and noises it to the next timestep.

    denoised = c_out x0 + c_skip x_t
    x_s      = sqrt(alpha_bar_s) denoised + sqrt(1 - alpha_bar_s) noise      but for the last step: denoised itself

with c_skip = 0.25 / (s² + 0.25), c_out = s / sqrt(s² + 0.25) and s = timestep_scaling t.

Luo et al. 2023, https://arxiv.org/abs/2310.04378, eq. 8 and Algorithm 3. Checked against ``diffusers.LCMScheduler``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minidiff.configured import register_to_config
from minidiff.outputs import Output
from minidiff.schedulers.base import Past, Plan, Stochastic, Update
from minidiff.schedulers.consistency import ConsistencyScheduler
from minidiff.schedulers.prediction import Scalar, weighted_sum

SIGMA_DATA = 0.5


class LCMStep(NamedTuple):
    """The numbers of one LCM step."""

    alpha: Scalar  # sqrt(alpha_bar_t)
    sigma: Scalar  # sqrt(1 - alpha_bar_t)
    skip: Scalar  # c_skip
    out: Scalar  # c_out
    to_denoised: Scalar  # sqrt(alpha_bar_s)
    to_noise: Scalar  # sqrt(1 - alpha_bar_s)


@dataclass
class LCMSchedulerOutput(Output):
    """What ``step`` returns: the next sample and the clean one it was noised from."""

    prev_sample: Tensor
    denoised: Tensor | None = None


class LCMScheduler(Stochastic, ConsistencyScheduler):
    """Sample a latent consistency model in 1 to 8 steps."""

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Sequence[float] | None = None,
        original_inference_steps: int = 50,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        timestep_scaling: float = 10.0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        super().__init__()

    def get_scalings_for_boundary_condition_discrete(self, timestep: Scalar) -> tuple[Scalar, Scalar]:
        """Return c_skip and c_out at timesteps; loops by hand call it so."""
        scaled = timestep * self.config.timestep_scaling
        return SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2), scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5

    def _coefficients(self, plan: Plan) -> tuple[LCMStep, ...]:
        alpha_bar_t = self._alpha_bar(plan.times)
        alpha_bar_s = self._alpha_bar([*plan.times[1:], plan.times[-1]])
        self._require_signal(alpha_bar_t)
        columns = (
            alpha_bar_t.sqrt(),
            (1 - alpha_bar_t).sqrt(),
            *self.get_scalings_for_boundary_condition_discrete(torch.tensor(plan.times)),
            alpha_bar_s.sqrt(),
            (1 - alpha_bar_s).sqrt(),
        )
        return tuple(map(LCMStep, *columns))

    def wants_noise(self, plan: Plan, i: int) -> bool:
        return not self._is_last(plan, i)

    def denoised(self, plan: Plan, i: int, x: Tensor, out: Tensor) -> Tensor:
        step = plan.coefficients[i]
        return weighted_sum((step.out, super().denoised(plan, i, x, out)), (step.skip, x))

    def _update(self, plan: Plan, i: int, x: Tensor, out: Tensor, past: Past, noise: Tensor | None) -> Update:
        step, denoised = plan.coefficients[i], self.denoised(plan, i, x, out)
        if not self.wants_noise(plan, i):
            return Update(denoised, (), denoised)
        return Update(weighted_sum((step.to_denoised, denoised), (step.to_noise, noise)), (), denoised)

    def _output(self, update: Update) -> LCMSchedulerOutput:
        return LCMSchedulerOutput(update.x, update.x0)
