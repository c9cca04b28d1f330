"""LMS: the linear multistep (Adams-Bashforth) method in sigma, for levels that are not evenly spaced.

    y'  = y + sum_k c_k d_k
    c_k = integral from sigma to sigma' of prod_{j != k} (s - sigma_j) / (sigma_k - sigma_j) ds

where d_k = (y - x0) / sigma_k is the slope k steps ago: a polynomial through the slopes is integrated, exactly, by
Gauss-Legendre quadrature (the reference uses scipy's adaptive one, in float32). Order 1 is Euler's method.

From k-diffusion (https://github.com/crowsonkb/k-diffusion). Checked against ``diffusers.LMSDiscreteScheduler``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.schedulers.base import Grid, Plan, SchedulerOutput, Update
from minidiff.schedulers.configured import records_config
from minidiff.schedulers.prediction import linear
from minidiff.schedulers.sigma_space import Level, SigmaSpaceScheduler, levels, wide


class Step(NamedTuple):
    """The numbers of one LMS step."""

    level: Level
    weights: tuple[float, ...]  # of the slopes, newest first


def lms_weights(sigmas: np.ndarray, i: int, order: int) -> tuple[float, ...]:
    """Return c_0 ... c_{order - 1} of the step from sigmas[i] to sigmas[i + 1]."""
    nodes, parts = np.polynomial.legendre.leggauss((order + 1) // 2)  # exact to degree order - 1 and beyond
    half = (sigmas[i + 1] - sigmas[i]) / 2
    s = sigmas[i] + half * (nodes + 1)
    known = sigmas[i - order + 1 : i + 1][::-1]  # newest first
    weights = []
    for k in range(order):
        others = np.delete(known, k)
        weights.append(half * (parts * np.prod((s[:, None] - others) / (known[k] - others), axis=1)).sum())
    return tuple(float(weight) for weight in weights)


class LMSDiscreteScheduler(SigmaSpaceScheduler):
    """Sample with the linear multistep method of order 1 to 4.

    In a run that begins in the middle the first steps use the weights of the full order with the slopes there are, as
    in the reference.
    """

    run_options: ClassVar[Mapping[str, Any]] = {"order": 4}

    @records_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
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

    def _bounds(self) -> tuple[float | None, float | None]:
        # The reference's Karras levels of LMS, unlike its others, do not look at the config.
        return (None, None) if self.config.use_karras_sigmas else super()._bounds()

    def _grid(self, count: int) -> Grid:
        times, sigmas = self._spaced(count)
        closed = np.append(sigmas, 0.0).astype(np.float32)
        return Grid(torch.from_numpy(times.astype(np.float32)), torch.from_numpy(closed))

    def _steps(self, plan: Plan) -> tuple[Step, ...]:
        order = plan.options["order"]
        if not isinstance(order, int) or order < 1:
            raise ValueError(f"order should be a positive integer, found {order!r}")
        sigmas = plan.sigmas.double().numpy()
        weights = (lms_weights(sigmas, i, min(i + 1, order)) for i in range(len(plan.times)))
        return tuple(map(Step, levels(plan.sigmas[:-1]), weights))

    def _update(
        self, plan: Plan, i: int, x: Tensor, out: Tensor, past: tuple[Any, ...], noise: Tensor | None
    ) -> Update:
        step, y = plan.steps[i], wide(x)
        x0 = self._x0(step.level, y, out)
        slopes = ((y - x0) / step.level.sigma, *past)[: plan.options["order"]]
        y = linear((1.0, y), *zip(step.weights, slopes, strict=False))
        return Update(y.to(out.dtype), slopes, x0)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        order: int = 4,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Take the step at ``timestep`` with at most ``order`` slopes; see ``Scheduler.step``."""
        return self._take_step(model_output, timestep, sample, None, return_dict, order=order)
