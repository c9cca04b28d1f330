"""How much of a run is taken: image-to-image begins later, a base model that hands over to a refiner ends earlier.

    N       steps asked for; with timesteps= or sigmas= the number of evaluations that they plan
    taken = min(⌊N · strength⌋, N)
    start = (N - taken) · order      the evaluation that the run begins with

⌊·⌋ is Python's ``int`` of the floating product: ⌊50 · 0.58⌋ is 28, because 50 * 0.58 is 28.999999999999996. ``order``
is 2 for solvers that evaluate twice per step, 1 for the rest. PNDM evaluates once more than it takes steps, so that
strength 0 is one evaluation there and an error everywhere else.

Paper: Meng et al. 2022 (SDEdit, https://arxiv.org/abs/2108.01073). Checked against ``get_timesteps`` of the reference's
pipelines.
"""

from collections.abc import Sequence
from typing import Protocol

from minidiff.schedulers.base import Plan, Scheduler


class HasStrength(Protocol):
    """What a request must say for its part of a run to be known."""

    strength: float
    timesteps: Sequence[int] | None
    sigmas: Sequence[float] | None


def last_steps(scheduler: Scheduler, plan: Plan, request: HasStrength, minimum: int = 0) -> Plan:
    """Return the plan of the last steps of ``plan``, as many as the strength asks for, at least ``minimum``.

    Raises:
        ValueError: if no step, or less than ``minimum``, is left.
    """
    custom = request.timesteps is not None or request.sigmas is not None
    asked = len(plan.times) if custom else plan.num_inference_steps
    taken = min(int(asked * request.strength), asked)
    start = (asked - taken) * scheduler.order
    if taken < minimum or start >= len(plan.times):
        needed = 1 / asked
        raise ValueError(
            f"strength={request.strength} of {asked} steps leaves no step to take: ask for a strength of at least "
            f"{needed:.2g}, or for more steps"
        )
    plan = scheduler.start_at(plan, start)
    scheduler.show(plan)
    return plan


def take_over(scheduler: Scheduler, plan: Plan, denoising_start: float) -> Plan:
    """Return the plan of the steps that a run with this ``denoising_end`` left.

    Raises:
        ValueError: if no step is left.
    """
    cut = cut_timestep(scheduler, denoising_start)
    left = sum(t < cut for t in plan.times)
    if not left:
        raise ValueError(
            f"denoising_start={denoising_start} of {plan.num_inference_steps} steps leaves no step to take: ask for "
            "more steps, or a larger part of them"
        )
    if scheduler.order == 2 and left % 2 == 0:
        left += 1  # base stopped within a step of two evaluations, which begins again
    return scheduler.start_at(plan, len(plan.times) - left)


def steps_until(scheduler: Scheduler, plan: Plan, denoising_end: float | None) -> int | None:
    """Return the step before which a run ends that does a share of the noise levels; None if it takes all.

    It takes the steps at timesteps t >= T (1 - denoising_end), rounded; a run that begins with the same share as its
    ``denoising_start`` takes those below.
    """
    if denoising_end is None or denoising_end == 1:
        return None
    cut = cut_timestep(scheduler, denoising_end)
    count = sum(t >= cut for t in plan.times[plan.start :])
    if not count:
        raise ValueError(
            f"denoising_end={denoising_end} leaves nothing to do: the first timestep is {plan.times[plan.start]:g}, "
            f"the cut lies at {cut}"
        )
    return plan.start + count


def cut_timestep(scheduler: Scheduler, share: float) -> int:
    """Return the timestep where ``share`` of the noise levels of training is done.

    Raises:
        ValueError: if the scheduler counts in log(sigma) / 4, of which the reference takes all for early, or for late.
    """
    own = getattr(scheduler, "scheduler", scheduler)  # a run by its public methods has it inside
    if getattr(own, "_tells_log_sigma", bool)():
        raise ValueError(
            f"denoising_start and denoising_end count timesteps of training, and {type(own).__name__} as it is "
            "configured has none: its times are log(sigma) / 4; ask for a part of the steps with strength"
        )
    T = scheduler.config.num_train_timesteps
    return round(T - share * T)
