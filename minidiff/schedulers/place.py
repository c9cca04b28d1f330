"""Where the second face of a scheduler is in its run: the plan, what the solver remembers, and the next step.

A loop written by hand has one place, whatever thread it goes on in. A pipeline never touches that: it only *shows*
where its own run is, to the thread that it runs in, so that callbacks (and the code after the call) read ``timesteps``,
``sigmas`` and ``step_index`` of the run. Of the two, a thread sees the one that began later.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any

from minidiff.threads import PerThread

_clock = itertools.count()


@dataclass
class Place:
    """The state of a run by hand; see ``Scheduler``."""

    _plan: Any = None
    _past: tuple[Any, ...] = ()
    _step_index: int | None = None
    _begin_index: int | None = None
    since: int = field(default_factory=lambda: next(_clock))


SHOWN: PerThread[Place] = PerThread()


def place_of(scheduler: Any) -> Place:
    """Return the place that this thread sees."""
    own = vars(scheduler).setdefault("_place", Place(since=-1))
    shown = SHOWN.get(scheduler)
    return own if shown is None or shown.since < own.since else shown


class OfPlace:
    """An attribute of a scheduler that is one of its place."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, scheduler: Any, owner: type | None = None) -> Any:
        return self if scheduler is None else getattr(place_of(scheduler), self.name)

    def __set__(self, scheduler: Any, value: Any) -> None:
        setattr(place_of(scheduler), self.name, value)
