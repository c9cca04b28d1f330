"""DPM-Solver++ singlestep: steps come in groups, and each step of a group starts from where the group began.

In a group of three, levels u < v < t lie after the start s. With m_2 the prediction at s, m_1 at u and m_0 at v, and
r_1 = (lambda_u - lambda_s) / h, r_0 = (lambda_v - lambda_s) / h, where h = lambda_t - lambda_s:

    first    x_u from x_s and m_2                                       order 1
    second   x_v from x_s with D_0 = m_2, D_1 = (m_1 - m_2) / r_1       order 2
    third    x_t from x_s with D_0 = m_2, D_10 = (m_1 - m_2) / r_1, D_11 = (m_0 - m_2) / r_0
             midpoint: D_1 = D_11
             heun:     D_1 = (r_0 D_10 - r_1 D_11) / (r_0 - r_1),  D_2 = 2 (D_11 - D_10) / (r_0 - r_1)

and ``dpm_solver`` puts them together. Every step is one evaluation, so a group of three costs three of the steps asked
for. Lu et al. 2022, https://arxiv.org/abs/2206.00927, Algorithms 1 and 2. Checked against
``diffusers.DPMSolverSinglestepScheduler``. Order 1 without noise is DDIM.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from minidiff.configured import register_to_config
from minidiff.schedulers.base import Past, Plan, Stochastic, Update
from minidiff.schedulers.dpm_solver import DpmSolver, Transitions
from minidiff.schedulers.log_snr import remembered
from minidiff.schedulers.prediction import Scalar, weighted_sum


def group_differences(ms: Sequence[Tensor], ratios: Sequence[Scalar]) -> tuple[Tensor, ...]:
    """Return D_0, D_1, D_2 of a group's predictions, newest first: one and as many more as ``ratios`` are made for."""
    first = ms[-1]
    if not ratios:
        return (first,)
    d11 = ratios[0] * (ms[0] - first)
    if len(ratios) == 1:
        return first, d11
    _, per_r1, r0, r1, between = ratios
    d10 = per_r1 * (ms[1] - first)
    return first, (r0 * d10 - r1 * d11) / between, 2.0 * (d11 - d10) / between


class DPMSolverSinglestepScheduler(Stochastic, DpmSolver):
    """Sample with DPM-Solver(++) in groups of one to three steps.

    Counts that the order does not divide, and runs to a noise level of 0, end in groups of lower order even without
    ``lower_order_final``, as in the reference.
    """

    algorithms = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++")

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -math.inf,
        variance_type: str | None = None,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ) -> None:
        super().__init__()

    def _orders(self, plan: Plan, h: Sequence[float]) -> Sequence[int]:
        # A run that begins within a group has less to go by; so have predictions at equal levels.
        return [min(place, remembered(h, plan.start, k) + 1) for k, place in enumerate(self._places(len(h)))]

    def _places(self, count: int) -> list[int]:
        """Return the order of each of ``count`` steps: its place in its group."""
        order, left = self.config.solver_order, count % self.config.solver_order
        zero = self.config.final_sigmas_type == "zero"
        full = list(range(1, order + 1))
        if order == 1 or not (self.config.lower_order_final or left or zero):
            places = full * (count // order)
        elif left:
            places = full * (count // order) + full[:left]
        else:  # the last whole group is taken apart
            places = full * (count // order - 1) + ([1, 2, 1] if order == 3 else [1, 1])
        return [*places[:-1], 1] if zero else places

    def _terms(self, transitions: Transitions, k: int, order: int) -> tuple[Any, ...]:
        s, t, midpoint = k - order + 1, k + 1, self.config.solver_type == "midpoint"
        w = transitions.weights(s, t)
        if order == 1:
            return w.to_x, (w.d0,), (), w.std
        r0 = transitions.ratio(k, s, s, t)
        per_r0 = 1.0 / r0
        if order == 2:
            return w.to_x, (w.d0, w.half if midpoint else w.d1), (per_r0,), w.std
        if midpoint:
            return w.to_x, (w.d0, w.d1), (per_r0,), w.std
        r1 = transitions.ratio(k - 1, s, s, t)
        ratios = (per_r0, 1.0 / r1, r0, r1, r0 - r1)
        return w.to_x, (w.d0, w.d1, w.d2), ratios, w.std

    def _update(self, plan: Plan, i: int, x: Tensor, out: Tensor, past: Past, noise: Tensor | None) -> Update:
        step = plan.coefficients[i]
        begin, *earlier = past or (None,)  # where the group began, and the predictions, newest first
        ms = (self._prediction(plan, i, x, out), *earlier)[: self.config.solver_order]
        begin = x if step.order == 1 else begin
        terms = [(step.to_x, begin), *zip(step.d, group_differences(ms[: step.order], step.ratios), strict=True)]
        if self.wants_noise(plan, i):
            terms.append((step.std, noise))
        return Update(weighted_sum(*terms), (begin, *ms))
