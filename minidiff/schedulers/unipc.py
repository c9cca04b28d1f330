"""UniPC: a unified predictor-corrector of any order for the diffusion ODE.

One transition from noise level s to t, with h = lambda_t - lambda_s, m_0 the prediction at s, m_k those before it,
r_k = (lambda_k - lambda_s) / h and, when predicting x0 (z = -h; for eps swap alpha with sigma and z = h):

    x_t = sigma_t / sigma_s x_s - alpha_t (e^z - 1) m_0 - alpha_t B(h) sum_k rho_k (m_k - m_0) / r_k

    B(h) = z (bh1) or e^z - 1 (bh2), and rho solves  sum_k r_k^{n-1} rho_k = n! phi_{n+1}(z) z / B(h)  for n = 1 ... p

The predictor (UniP) uses the predictions before t only. The corrector (UniC) repeats the transition one step later with
the prediction m_t at t among them (r = 1), which costs no evaluation and raises the order by one.

Zhao et al. 2023, https://arxiv.org/abs/2302.04867, Algorithms 5-8. Checked against
``diffusers.UniPCMultistepScheduler``.
Order 1 without corrector is DDIM.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.configured import register_to_config
from minidiff.errors import ConfigError
from minidiff.schedulers.base import Device, Grid, Past, Plan, Update
from minidiff.schedulers.log_snr import LogSnrScheduler, remembered
from minidiff.schedulers.prediction import Scalar, Thresholding, predict_eps, weighted_sum


class Transition(NamedTuple):
    """The numbers of one transition."""

    to_x: Scalar  # sigma_t / sigma_s
    to_m: Scalar  # alpha_t (e^z - 1)
    to_rest: Scalar  # alpha_t B(h)
    rho: tuple[Scalar, ...]  # of the differences; the corrector has one more, for m_t
    r: tuple[Scalar, ...]

    def __call__(self, x: Tensor, ms: Sequence[Tensor], m_t: Tensor | None = None) -> Tensor:
        """Take it from x (B, ...) with the predictions ``ms``, newest first, and in the corrector m_t."""
        differences = [(m - ms[0]) / r for r, m in zip(self.r, ms[1:], strict=False)]  # older ones are not used
        if m_t is not None:
            differences.append(m_t - ms[0])
        x = self.to_x * x - self.to_m * ms[0]
        return x - self.to_rest * weighted_sum(*zip(self.rho, differences, strict=True)) if differences else x


class UniPCStep(NamedTuple):
    """The numbers of one UniPC step."""

    alpha: Scalar  # x = alpha x0 + sigma eps
    sigma: Scalar
    corrector: Transition | None  # to the noise level of this step, once more
    predictor: Transition  # to the next


class UniPCMultistepScheduler(LogSnrScheduler):
    """Sample with the UniPC predictor-corrector: good pictures in 10 to 20 steps, one evaluation each.

    ``final_sigmas_type="sigma_min"`` with Karras, exponential or beta sigmas repeats the last noise level, as in the
    reference: the last evaluation moves nothing. ``thresholding`` has an effect only with ``predict_x0``.
    """

    renames: ClassVar[Mapping[str, Any]] = {
        "solver_type": (("midpoint", "heun", "logrho"), "bh2")
    }  # of DPM-Solver, DEIS

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
        predict_x0: bool = True,
        solver_type: str = "bh2",
        lower_order_final: bool = True,
        disable_corrector: Sequence[int] = (),
        solver_p: None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        final_sigmas_type: str = "zero",
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        shift_terminal: float | None = None,
    ) -> None:
        self.register_to_config(disable_corrector=list(disable_corrector))  # a list, as it comes from a file
        if not predict_x0:
            self._require("prediction_type", self.prediction_types[:3])
        self._require("solver_type", ("bh1", "bh2"))
        self._require("time_shift_type", ("exponential", "linear"))
        self._require("solver_p", (None,))  # another scheduler as predictor: its state could not be shared by threads
        if not isinstance(solver_order, int) or solver_order < 1:
            raise ConfigError(f"solver_order should be a positive integer, found {solver_order!r}")
        if shift_terminal is not None and not use_flow_sigmas:
            raise ConfigError("shift_terminal needs use_flow_sigmas=True")
        super().__init__()
        if use_flow_sigmas and (use_exponential_sigmas or use_beta_sigmas):
            raise ConfigError(
                "use_flow_sigmas goes with use_karras_sigmas or alone: the reference does not bring exponential and "
                "beta sigmas below 1, where a flow's noise levels lie, and returns NaN"
            )

    # ---- the noise levels of a run ------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Plan a run, over these ``sigmas`` or shifted by ``mu`` if given; see ``Scheduler.set_timesteps``."""
        self._begin(self.plan(num_inference_steps, device=device, sigmas=sigmas, mu=mu))

    def _grid(self, count: int, sigmas: Sequence[float] | None = None, mu: float | None = None) -> Grid:
        config = self.config
        if sigmas is not None and (not config.use_flow_sigmas or self._respace is not None):
            raise ValueError("sigmas= needs use_flow_sigmas=True, without Karras sigmas, which would replace them")
        if (mu is not None) != config.use_dynamic_shifting:
            raise ValueError(f"use_dynamic_shifting={config.use_dynamic_shifting}, mu={mu}: they go together")
        if not config.use_flow_sigmas:
            return super()._grid(count)
        if self._respace is None:
            return self._flow_grid(self._flow_sigmas(count, sigmas, mu))
        levels = self._respaced(count, self._training_sigmas())
        return self._flow_grid(levels / (levels + 1))

    def _flow_sigmas(self, count: int, sigmas: Sequence[float] | None, mu: float | None) -> np.ndarray:
        """Return the noise levels of flow matching, largest first, shifted towards the noisy end."""
        config = self.config
        if sigmas is None:
            levels = np.linspace(1, 1 / config.num_train_timesteps, count + 1)[:-1]
        else:
            levels = np.asarray(sigmas)
        if config.use_dynamic_shifting:
            shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
            levels = shift / (shift + (1 / levels - 1))
        else:
            levels = self._shifted(levels)
        if config.shift_terminal:
            scale = (1 - levels[-1]) / (1 - config.shift_terminal)
            levels = 1 - (1 - levels) / scale
        if abs(levels[0] - 1) < 1e-6:
            levels[0] -= 1e-6  # at 1 there is no signal and lambda is infinite
        return levels

    # ---- the numbers of its steps -------------------------------------------------------------------------------

    def _coefficients(self, plan: Plan) -> tuple[UniPCStep, ...]:
        alpha, sigma = self._alpha_sigma(plan.sigmas)
        transitions = _Transitions(alpha, sigma, self.config.predict_x0, self.config.solver_type)
        seen, orders = self._seen_sigma(plan, sigma), self._orders(plan, transitions.h.tolist())
        steps = []
        for k, order in enumerate(orders):
            corrects = k > plan.start and k - 1 not in self.config.disable_corrector
            corrector = transitions.corrector(k - 1, orders[k - 1]) if corrects else None
            steps.append(UniPCStep(alpha[k], seen[k], corrector, transitions.predictor(k, order)))
        return tuple(steps)

    def _orders(self, plan: Plan, h: Sequence[float]) -> list[int]:
        """Return the order of each transition: low while there is little to remember, and at the end.

        Two cases that are NaN in the reference take the order that is left: the transition to a noise level of 0, which
        is infinitely long, is of order 1 even without ``lower_order_final``; and predictions at the two ends of a
        transition of length 0 (a timestep visited twice) are not differenced.
        """
        orders = []
        for k in range(len(h)):
            order = min(self.config.solver_order, remembered(h, plan.start, k) + 1)
            if self.config.lower_order_final:
                order = min(order, len(h) - k)
            orders.append(1 if math.isinf(h[k]) or not h[k] else order)
        return orders

    # ---- the step -----------------------------------------------------------------------------------------------

    @property
    def _thresholding(self) -> Thresholding:
        return super()._thresholding if self.config.predict_x0 else Thresholding()

    def _update(self, plan: Plan, i: int, x: Tensor, out: Tensor, past: Past, noise: Tensor | None) -> Update:
        step = plan.coefficients[i]
        begin, *earlier = past or (None,)  # the corrected x of the step before, and the predictions, newest first
        if self.config.predict_x0:
            m = self.denoised(plan, i, x, out)
        else:
            m = predict_eps(self._predicts, x, out, step.alpha, step.sigma)
        ms = (m, *earlier)[: self.config.solver_order]
        if step.corrector is not None:
            x = step.corrector(begin, earlier, m)
        return Update(step.predictor(x, ms), (x, *ms))


