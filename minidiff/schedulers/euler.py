"""Euler's method in sigma, with optional churn: the simplest solver, one evaluation per step.

    sigma_hat = sigma (1 + gamma)                                   gamma > 0 only within [s_tmin, s_tmax]
    y_hat     = y + sqrt(sigma_hat² - sigma²) s_noise noise         churn: put some noise back first
    y'        = y_hat + (sigma' - sigma_hat) (y_hat - x0) / sigma_hat

Karras et al. 2022, https://arxiv.org/abs/2206.00364, Algorithm 2 without its second-order correction. Checked against
``diffusers.EulerDiscreteScheduler``. Without churn it is DDIM (eta = 0).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.configured import register_to_config
from minidiff.noise import Generators
from minidiff.schedulers.base import Device, Grid, Past, Plan, SchedulerOutput, Update
from minidiff.schedulers.prediction import Scalar
from minidiff.schedulers.sigma_space import NoiseLevel, SigmaSpaceScheduler, noise_levels, upcast


class EulerStep(NamedTuple):
    """The numbers of one Euler step."""

    level: Any  # of what the network is shown: NoiseLevel, or EDM's Preconditioning
    hat: Any  # the same after churn, where its output is read
    sigma_hat: Scalar
    churn: Scalar  # sqrt(sigma_hat² - sigma²)
    move: Scalar  # sigma' - sigma_hat
    churns: bool


class EulerSteps:
    """The steps of Euler's method; a scheduler says in ``_around`` what belongs to their noise levels."""

    run_options: ClassVar[Mapping[str, Any]] = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}

    def _around(self, sigma: Tensor, hat: Tensor) -> tuple[Sequence[Any], Sequence[Any]]:
        """Return ``EulerStep.level`` and ``EulerStep.hat`` of levels (N,) and the churned ones (N,)."""
        raise NotImplementedError

    def _coefficients(self, plan: Plan) -> tuple[EulerStep, ...]:
        options, count = plan.options, len(plan.times)
        sigma, following = plan.sigmas[:count], plan.sigmas[1 : count + 1]
        churned = (options["s_tmin"] <= sigma) & (sigma <= options["s_tmax"])
        gamma = torch.where(churned, min(options["s_churn"] / (len(plan.sigmas) - 1), 2**0.5 - 1), 0.0)
        hat = sigma * (gamma + 1)
        columns = (hat, (hat**2 - sigma**2) ** 0.5, following - hat)
        return tuple(map(EulerStep, *self._around(sigma, hat), *columns, (hat > sigma).tolist()))

    def wants_noise(self, plan: Plan, i: int) -> bool:
        return plan.coefficients[i].churns

    def _update(self, plan: Plan, i: int, x: Tensor, out: Tensor, past: Past, noise: Tensor | None) -> Update:
        step, y = plan.coefficients[i], upcast(x)
        if self.wants_noise(plan, i):
            y = y + noise * plan.options["s_noise"] * step.churn
        x0 = past[0] if past else self._x0(step.hat, y, out)  # EDM's step may be given it
        slope = (y - x0).div_(step.sigma_hat)
        moved = slope.mul_(step.move).add_(y)  # in place, a twentieth faster: the slope is nobody else's
        return Update(moved.to(out.dtype), (), x0)


class EulerDiscreteScheduler(EulerSteps, SigmaSpaceScheduler):
    """Sample with Euler's method on unscaled samples."""

    refuses_indices = True

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        interpolation_type: str = "linear",
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        timestep_spacing: str = "linspace",
        timestep_type: str = "discrete",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        final_sigmas_type: str = "zero",
    ) -> None:
        self._require("interpolation_type", ("linear", "log_linear"))
        self._require("timestep_type", ("discrete", "continuous"))
        self._require("final_sigmas_type", ("zero", "sigma_min"))
        super().__init__()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Plan a run, over these ``timesteps`` or ``sigmas`` if given; see ``Scheduler.set_timesteps``."""
        self._begin(self.plan(num_inference_steps, device=device, timesteps=timesteps, sigmas=sigmas))

    def _grid(
        self, count: int, timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None
    ) -> Grid:
        if sigmas is None:
            last = 0.0 if self.config.final_sigmas_type == "zero" else self._training_sigmas()[0]
            grid = self._closed(*self._spaced(count, timesteps), last)
        else:
            given = np.asarray(sigmas, dtype=np.float32)
            falls = np.diff(given) < 0  # the last may be repeated, as final_sigmas_type="sigma_min" repeats it
            if given.ndim != 1 or len(given) < 2 or not falls[:-1].all() or given[-1] > given[-2]:
                raise ValueError(f"sigmas should descend, and end with the level after the last step; found {sigmas!r}")
            grid = self._closed(self._times_of(given[:-1]), given[:-1], given[-1])
        return Grid(0.25 * grid.sigmas[:-1].log(), grid.sigmas) if self._tells_log_sigma() else grid

    def _levels_of(self, times: np.ndarray) -> np.ndarray:
        if self.config.interpolation_type == "linear":
            return super()._levels_of(times)
        # One level more than there are timesteps, so such a run ends one level before the last: the reference's way.
        training = self._training_sigmas()
        ends = np.log(training[-1]).item(), np.log(training[0]).item()
        return torch.linspace(*ends, len(times) + 1).exp().numpy()

    def _tells_log_sigma(self) -> bool:
        return self.config.timestep_type == "continuous" and self.config.prediction_type == "v_prediction"

    def _around(self, sigma: Tensor, hat: Tensor) -> tuple[list[NoiseLevel], list[NoiseLevel]]:
        levels = noise_levels(sigma)
        # eps belongs to the churned level, v (which the reference does not move) to the one before.
        return levels, [level._replace(sigma=churned) for level, churned in zip(levels, hat, strict=True)]

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
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Take the step at ``timestep``; ``s_churn`` and the rest as in Karras et al.; see ``Scheduler.step``."""
        churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
        return self._take_step(model_output, timestep, sample, generator, return_dict, **churn)
