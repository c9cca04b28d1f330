"""DPM-Solver++ multistep around the network of EDM, as an ODE or with noise at every step (``sde-``).

The step is that of ``minidiff.schedulers.dpm_solver_multistep`` with alpha = 1, so lambda = -log(sigma), the network's
surroundings those of ``minidiff.schedulers.edm``. Checked against ``diffusers.EDMDPMSolverMultistepScheduler``.
Playground v2.5 is sampled with it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from minidiff.configured import register_to_config
from minidiff.schedulers.base import Grid, Past, Plan, Stochastic, Update
from minidiff.schedulers.dpm_solver import DpmSolver, Transitions
from minidiff.schedulers.dpm_solver_multistep import MultistepOrders, backward_differences
from minidiff.schedulers.edm import EdmScheduler, Preconditioning
from minidiff.schedulers.prediction import Scalar, weighted_sum


class EDMDPMSolverStep(NamedTuple):
    """The numbers of one step."""

    level: Preconditioning
    to_x: Scalar  # sigma' / sigma, less with noise
    d: tuple[Scalar, ...]  # the weights of the differences
    ratios: tuple[Scalar, ...]  # what these are made with
    std: Scalar


class EDMDPMSolverMultistepScheduler(Stochastic, MultistepOrders, EdmScheduler):
    """Sample a network of EDM with DPM-Solver++ of order 1 to 3."""

    renames: ClassVar[Mapping[str, Any]] = DpmSolver.renames

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
        solver_order: int = 2,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        final_sigmas_type: str = "zero",
    ) -> None:
        super().__init__()
        self._require("algorithm_type", ("dpmsolver++", "sde-dpmsolver++"))
        self._require("solver_type", ("midpoint", "heun"))
        self._require("solver_order", (1, 2, 3) if algorithm_type != "sde-dpmsolver++" else (1, 2))  # no third there

    def _grid(self, count: int) -> Grid:
        last = 0.0 if self.config.final_sigmas_type == "zero" else self.config.sigma_min
        return self._ended(self._levels(self._ramp(count)), last)

    def _training_grid(self) -> Grid:
        return self._ended(self._levels(self._ramp(len(self))), 0.0)  # whatever runs end at, as in the reference

    def _coefficients(self, plan: Plan) -> tuple[EDMDPMSolverStep, ...]:
        transitions = Transitions(torch.ones_like(plan.sigmas), plan.sigmas, self.config.algorithm_type)
        levels, orders = self._at_each(plan.sigmas[:-1]), self._orders(plan, transitions.lam.diff().tolist())
        terms = [self._terms(transitions, k, order) for k, order in enumerate(orders)]
        return tuple(EDMDPMSolverStep(level, *numbers) for level, numbers in zip(levels, terms, strict=True))

    def denoised(self, plan: Plan, i: int, x: Tensor, out: Tensor) -> Tensor:
        return self._x0(plan.coefficients[i].level, x, out)  # in half precision too, as the reference does

    def wants_noise(self, plan: Plan, i: int) -> bool:
        return self.config.algorithm_type == "sde-dpmsolver++"

    def _update(self, plan: Plan, i: int, x: Tensor, out: Tensor, past: Past, noise: Tensor | None) -> Update:
        step = plan.coefficients[i]
        ms = (self.denoised(plan, i, x, out), *past)[: self.config.solver_order]
        terms = [(step.to_x, x), *zip(step.d, backward_differences(ms, step.ratios), strict=True)]
        if self.wants_noise(plan, i):
            terms.append((step.std, noise))
        return Update(weighted_sum(*terms), ms)
