"""PNDM: pseudo numerical methods; a linear multistep solver (PLMS), with or without a Runge-Kutta start.

The transfer from x_t to x_s with a noise estimate e (Liu et al. 2022, https://arxiv.org/abs/2202.09778, eq. 9), a for
alpha_bar:

    x_s = sqrt(a_s / a_t) x_t - (a_s - a_t) e / (a_t sqrt(1 - a_s) + sqrt(a_t (1 - a_t) a_s))

is DDIM (eta = 0) written as a difference. What e is, depends on the step:

    PLMS (eq. 12)      (55 e_0 - 59 e_1 + 37 e_2 - 9 e_3) / 24, e_k the output k steps ago; fewer terms at first
    Runge-Kutta (13)   (e_a + 2 e_b + 2 e_c + e_d) / 6 of four evaluations at t, t - d/2, t - d/2 and t - d

Without the Runge-Kutta start (``skip_prk_steps``, what Stable Diffusion uses) the second timestep is visited twice: the
first step is repeated with the mean of both its ends. Checked against ``diffusers.PNDMScheduler``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.configured import register_to_config
from minidiff.schedulers.base import Grid, Past, Plan, Scheduler, Update
from minidiff.schedulers.prediction import Scalar, predict_eps, weighted_sum

ADAMS_BASHFORTH = tuple(  # of two, three and four outputs, newest first; their sum is divided by 2, 12 and 24
    torch.tensor(numerators).unbind() for numerators in ((3.0, -1.0), (23.0, -16.0, 5.0), (55.0, -59.0, 37.0, -9.0))
)
A_24TH = torch.tensor(1 / 24, dtype=torch.float64)
RUNGE_KUTTA = torch.tensor((1 / 6, 1 / 3, 1 / 3, 1 / 6), dtype=torch.float64).unbind()


Move = tuple[int | None, bool, int, int]  # a step's stage, whether it repeats, the timesteps it goes from and to


class PNDMStep(NamedTuple):
    """The numbers of one PNDM step: a transfer from t to s, by a stage of Runge-Kutta or by PLMS."""

    stage: int | None  # 0-3 of a Runge-Kutta step, None in PLMS
    repeats: bool  # PLMS: take the step before once more, from where it began, with the mean of both its ends
    from_alpha: Scalar  # sqrt(a_t), where t is where the transfer begins
    from_sigma: Scalar  # sqrt(1 - a_t)
    to_x: Scalar  # sqrt(a_s / a_t)
    gap: Scalar  # a_s - a_t
    divisor: Scalar  # a_t sqrt(1 - a_s) + sqrt(a_t (1 - a_t) a_s)
    alpha: Scalar  # sqrt(a) and sqrt(1 - a) at the timestep that the network is told, which differs from t
    sigma: Scalar  # in the later stages of Runge-Kutta


class PNDMPast(NamedTuple):
    """What PNDM remembers."""

    outs: tuple[Tensor, ...] = ()  # network outputs, oldest first, at most 4
    x: Tensor | None = None  # where a step that takes several evaluations began
    total: Tensor | None = None  # the sum of its outputs so far, weighted


def adams_bashforth(outs: Sequence[Tensor]) -> Tensor:
    """Return the combination of the last outputs, oldest first, that extrapolates them over the next step."""
    if len(outs) == 1:
        return outs[0]
    total = weighted_sum(*zip(ADAMS_BASHFORTH[len(outs) - 2], reversed(outs), strict=True))
    return total * A_24TH if len(outs) == 4 else total / (2 if len(outs) == 2 else 12)  # the reference's last bits


class PNDMScheduler(Scheduler):
    """Sample with a fourth-order linear multistep method.

    With ``prediction_type="v_prediction"`` the reference combines the raw outputs of several steps and converts the
    combination to a noise estimate only then, which is not the multistep method of the paper. minidiff does the same,
    because a picture must not change with the import line; UniPC and DDIM convert first.
    """

    any_time = True
    prediction_types = ("epsilon", "v_prediction")

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        skip_prk_steps: bool = False,
        set_alpha_to_one: bool = False,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
    ) -> None:
        super().__init__()

    def _grid(self, count: int) -> Grid:
        times = self._spaced_timesteps(count).numpy()[::-1]  # smallest first
        if self.config.skip_prk_steps:
            visits = np.concatenate([times[:-1], times[-2:-1], times[-1:]])[::-1]
        else:
            visits = np.concatenate([self._runge_kutta_times(times, count), times[:-3][::-1]])
        return self._grid_of(torch.from_numpy(visits.copy()), self.final_alpha_cumprod)

    def _runge_kutta_times(self, times: np.ndarray, count: int) -> np.ndarray:
        """Return the twelve timesteps of three Runge-Kutta steps over the four largest ``times``: t, t-d/2, t-d/2, t-d.

        The halves lie ``T // count // 2`` above a timestep, where T is the number of training timesteps.
        """
        if count < 4:
            raise ValueError(
                f"the Runge-Kutta start of PNDM needs at least 4 inference steps, found {count}: use more, or "
                "skip_prk_steps=True"
            )
        half = self.config.num_train_timesteps // count // 2
        last, *rest = times[-4:][::-1]
        stages = []
        for lower in rest:
            stages += [last, lower + half, lower + half, lower]
            last = lower
        return np.array(stages)

    def _coefficients(self, plan: Plan) -> tuple[PNDMStep, ...]:
        moves = [(None, False, t, t) for t in plan.times[: plan.start]]  # never taken
        moves += [self._move(plan, k, int(t)) for k, t in enumerate(plan.times[plan.start :])]
        return self._numbers(moves, plan.times)

    def _at(self, plan: Plan, i: int, timestep: int) -> Plan:
        step = self._numbers([self._move(plan, i - plan.start, timestep)], [timestep])
        return plan._replace(coefficients=(*plan.coefficients[:i], *step, *plan.coefficients[i + 1 :]))

    def _numbers(self, moves: Sequence[Move], told: Sequence[float]) -> tuple[PNDMStep, ...]:
        stages, repeats, from_t, to_s = zip(*moves, strict=True)
        a_t, a_s, a_seen = self._alpha_bar(from_t), self._alpha_bar(to_s), self._alpha_bar(told)
        columns = (
            a_t**0.5,
            (1 - a_t) ** 0.5,
            (a_s / a_t) ** 0.5,
            a_s - a_t,
            a_t * (1 - a_s) ** 0.5 + (a_t * (1 - a_t) * a_s) ** 0.5,
            a_seen**0.5,
            (1 - a_seen) ** 0.5,
        )
        return tuple(map(PNDMStep, stages, repeats, *columns))

    def _move(self, plan: Plan, k: int, t: int) -> Move:
        """Return the run's k-th step, told t.

        The stride is ``T // steps`` whatever the spacing, and the roles are counted from where the run starts: both
        are the reference's, and matter in runs that begin in the middle.
        """
        stride = self.config.num_train_timesteps // plan.num_inference_steps
        if not self.config.skip_prk_steps and k < 12:
            base = int(plan.times[k // 4 * 4])
            return k % 4, False, base, t - (0 if k % 2 else stride // 2)
        if k == 1:
            return None, True, t + stride, t
        return None, False, t, t - stride

    # ---- the hand-written loop: which of the two methods is due is known, so both names are ``step`` -----------------

    step_prk = step_plms = Scheduler.step

    def _clock(self, timestep: float | Tensor) -> int:
        """Return the index of the step: it is counted, whatever its timestep, as in the reference."""
        known = self._begin_index if self._step_index is None else self._step_index
        return self._ready_plan().start if known is None else known

    @property
    def prk_timesteps(self) -> np.ndarray | None:
        """The timesteps of the Runge-Kutta start (12,), or none of them; None before ``set_timesteps``."""
        return None if self._plan is None else np.array(self._plan.times[: self._stages()])

    @property
    def plms_timesteps(self) -> np.ndarray | None:
        """The timesteps of the multistep method; None before ``set_timesteps``."""
        return None if self._plan is None else np.array(self._plan.times[self._stages() :])

    def _stages(self) -> int:
        return 0 if self.config.skip_prk_steps else 12

    @property
    def ets(self) -> list[Tensor]:
        """The outputs of the network that are remembered, oldest first, at most 4; they may be assigned."""
        return list(PNDMPast(*self._past).outs)

    @ets.setter
    def ets(self, outs: Sequence[Tensor]) -> None:
        self._past = PNDMPast(*self._past)._replace(outs=tuple(outs))

    # ---- the step ---------------------------------------------------------------------------------------------------

    def _update(self, plan: Plan, i: int, x: Tensor, out: Tensor, past: Past, noise: Tensor | None) -> Update:
        step, past = plan.coefficients[i], PNDMPast(*past)
        if step.stage is not None:
            e, x, past = self._runge_kutta(step.stage, x, out, past)
        elif step.repeats:
            e, x, past = (out + past.outs[-1]) / 2, past.x, PNDMPast(past.outs)
        else:
            outs = (*past.outs[-3:], out)
            e = adams_bashforth(outs)
            past = PNDMPast(outs, x if len(outs) == 1 else None)
        eps = predict_eps(self._predicts, x, e, step.from_alpha, step.from_sigma)
        return Update(step.to_x * x - step.gap * eps / step.divisor, past)

    @staticmethod
    def _runge_kutta(stage: int, x: Tensor, out: Tensor, past: PNDMPast) -> tuple[Tensor, Tensor, PNDMPast]:
        """Return the noise estimate of a stage, the x that its step began with, and what to remember."""
        if stage == 0:
            past = PNDMPast((*past.outs, out), x, out * RUNGE_KUTTA[0])
            return out, x, past
        total = past.total + out * RUNGE_KUTTA[stage]
        if stage < 3:
            return out, past.x, past._replace(total=total)
        return total, past.x, PNDMPast(past.outs)
