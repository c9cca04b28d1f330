"""LMS: the linear multistep (Adams-Bashforth) method in sigma, for levels that are not evenly spaced.

    y'  = y + sum_k c_k d_k
    c_k = integral from sigma to sigma' of prod_{j != k} (s - sigma_j) / (sigma_k - sigma_j) ds

where d_k = (y - x0) / sigma_k is the slope k steps ago: a polynomial through the slopes is integrated. Order 1 is
Euler's method. Two nodes of Gauss and Legendre would do for an exact integral. The 21 below are what the reference's
``scipy.integrate.quad`` tries first; like there the polynomial is evaluated in float32, which costs c_k 1e-8.

From k-diffusion (https://github.com/crowsonkb/k-diffusion). Checked against ``diffusers.LMSDiscreteScheduler``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from minidiff.configured import register_to_config
from minidiff.schedulers.base import Grid, Past, Plan, SchedulerOutput, Update
from minidiff.schedulers.prediction import weighted_sum
from minidiff.schedulers.sigma_space import NoiseLevel, SigmaSpaceScheduler, noise_levels


class LMSStep(NamedTuple):
    """The numbers of one LMS step."""

    level: NoiseLevel
    weights: tuple[float, ...]  # of the slopes, newest first; float64


# Nodes in [0, 1] and weights of the 21-point Gauss-Kronrod rule (Piessens et al. 1983, QUADPACK, routine QK21).
KRONROD = np.array(
    [
        (0.000000000000000000, 0.149445554002916905),
        (0.148874338981631211, 0.147739104901338491),
        (0.294392862701460198, 0.142775938577060080),
        (0.433395394129247191, 0.134709217311473325),
        (0.562757134668604683, 0.123491976262065851),
        (0.679409568299024406, 0.109387158802297641),
        (0.780817726586416897, 0.093125454583697605),
        (0.865063366688984511, 0.075039674810919952),
        (0.930157491355708226, 0.054755896574351996),
        (0.973906528517171720, 0.032558162307964727),
        (0.995657163025808081, 0.011694638867371874),
    ]
)


def lms_weights(sigmas: np.ndarray, i: int, order: int) -> np.ndarray:
    """Return c_0 ... c_{order - 1} of the step from sigmas[i] to sigmas[i + 1], float64. sigmas: float32 (N + 1,)."""
    nodes, parts = np.concatenate([KRONROD, KRONROD[1:] * (-1, 1)]).T
    begin, end = sigmas[i : i + 2].astype(np.float64)
    s = ((begin + end) / 2 + (end - begin) / 2 * nodes).astype(np.float32)
    known = sigmas[i - order + 1 : i + 1][::-1]  # newest first
    weights = []
    for k in range(order):
        polynomial = np.ones_like(s)
        for other in np.delete(known, k):
            polynomial *= (s - other) / (known[k] - other)
        weights.append((end - begin) / 2 * (parts * polynomial).sum())
    return np.array(weights)


class LMSDiscreteScheduler(SigmaSpaceScheduler):
    """Sample with the linear multistep method of order 1 to 4.

    In a run that begins in the middle the first steps use the weights of the full order with the slopes there are, as
    in the reference.
    """

    run_options: ClassVar[Mapping[str, Any]] = {"order": 4}

    @register_to_config
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
        return self._closed(*self._spaced(count))

    def _coefficients(self, plan: Plan) -> tuple[LMSStep, ...]:
        order = plan.options["order"]
        if not isinstance(order, int) or order < 1:
            raise ValueError(f"order should be a positive integer, found {order!r}")
        sigmas = plan.sigmas.numpy()
        weights = (tuple(lms_weights(sigmas, i, min(i + 1, order)).tolist()) for i in range(len(plan.times)))
        return tuple(map(LMSStep, noise_levels(plan.sigmas[:-1]), weights))

    def _update(self, plan: Plan, i: int, x: Tensor, out: Tensor, past: Past, noise: Tensor | None) -> Update:
        step = plan.coefficients[i]
        x0 = self._x0(step.level, x, out)
        slopes = ((x - x0) / step.level.sigma, *past)[: plan.options["order"]]
        return Update(x + weighted_sum(*zip(step.weights, slopes, strict=False)), slopes, x0)

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, order: int = 4, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Take the step at ``timestep`` with at most ``order`` slopes; see ``Scheduler.step``."""
        return self._take_step(model_output, timestep, sample, None, return_dict, order=order)