class _Transitions:
    """Makes every transition between neighbouring noise levels, in float32 as in the reference."""

    def __init__(self, alpha: Tensor, sigma: Tensor, predict_x0: bool, solver_type: str) -> None:
        self.lam = alpha.log() - sigma.log()  # (N + 1,)
        self.h = self.lam.diff()  # (N,)
        if not predict_x0:
            alpha, sigma = sigma, alpha  # the same formula with the roles exchanged
        self.z = -self.h if predict_x0 else self.h
        growth = torch.expm1(self.z)
        self.b_h = self.z if solver_type == "bh1" else growth
        self.growth = growth / self.z  # phi_1(z)
        self.to_x = sigma[1:] / sigma[:-1]
        # The last transition of eps to sigma = 0 is 0 times infinity; its limit is sigma_s alpha_t / alpha_s.
        drift = alpha[1:] * growth
        self.to_m = torch.where(drift.isnan(), sigma[1:] * alpha[:-1] / sigma[:-1], drift)
        self.to_rest = alpha[1:] * self.b_h

    def predictor(self, k: int, order: int) -> Transition:
        """Return the UniP transition k."""
        ratios = self._ratios(k, order)
        if order < 3:
            rho = torch.full((order - 1,), 0.5)  # the paper's simplification for order 2
        else:
            matrix, b = self._system(k, ratios, order)
            rho = torch.linalg.solve(matrix[:-1, :-1], b[:-1])
        return self._transition(k, rho, ratios)

    def corrector(self, k: int, order: int) -> Transition:
        """Return the UniC transition k."""
        ratios = self._ratios(k, order)
        rho = torch.full((1,), 0.5) if order == 1 else torch.linalg.solve(*self._system(k, ratios, order))
        return self._transition(k, rho, ratios)

    def _transition(self, k: int, rho: Tensor, ratios: Sequence[Scalar]) -> Transition:
        # Without differences there is no rest; to a noise level of 0 its coefficient may be infinite.
        to_rest = self.to_rest[k] if len(rho) else torch.zeros(())
        return Transition(self.to_x[k], self.to_m[k], to_rest, rho.unbind(), tuple(ratios))

    def _ratios(self, k: int, order: int) -> list[Tensor]:
        """Return r_1 ... r_{p-1}, where the older predictions lie in units of this transition."""
        return [(self.lam[k - j] - self.lam[k]) / self.h[k] for j in range(1, order)]

    def _system(self, k: int, ratios: list[Tensor], order: int) -> tuple[Tensor, Tensor]:
        """Return the matrix (p, p) of r^{n-1} and the right-hand side (p,) of n! phi_{n+1}(z) z / B(h)."""
        r = torch.stack([*ratios, torch.ones(())])
        phi = self.growth[k] - 1  # z phi_2(z)
        factorial, b = 1, []
        for n in range(1, order + 1):
            b.append(phi * factorial / self.b_h[k])
            factorial *= n + 1
            phi = phi / self.z[k] - 1 / factorial
        return torch.stack([r**n for n in range(order)]), torch.stack(b)
