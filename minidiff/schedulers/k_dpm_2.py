"""DPM2: the midpoint method in sigma, with the midpoint taken in log sigma; and its ancestral variant.

    sigma_mid = sqrt(sigma sigma_to)
    y_mid     = y + (sigma_mid - sigma) (y - x0(y, sigma)) / sigma
    y'        = y + (sigma_to - sigma) (y_mid - x0(y_mid, sigma_mid)) / sigma_mid   [+ sigma_up noise]

sigma_to is the next level, or in the ancestral variant sigma_down, from which fresh noise goes up to the next level.
Two evaluations per step, but for the last, which is Euler's: n steps are 2 n - 1 evaluations.

DPM-Solver-2 of Karras et al. 2022, https://arxiv.org/abs/2206.00364, in the form of k-diffusion
(https://github.com/crowsonkb/k-diffusion). Checked against ``diffusers.KDPM2DiscreteScheduler`` and
``diffusers.KDPM2AncestralDiscreteScheduler``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.configured import register_to_config
from minidiff.schedulers.base import Device, Grid, Past, Plan, Stochastic, Update
from minidiff.schedulers.euler_ancestral import ancestral
from minidiff.schedulers.prediction import Scalar
from minidiff.schedulers.sigma_space import NoiseLevel, SigmaSpaceScheduler, noise_levels


class KDPM2Step(NamedTuple):
    """The numbers of one evaluation."""

    level: NoiseLevel  # of the network's input: sigma, then sigma_mid
    finishes: bool  # the second evaluation of a step
    move: Scalar  # from sigma to sigma_mid, then from sigma to sigma_to
    up: Scalar  # sigma_up


class KDPM2DiscreteScheduler(SigmaSpaceScheduler):
    """Sample with the midpoint method, two evaluations per step."""

    order = 2
    prediction_types = ("epsilon", "v_prediction")

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        super().__init__()

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, num_train_timesteps: int | None = None
    ) -> None:
        """Plan a run; see ``Scheduler.set_timesteps``."""
        self._require_training(num_train_timesteps)
        self._begin(self.plan(num_inference_steps, device=device))

    def _grid(self, count: int) -> Grid:
        times, spaced = self._spaced(count)
        if self.config.use_karras_sigmas:
            times = times.round()
        sigmas = self._closed(times, spaced).sigmas
        middle = self._times_of(self._middles(sigmas)[:-1].numpy(), single=True)  # the last step has none
        told = np.stack([middle.astype(times.dtype), times[1:]], axis=1)
        return Grid(
            torch.from_numpy(np.concatenate([times[:1], told.ravel()])),
            torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2), sigmas[-1:]]),
        )

    def _targets(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """Return sigma_to and sigma_up of the steps between noise levels (N + 1,)."""
        return sigmas[1:], torch.zeros_like(sigmas[1:])

    def _middles(self, sigmas: Tensor) -> Tensor:
        """Return sigma_mid of the steps between noise levels (N + 1,)."""
        return sigmas[1:].log().lerp(sigmas[:-1].log(), 0.5).exp()

    def _coefficients(self, plan: Plan) -> tuple[KDPM2Step, ...]:
        sigmas = torch.cat([plan.sigmas[:1], plan.sigmas[1:-1:2]])  # each level once: (N + 1,)
        to, up = self._targets(sigmas)
        middle = self._middles(sigmas)
        middle[-1] = 0.0  # the last step goes all the way at once
        start, middle_at = noise_levels(sigmas[:-1]), noise_levels(middle)
        first, whole, nothing = middle - sigmas[:-1], to - sigmas[:-1], torch.zeros(())
        steps: list[KDPM2Step] = []
        for i in range(len(plan.times)):
            # Evaluation 2 n begins step n, 2 n + 1 finishes it. A run that is started between the two begins the next.
            if (i - plan.start) % 2 == 0:
                n = (i + 1) // 2
                steps.append(KDPM2Step(start[n], False, first[n], nothing))
            else:
                n = (i - 1) // 2
                steps.append(KDPM2Step(middle_at[n], True, whole[n], up[n]))
        return tuple(steps)

    def _update(self, plan: Plan, i: int, x: Tensor, out: Tensor, past: Past, noise: Tensor | None) -> Update:
        step = plan.coefficients[i]
        x0 = self._x0(step.level, x, out)
        slope = (x - x0) / step.level.sigma
        if not step.finishes:
            return Update(x + slope * step.move, (x,), x0)
        x = past[0] + slope * step.move
        return Update(x + noise * step.up if self.wants_noise(plan, i) else x, (), x0)


class KDPM2AncestralDiscreteScheduler(Stochastic, KDPM2DiscreteScheduler):
    """Sample with the midpoint method and fresh noise at every step but the last."""

    def _targets(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        down, up = ancestral(sigmas[:-1], sigmas[1:])
        # Between levels that are far apart rounding leaves nothing of sigma_down and no logarithm for the midpoint, NaN
        # in the reference. Without the cancellation it is sigma'² / sigma.
        return torch.where(down > 0, down, sigmas[1:] ** 2 / sigmas[:-1]), up

    def _middles(self, sigmas: Tensor) -> Tensor:
        return sigmas[:-1].log().lerp(self._targets(sigmas)[0].log(), 0.5).exp()

    def wants_noise(self, plan: Plan, i: int) -> bool:
        return plan.coefficients[i].finishes
