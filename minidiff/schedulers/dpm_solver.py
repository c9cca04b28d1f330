"""DPM-Solver and DPM-Solver++: what the multistep and the singlestep variant share.

From noise level s to t, with h = lambda_t - lambda_s and estimates D_n of the n-th derivative in lambda (in units of h)
of what the network predicts, x0 (the ++ variants) or eps:

    x_t = a x_s + d_0 D_0 + d_1 D_1 + d_2 D_2 + std noise

                    a                        d_0                      std
    dpmsolver++     sigma_t / sigma_s        -alpha_t (e^-h - 1)      0
    dpmsolver       alpha_t / alpha_s        -sigma_t (e^h - 1)       0
    sde-dpmsolver++ sigma_t / sigma_s e^-h   alpha_t (1 - e^-2h)      sigma_t sqrt(1 - e^-2h)
    sde-dpmsolver   alpha_t / alpha_s        -2 sigma_t (e^h - 1)     sigma_t sqrt(e^2h - 1)

and d_1, d_2 the further integrals of the exponential (``heun``), or d_1 = d_0 / 2 (``midpoint``).

Lu et al. 2022, https://arxiv.org/abs/2206.00927 (DPM-Solver) and https://arxiv.org/abs/2211.01095 (DPM-Solver++).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import ConfigError
from minidiff.schedulers import noise_schedule
from minidiff.schedulers.base import Device, Grid, Plan
from minidiff.schedulers.ddpm import VARIANCES
from minidiff.schedulers.log_snr import LogSnrScheduler
from minidiff.schedulers.prediction import Scalar, predict_eps, predict_x0


class TransitionWeights(NamedTuple):
    """The coefficients of one transition."""

    to_x: Scalar  # a
    d0: Scalar
    d1: Scalar
    d2: Scalar
    half: Scalar  # d_1 of the midpoint method
    std: Scalar


class DPMSolverStep(NamedTuple):
    """The numbers of one step of DPM-Solver."""

    alpha: Scalar  # x = alpha x0 + sigma eps
    sigma: Scalar
    order: int
    to_x: Scalar  # a
    d: tuple[Scalar, ...]  # d_0, d_1 ..., as many as there are differences
    ratios: tuple[Scalar, ...]  # what the differences are made with
    std: Scalar


class Transitions:
    """The noise levels of a run and the coefficients of the transitions between them, float32 as in the reference."""

    def __init__(self, alpha: Tensor, sigma: Tensor, algorithm: str) -> None:
        self.alpha, self.sigma, self.algorithm = alpha, sigma, algorithm
        self.lam = alpha.log() - sigma.log()  # (N + 1,)

    def weights(self, s: int, t: int) -> TransitionWeights:
        """Return the coefficients of the transition from level s to level t.

        A flow may end below ``sigma_min``, so that its last transition goes up; no noise then, NaN in the reference.
        """
        alpha, sigma, h = self.alpha[t], self.sigma[t], self.lam[t] - self.lam[s]
        shrink, growth = torch.exp(-h) - 1.0, torch.exp(h) - 1.0
        if self.algorithm == "dpmsolver++":
            to_x, d0, std = sigma / self.sigma[s], -(alpha * shrink), torch.zeros(())
            d1, d2 = alpha * (shrink / h + 1.0), -(alpha * ((shrink + h) / h**2 - 0.5))
        elif self.algorithm == "sde-dpmsolver++":
            lost = 1.0 - torch.exp(-2.0 * h)
            to_x, d0, std = sigma / self.sigma[s] * torch.exp(-h), alpha * lost, sigma * torch.sqrt(lost.clamp(min=0))
            d1, d2 = alpha * (lost / (-2.0 * h) + 1.0), alpha * ((lost - 2.0 * h) / (2.0 * h) ** 2 - 0.5)
        else:  # dpmsolver, and sde-dpmsolver, which moves twice as far and adds noise
            times = 1.0 if self.algorithm == "dpmsolver" else 2.0
            std = torch.zeros(()) if times == 1.0 else sigma * torch.sqrt((torch.exp(2 * h) - 1.0).clamp(min=0))
            to_x, d0 = alpha / self.alpha[s], -times * (sigma * growth)
            d1, d2 = -times * (sigma * (growth / h - 1.0)), -(sigma * ((growth - h) / h**2 - 0.5))
        return TransitionWeights(to_x, d0, d1, d2, 0.5 * d0, std)

    def ratio(self, a: int, b: int, s: int, t: int) -> Tensor:
        """Return (lambda_a - lambda_b) in units of h = lambda_t - lambda_s."""
        return (self.lam[a] - self.lam[b]) / (self.lam[t] - self.lam[s])


class DpmSolver(LogSnrScheduler):
    """Base of the two variants: the noise levels of a run and what the network predicts."""

    renames: ClassVar[Mapping[str, Any]] = {  # what the files of DEIS and UniPC say
        "algorithm_type": (("deis",), "dpmsolver++"),
        "solver_type": (("logrho", "bh1", "bh2"), "midpoint"),
    }
    algorithms: tuple[str, ...] = ()

    def __init__(self) -> None:
        config = self.config
        self._require("algorithm_type", self.algorithms)
        self._require("solver_type", ("midpoint", "heun"))
        self._require("solver_order", (1, 2, 3))
        self._require("variance_type", (None, *VARIANCES))  # DDPM's files name fixed ones, which mean nothing here
        self._require("use_dynamic_shifting", (False,))  # the reference fails when it is used
        if not self._predicts_x0:
            self._require("prediction_type", self.prediction_types[:3])
            if config.final_sigmas_type == "zero":
                raise ConfigError(
                    f"algorithm_type={config.algorithm_type!r} cannot reach final_sigmas_type='zero', where e^h is "
                    "infinite: use final_sigmas_type='sigma_min' or algorithm_type='dpmsolver++'"
                )
        super().__init__()
        spaced_by = [name for name in ("use_lu_lambdas", "use_flow_sigmas") if config.get(name)]
        if len(spaced_by) + (self._respace is not None) > 1:
            raise ConfigError(f"{' and '.join(spaced_by)} cannot be combined with each other or another sigma spacing")

    @property
    def _predicts_x0(self) -> bool:
        return self.config.algorithm_type.endswith("++")

    # ---- the noise levels of a run ------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Plan a run, over these ``timesteps`` if given (``mu`` is refused); see ``Scheduler.set_timesteps``."""
        self._begin(self.plan(num_inference_steps, device=device, mu=mu, timesteps=timesteps))

    def _grid(self, count: int, timesteps: Sequence[int] | None = None) -> Grid:
        lu, flow = self.config.get("use_lu_lambdas"), self.config.use_flow_sigmas
        if timesteps is not None and (lu or flow or self._respace is not None):
            raise ValueError("timesteps= cannot be combined with Karras, exponential, beta, Lu or flow sigmas")
        if timesteps is not None:
            return self._time_grid(noise_schedule.custom_timesteps(timesteps, len(self)))
        return self._level_grid(self._lu(count, np.log(self._training_sigmas()))) if lu else super()._grid(count)

    def _least(self, levels: np.ndarray) -> float:
        return self._training_sigmas()[0]

    def _spaced_timesteps(self, count: int, **how: Any) -> Tensor:
        """Return ``count`` timesteps from the noisiest that ``lambda_min_clipped`` leaves (cosine schedules)."""
        alpha_bar = self.alphas_cumprod
        lam = torch.sqrt(alpha_bar).log() - torch.sqrt(1 - alpha_bar).log()
        clipped = torch.searchsorted(lam.flip(0), self.config.lambda_min_clipped).item()
        return super()._spaced_timesteps(count, last=len(self) - clipped, **how)

    @staticmethod
    def _lu(count: int, log_sigmas: np.ndarray) -> np.ndarray:
        """Return noise levels evenly spaced in lambda: Lu et al. 2022 (++), section 5.2, with rho = 1."""
        low, high = log_sigmas[0].item(), log_sigmas[-1].item()
        return np.exp(high + np.linspace(0, 1, count) * (low - high))

    # ---- the numbers of its steps -------------------------------------------------------------------------------

    def _coefficients(self, plan: Plan) -> tuple[DPMSolverStep, ...]:
        alpha, sigma = self._alpha_sigma(plan.sigmas)
        transitions, seen = Transitions(alpha, sigma, self.config.algorithm_type), self._seen_sigma(plan, sigma)
        orders = enumerate(self._orders(plan, transitions.lam.diff().tolist()))
        return tuple(DPMSolverStep(alpha[k], seen[k], n, *self._terms(transitions, k, n)) for k, n in orders)

    def _orders(self, plan: Plan, h: Sequence[float]) -> Sequence[int]:
        """Return the order of each step; ``h`` are the distances in lambda."""
        raise NotImplementedError

    def _terms(self, transitions: Transitions, k: int, order: int) -> tuple[Any, ...]:
        """Return the coefficients of x and of the differences, what these are made with, and that of the noise."""
        raise NotImplementedError

    # ---- what the network predicts ------------------------------------------------------------------------------

    def denoised(self, plan: Plan, i: int, x: Tensor, out: Tensor) -> Tensor:
        return super().denoised(plan, i, x, self._without_variance(out, x))

    def _prediction(self, plan: Plan, i: int, x: Tensor, out: Tensor) -> Tensor:
        """Return x0, or eps for the algorithms that integrate it."""
        if self._predicts_x0:
            return self.denoised(plan, i, x, out)
        alpha, sigma = plan.coefficients[i].alpha, plan.coefficients[i].sigma
        eps = predict_eps(self._predicts, x, self._without_variance(out, x), alpha, sigma)
        if self._thresholding.ratio is None:
            return eps
        x0 = self._thresholding(predict_x0("epsilon", x, eps, alpha, sigma))
        return predict_eps("sample", x, x0, alpha, sigma)  # the eps of the x0 that dynamic thresholding leaves

    def _without_variance(self, out: Tensor, x: Tensor) -> Tensor:
        """Return the prediction of a network that predicts its variance in a second half of the channels too."""
        learned = self.config.variance_type in ("learned", "learned_range")
        return out[:, : x.shape[1]] if learned else out

    def wants_noise(self, plan: Plan, i: int) -> bool:
        return self.config.algorithm_type.startswith("sde")
