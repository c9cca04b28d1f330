"""TCD: trajectory consistency distillation. Each step jumps to a level below the next one and noises up to it.

With s the next timestep, s' = floor((1 - eta) s) and a for alpha_bar:

    noised = sqrt(a_s') x0 + sqrt(1 - a_s') eps
    x_s    = sqrt(a_s / a_s') noised + sqrt(1 - a_s / a_s') noise            but for the last step: noised itself

eta = 0 is DDIM over these timesteps, eta = 1 jumps all the way, as LCM does. Zheng et al. 2024,
https://arxiv.org/abs/2402.19159, Algorithm 4 (eta is its gamma). Checked against ``diffusers.TCDScheduler``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.configured import register_to_config
from minidiff.noise import Generators
from minidiff.outputs import Output
from minidiff.schedulers.base import Past, Plan, Update
from minidiff.schedulers.consistency import ConsistencyScheduler
from minidiff.schedulers.prediction import Scalar, Thresholding, predict_eps, weighted_sum


class TCDStep(NamedTuple):
    """The numbers of one TCD step."""

    alpha: Scalar  # sqrt(alpha_bar_t)
    sigma: Scalar  # sqrt(1 - alpha_bar_t)
    to_x0: Scalar  # sqrt(a_s')
    to_eps: Scalar  # sqrt(1 - a_s')
    to_noised: Scalar  # sqrt(a_s / a_s')
    to_noise: Scalar  # sqrt(1 - a_s / a_s')


@dataclass
class TCDSchedulerOutput(Output):
    """What ``step`` returns: the next sample and the one, less noisy, it was noised from."""

    prev_sample: Tensor
    pred_noised_sample: Tensor | None = None


class TCDScheduler(ConsistencyScheduler):
    """Sample a model distilled by TCD. ``clip_sample`` and ``thresholding`` have no effect, as in the reference."""

    _thresholding = Thresholding()  # none, whatever the configuration says
    run_options: ClassVar[Mapping[str, Any]] = {"eta": 0.3}

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

    def _distilled(self, original_steps: int | None, strength: float) -> np.ndarray:
        if original_steps is None:
            return super()._distilled(None, strength)
        return np.arange(int(self.config.num_train_timesteps * strength))  # given, it means all of them

    def _coefficients(self, plan: Plan) -> tuple[TCDStep, ...]:
        eta = plan.options["eta"]
        if not 0 <= eta <= 1:
            raise ValueError(f"eta should lie between 0 (no noise) and 1 (all of it), found {eta}")
        following = torch.tensor([*plan.times[1:], 0])
        below = torch.floor((1 - eta) * following).long()
        a_t, a_s, a_below = self._alpha_bar(plan.times), self.alphas_cumprod[following], self.alphas_cumprod[below]
        self._require_signal(a_t)
        columns = (
            a_t.sqrt(),
            (1 - a_t).sqrt(),
            a_below.sqrt(),
            (1 - a_below).sqrt(),
            (a_s / a_below).sqrt(),
            (1 - a_s / a_below).sqrt(),
        )
        return tuple(map(TCDStep, *columns))

    def wants_noise(self, plan: Plan, i: int) -> bool:
        return plan.options["eta"] > 0 and not self._is_last(plan, i)

    def _update(self, plan: Plan, i: int, x: Tensor, out: Tensor, past: Past, noise: Tensor | None) -> Update:
        step, x0 = plan.coefficients[i], self.denoised(plan, i, x, out)
        eps = predict_eps(self._predicts, x, out, step.alpha, step.sigma)
        noised = weighted_sum((step.to_x0, x0), (step.to_eps, eps))
        if not self.wants_noise(plan, i):
            return Update(noised, (), noised)
        return Update(weighted_sum((step.to_noised, noised), (step.to_noise, noise)), (), noised)

    def _output(self, update: Update) -> TCDSchedulerOutput:
        return TCDSchedulerOutput(update.x, update.x0)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.3,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> TCDSchedulerOutput | tuple[Tensor, ...]:
        """Take the step at ``timestep``, noising up from ``1 - eta`` of the next one; see ``Scheduler.step``."""
        return self._take_step(model_output, timestep, sample, generator, return_dict, eta=eta)
