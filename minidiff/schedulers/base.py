"""What every scheduler is: a pure core, and the hand-written loop's face on top of it."""

from collections.abc import Sequence
from typing import ClassVar

from minidiff.schedulers.by_hand import ByHandScheduler, Stochastic
from minidiff.schedulers.core import Device, Grid, Past, Plan, Update
from minidiff.schedulers.mixin import KarrasDiffusionSchedulers, SchedulerOutput

__all__ = ["Device", "Grid", "Past", "Plan", "Scheduler", "SchedulerOutput", "Stochastic", "Update"]


class Scheduler(ByHandScheduler):
    """Base of the schedulers. A solver provides ``_grid``, ``_coefficients`` and ``_update``."""

    _compatibles: ClassVar[Sequence[str]] = tuple(KarrasDiffusionSchedulers.__members__)
