"""The face of a scheduler that loops written by hand use, as in tutorials: the pure core, with its state kept.

``set_timesteps``, ``scale_model_input``, ``step(...).prev_sample``, ``add_noise``, and what a run shows of itself.
"""

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from minidiff.noise import Generators
from minidiff.outputs import Output
from minidiff.schedulers.core import Core, Device, Grid, Plan, Update, alpha_sigma
from minidiff.schedulers.mixin import SchedulerOutput
from minidiff.schedulers.place import SHOWN, OfPlace, Place, place_of


class ByHandScheduler(Core):
    """A scheduler that knows where it is in a run; see ``minidiff.schedulers.place``."""

    finds_by_timestep: ClassVar[bool] = False  # step() finds its place by the timestep each time; others count
    any_time: ClassVar[bool] = False  # step() may be asked for a timestep that the run does not visit
    starts_ready: ClassVar[bool] = False  # step() works before set_timesteps, over every training timestep
    time_dtype: ClassVar[torch.dtype] = torch.int64  # of the timesteps before set_timesteps
    _plan, _past, _step_index, _begin_index = OfPlace(), OfPlace(), OfPlace(), OfPlace()  # of the second face

    def set_timesteps(self, num_inference_steps: int | None = None, device: Device = None) -> None:
        """Plan a run and forget the previous one; see ``plan``. Some solvers take more: ``timesteps``, ``sigmas``."""
        self._begin(self.plan(num_inference_steps, device=device))

    def _begin(self, plan: Plan) -> None:
        self._place = Place(plan)

    def show(self, plan: Plan, step_index: int | None = None) -> None:
        """Let this thread see, through the attributes below, a run of the pure core that has come to this step."""
        SHOWN.set(self, Place(plan, (), step_index, plan.start or None))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_place": copy.copy(place_of(self))}  # a copy goes its own way

    @property
    def timesteps(self) -> Tensor:
        """The timesteps of the run (N,); before ``set_timesteps`` all those of training, last first."""
        return self._training_grid().timesteps.to(self.time_dtype) if self._plan is None else self._plan.timesteps

    @property
    def sigmas(self) -> Tensor:
        """The noise levels before each step of the run and after the last (N + 1,), float32 on the CPU."""
        return self._training_grid().sigmas if self._plan is None else self._plan.sigmas

    @property
    def num_inference_steps(self) -> int | None:
        """The number that ``set_timesteps`` was asked for, None before it."""
        return None if self._plan is None else self._plan.num_inference_steps

    @property
    def init_noise_sigma(self) -> float | Tensor:
        """The standard deviation of the sample that the run starts from."""
        return self._init_noise_sigma(self.sigmas) if self._plan is None else self._plan.init_noise_sigma

    @property
    def step_index(self) -> int | None:
        """The step that comes next, None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The step that the run begins with, None if the first call of ``step`` is to find it by its timestep."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin the run at this step, as image-to-image does."""
        self._plan = self.start_at(self._ready_plan(), begin_index)
        self._begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Return what the network is to be shown at ``timestep``."""
        if type(self).scale_input is Core.scale_input:
            return sample  # works before set_timesteps too, as in the reference
        return self.scale_input(self._ready_plan(), self._clock(timestep), sample)

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Take the step at ``timestep``: the network's output and the sample (B, ...) give the previous sample.

        Raises ValueError before ``set_timesteps``, after the last step, and for a timestep that is not in the run.
        """
        return self._take_step(model_output, timestep, sample, None, return_dict)

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Return where a timestep is in the run, or among ``schedule_timesteps``; of several equal ones the second."""
        return self._index_of(timestep, None if schedule_timesteps is None else tuple(schedule_timesteps.tolist()))

    def previous_timestep(self, timestep: int | Tensor) -> int | Tensor:
        """Return the timestep that the run visits after this one, -1 after the last."""
        if self._plan is None:
            return timestep - 1
        following = self._index_of(timestep) + 1
        return self._plan.timesteps[following] if following < len(self._plan.times) else torch.tensor(-1)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise for timesteps (B,), as in training."""
        alpha, sigma = self._alpha_sigma_at(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x0, the target of v-prediction."""
        alpha, sigma = self._alpha_sigma_at(timesteps, sample)
        return alpha * noise - sigma * sample

    # ---- how the second face keeps its place --------------------------------------------------------------------

    def _take_step(
        self,
        out: Tensor,
        timestep: float | Tensor,
        x: Tensor,
        generator: Generators,
        return_dict: bool,
        noise: Tensor | None = None,
        **options: Any,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        plan = self._ready_plan()
        i = self._clock(timestep)
        if i >= len(plan.coefficients):
            raise ValueError(f"all {len(plan.coefficients)} steps are done: call set_timesteps to begin another run")
        # Whether the run begins in the middle.
        late = self._step_index is None and not self.finds_by_timestep and i != plan.start
        if late or (options and options != plan.options):
            plan = plan._replace(options={**plan.options, **options})
            plan = self._plan = self.start_at(plan, i if late else plan.start)
        if self.any_time and plan.times[i] != (told := _number(timestep)):
            self._require_trained(told, plan.times)
            plan = self._at(plan, i, int(told))
        if noise is None:
            noise = self.draw_noise(plan, i, x, generator)
        elif generator is not None:
            raise ValueError("give a generator or variance_noise, not both")
        update = self._checked_update(plan, i, x, out, self._past, noise)
        self._past, self._step_index = update.past, i + 1
        result = self._output(update)
        return result if return_dict else result.to_tuple()

    def _output(self, update: Update) -> Output:
        return SchedulerOutput(update.x, update.x0)

    def _ready_plan(self) -> Plan:
        if self._plan is None and not self.starts_ready:
            raise ValueError(f"{type(self).__name__}: call set_timesteps(num_inference_steps) before step")
        return self._training_plan if self._plan is None else self._plan

    @cached_property
    def _training_plan(self) -> Plan:
        """Every training timestep, which ``step`` visits if ``set_timesteps`` was not called, as in the reference."""
        if self.order > 1:  # visits most of them twice
            return self.plan(len(self))
        return self._plan_of(self._training_grid(), len(self), None, 0, {})

    def _require_trained(self, timestep: float, times: Sequence[float]) -> None:
        if timestep not in range(len(self.alphas_cumprod)):
            raise ValueError(_absent(timestep, times))

    def _at(self, plan: Plan, i: int, timestep: int) -> Plan:
        """Return ``plan`` with another timestep at step ``i``."""
        timesteps = plan.timesteps.index_fill(0, torch.tensor(i, device=plan.timesteps.device), timestep)
        grid = Grid(timesteps, plan.sigmas)
        return self._plan_of(grid, plan.num_inference_steps, timesteps.device, plan.start, plan.options)

    def _clock(self, timestep: float | Tensor) -> int:
        """Return the index of the step at ``timestep``."""
        known = self._begin_index if self._step_index is None else self._step_index
        return self._index_of(timestep) if known is None or self.finds_by_timestep else known

    def _index_of(self, timestep: float | Tensor, times: tuple[float, ...] | None = None) -> int:
        """Find a timestep in the run, or in other ``times``.

        Of several equal ones the second is meant, as in the reference: solvers with two evaluations per step visit a
        timestep to finish a step and once more to begin the next. But a run that can begin at 0 begins there; the
        reference does not, and runs out of steps where rounding has made the first two timesteps equal.
        """
        value, plan = _number(timestep), self._ready_plan()
        times = plan.times if times is None else times
        try:
            first = times.index(value)
        except ValueError:
            if self.any_time:
                self._require_trained(value, times)
                return plan.start
            raise ValueError(_absent(value, times)) from None
        twice = times[first + 1 : first + 2] == (value,)  # timesteps never ascend, so equal ones are neighbours
        return first + 1 if twice and first > 0 else first

    def _alpha_sigma_at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), shaped to broadcast over ``like`` (B, ...)."""
        if torch.is_floating_point(timesteps) and bool((timesteps != timesteps.floor()).any()):
            raise TypeError(f"timesteps should be integers (0 to {len(self) - 1}), found {timesteps.dtype}")
        key = (like.device, like.dtype)
        if key not in self._tables:  # one copy per device: a training loop must not upload the table at each step
            self._tables[key] = self.alphas_cumprod.to(*key)
        # Cast first and root after, as the reference does: in float16 the order decides the last bits.
        return alpha_sigma(self._tables[key][timesteps.to(like.device).long()].reshape(-1, *[1] * (like.ndim - 1)))


class Stochastic:
    """The face of solvers that draw noise and take nothing else: ``step`` takes a generator."""

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Take the step at ``timestep`` with noise from ``generator``; see ``Scheduler.step``."""
        return self._take_step(model_output, timestep, sample, generator, return_dict)


def _number(value: Any) -> float:
    """Return a number of Python's, of NumPy's or in a tensor as Python's."""
    return value.item() if hasattr(value, "item") else value


def _absent(timestep: float, times: Sequence[float]) -> str:
    shown = [f"{time:g}" for time in times]
    some = ", ".join(shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-3:]])
    return f"timestep {timestep} is not one of the run's {len(times)}: {some}"
