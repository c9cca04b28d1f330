"""How much of a run image-to-image takes: the last steps, from the noise level that hides a part of the image.

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


class Asked(Protocol):
    """What a request must say for its part of a run to be known."""

    strength: float
    timesteps: Sequence[int] | None
    sigmas: Sequence[float] | None


def begin(scheduler: Scheduler, plan: Plan, request: Asked, minimum: int = 0) -> Plan:
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
