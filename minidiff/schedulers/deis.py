"""DEIS: an exponential integrator that extrapolates eps by polynomials in log rho, rho = sigma_t / alpha_t.

    x_t = alpha_t (x_s / alpha_s + sum_k c_k eps_k),    c_k = integral from rho_s to rho_t of l_k(log rho) d rho

where l_k is the Lagrange polynomial through the last noise levels (in log rho), 1 at the k-th of them, eps_k the noise
predicted there. Zhang & Chen 2023, https://arxiv.org/abs/2204.13902, the log-rho multistep variant. Checked against
``diffusers.DEISMultistepScheduler``. Order 1 is DDIM.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.configured import register_to_config
from minidiff.errors import ConfigError
from minidiff.schedulers.base import Device, Past, Plan, Update
from minidiff.schedulers.log_snr import LogSnrScheduler, remembered
from minidiff.schedulers.prediction import Scalar, predict_eps, weighted_sum


class DEISStep(NamedTuple):
    """The numbers of one DEIS step."""

    alpha: Scalar  # x = alpha x0 + sigma eps
    sigma: Scalar  # for a flow's prediction the noise level itself, as in the reference
    to_x: Scalar  # alpha_t / alpha_s
    following: Scalar  # alpha_t
    c: tuple[Scalar, ...]  # of the predictions, newest first; of order 1 it is alpha_t c


def antiderivative(t: np.float32, nodes: Sequence[np.float32]) -> np.float32:
    """Return the antiderivative at rho = t of l_0, the Lagrange polynomial in log rho that is 1 at the first node."""
    log = np.log(t)
    if len(nodes) == 2:
        b, c = map(np.log, nodes)
        return t * (-c + log - 1) / (b - c)
    b, c, d = map(np.log, nodes)
    # log**2 is a power in NumPy, other in the last bit for one number in 1,500; the sum cancels, and makes 1e-6 of it.
    return t * (c * (d - log + 1) - d * log + d + log * log - 2 * log + 2) / ((b - c) * (b - d))


class DEISMultistepScheduler(LogSnrScheduler):
    """Sample with DEIS of order 1 to 3. The last noise level is that of timestep 0, never 0.

    Karras, exponential, beta and flow sigmas repeat their last level, as in the reference: the last evaluation moves
    nothing.
    """

    renames: ClassVar[Mapping[str, Any]] = {  # what the files of DPM-Solver and UniPC say
        "algorithm_type": (("dpmsolver", "dpmsolver++"), "deis"),
        "solver_type": (("midpoint", "heun", "bh1", "bh2"), "logrho"),
    }

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
        algorithm_type: str = "deis",
        solver_type: str = "logrho",
        lower_order_final: bool = True,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ) -> None:
        self._require("algorithm_type", ("deis",))
        self._require("solver_type", ("logrho",))
        self._require("solver_order", (1, 2, 3))
        self._require("use_dynamic_shifting", (False,))  # the reference fails when it is used
        super().__init__()
        if use_flow_sigmas and self._respace is not None:
            raise ConfigError("use_flow_sigmas cannot be combined with another sigma spacing")

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, mu: float | None = None
    ) -> None:
        """Plan a run (``mu`` is refused: there is no dynamic shifting); see ``Scheduler.set_timesteps``."""
        self._begin(self.plan(num_inference_steps, device=device, mu=mu))

    def _coefficients(self, plan: Plan) -> tuple[DEISStep, ...]:
        alpha, sigma = self._alpha_sigma(plan.sigmas)
        h = (alpha.log() - sigma.log()).diff()
        to_x, first = alpha[1:] / alpha[:-1], -(sigma[1:] * (torch.exp(h) - 1.0))
        seen, rho, h = self._seen_sigma(plan, sigma), (sigma / alpha).numpy(), h.tolist()
        steps = []
        for k in range(len(plan.times)):
            order = self._order(plan, h, k)
            c = self._weights(rho, k, order) if order > 1 else (first[k],)
            steps.append(DEISStep(alpha[k], seen[k], to_x[k], alpha[k + 1], c))
        return tuple(steps)

    def _order(self, plan: Plan, h: Sequence[float], k: int) -> int:
        """Return the order of step k: low while there is little to remember, and at the end of short runs."""
        short = self.config.lower_order_final and len(h) < 15
        left = len(h) - k if short else 3  # 1 in the last step, 2 in the one before
        return min(self.config.solver_order, left, remembered(h, plan.start, k) + 1)

    @staticmethod
    def _weights(rho: np.ndarray, k: int, order: int) -> tuple[Scalar, ...]:
        """Return c_0 ... of the step from rho[k] to rho[k + 1], newest first, float32 as in the reference."""
        nodes = rho[k - order + 1 : k + 1][::-1]
        weights = []
        for j in range(order):
            around = [*nodes[j:], *nodes[:j]]  # the node of this weight first
            weights.append(antiderivative(rho[k + 1], around) - antiderivative(rho[k], around))
        return torch.from_numpy(np.array(weights)).unbind()

    def _update(self, plan: Plan, i: int, x: Tensor, out: Tensor, past: Past, noise: Tensor | None) -> Update:
        step = plan.coefficients[i]
        eps = predict_eps("sample", x, self.denoised(plan, i, x, out), step.alpha, step.sigma)
        predictions = (eps, *past)[: self.config.solver_order]
        if len(step.c) == 1:
            return Update(weighted_sum((step.to_x, x), (step.c[0], eps)), predictions)
        y = weighted_sum((1.0, x / step.alpha), *zip(step.c, predictions, strict=False))
        return Update(step.following * y, predictions)
