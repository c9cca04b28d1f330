"""Euler's method in sigma around the network of EDM, with optional churn.

The step is that of ``minidiff.schedulers.euler``, the network's surroundings those of ``minidiff.schedulers.edm``.
Karras et al. 2022, https://arxiv.org/abs/2206.00364, Algorithm 2 without its second-order correction. Checked against
``diffusers.EDMEulerScheduler``. CosXL is sampled with it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minidiff.configured import register_to_config
from minidiff.noise import Generators
from minidiff.outputs import Output
from minidiff.schedulers.base import Device, Grid, Update
from minidiff.schedulers.edm import EdmScheduler, Preconditioning
from minidiff.schedulers.euler import EulerSteps


@dataclass
class EDMEulerSchedulerOutput(Output):
    """What ``step`` returns: the next sample and the clean one that is predicted."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class EDMEulerScheduler(EulerSteps, EdmScheduler):
    """Sample a network of EDM with Euler's method."""

    refuses_indices = True
    ramp_dtype = torch.float64

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: str = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
        rho: float = 7.0,
        final_sigmas_type: str = "zero",
    ) -> None:
        super().__init__()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        sigmas: Tensor | Sequence[float] | None = None,
    ) -> None:
        """Plan a run, over ``sigmas`` if given: as in the reference not noise levels but places on the schedule.

        They rise from 0, where the level is ``sigma_max``, to 1, where it is ``sigma_min``; only Karras' schedule
        has levels at any place.
        """
        self._begin(self.plan(num_inference_steps, device=device, sigmas=sigmas))

    def _grid(self, count: int, sigmas: Tensor | Sequence[float] | None = None) -> Grid:
        if sigmas is None:
            return self._over(self._ramp(count))
        ramp = torch.as_tensor(sigmas, dtype=self.ramp_dtype).cpu()
        rising = ramp.ndim == 1 and bool((ramp.diff() > 0).all()) and ramp[0] >= 0 and ramp[-1] <= 1
        if not rising or self.config.sigma_schedule != "karras":
            raise ValueError(
                "sigmas= of EDMEulerScheduler are places on its Karras schedule, rising from 0 (sigma_max) to 1 "
                f"(sigma_min), and not noise levels; found {sigmas!r} on {self.config.sigma_schedule!r}"
            )
        return self._over(ramp)

    def _over(self, ramp: Tensor) -> Grid:
        levels = self._levels(ramp)
        return self._ended(levels, 0.0 if self.config.final_sigmas_type == "zero" else levels[-1].item())

    def _training_grid(self) -> Grid:
        return self._over(torch.arange(len(self) + 1, dtype=self.ramp_dtype) / len(self))

    def _around(self, sigma: Tensor, hat: Tensor) -> tuple[list[Preconditioning], list[Preconditioning]]:
        return self._at_each(sigma), self._at_each(hat)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
        pred_original_sample: Tensor | None = None,
    ) -> EDMEulerSchedulerOutput | tuple[Tensor, ...]:
        """Take the step at ``timestep``, to the clean ``pred_original_sample`` if given; see ``Scheduler.step``."""
        self._past = () if pred_original_sample is None else (pred_original_sample,)
        churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
        return self._take_step(model_output, timestep, sample, generator, return_dict, **churn)

    def _output(self, update: Update) -> EDMEulerSchedulerOutput:
        return EDMEulerSchedulerOutput(update.x, update.x0)
