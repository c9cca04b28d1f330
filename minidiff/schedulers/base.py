"""What every scheduler is: a pure core, and the hand-written loop's face on top of it.

The core is three pure functions. Any number of threads may use one scheduler through them::

    plan = scheduler.plan(20)
    x, past = plan.init_noise_sigma * noise, ()
    for i in range(plan.start, len(plan.steps)):
        out = network(scheduler.scale_input(plan, i, x), plan.timesteps[i])
        x, past = scheduler.advance(plan, i, x, out, past, scheduler.draw_noise(plan, i, x, generator))

The step index i is the clock. A ``Plan`` holds every number a run will need, on the CPU and worked out before the run
starts, so that a step is a few tensor operations and never waits for a device. ``past`` is an immutable tuple: what a
multistep or multi-evaluation solver remembers.

The second face is the one of tutorials (``set_timesteps``, ``scale_model_input``, ``step``), with its state.
"""

import copy
import operator
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from minidiff import noise_schedule
from minidiff.configured import ConfigMixin
from minidiff.outputs import Output
from minidiff.random import randn
from minidiff.schedulers.mixin import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from minidiff.schedulers.place import SHOWN, OfPlace, Place, place_of
from minidiff.schedulers.prediction import Clip


class Plan(NamedTuple):
    """All that a run will do, fixed before it starts and never changed."""

    timesteps: Tensor  # (N,)      what the network is told, on the run's device
    sigmas: Tensor  # (N + 1,)     noise level before each step and after the last, float32 on the CPU
    steps: tuple[Any, ...]  # N    the solver's own numbers for each step
    times: tuple[float, ...]  # N  the timesteps as Python numbers
    num_inference_steps: int  #    what was asked for; N differs from it in solvers that evaluate more than once
    init_noise_sigma: float = 1.0  # standard deviation of the x that a run starts from
    start: int = 0  #              the first step of this run: image-to-image and the refiner begin later
    options: Mapping[str, Any] = {}  # the solver's options of this run, such as eta


class Grid(NamedTuple):
    """The timesteps (N,) that the network is told and the noise levels (N + 1,), both on the CPU."""

    timesteps: Tensor
    sigmas: Tensor


class Update(NamedTuple):
    """What one step gives: the next x, what to remember, and the predicted x0 if the solver worked it out."""

    x: Tensor
    past: tuple[Any, ...]
    x0: Tensor | None = None


class Scheduler(SchedulerMixin, ConfigMixin):
    """Base of the schedulers. A solver provides ``_grid``, ``_steps``, ``_update`` and ``denoised``."""

    _compatibles: ClassVar[Sequence[str]] = tuple(KarrasDiffusionSchedulers.__members__)
    order: ClassVar[int] = 1  # network evaluations per step that the caller asked for
    beta_schedules: ClassVar[tuple[str, ...]] = noise_schedule.BETA_SCHEDULES
    prediction_types: ClassVar[tuple[str, ...]] = ("epsilon", "sample", "v_prediction")
    looks_up: ClassVar[bool] = False  # step() finds its place by the timestep each time; others count
    any_time: ClassVar[bool] = False  # step() may be asked for a timestep that the run does not visit
    starts_ready: ClassVar[bool] = False  # step() works before set_timesteps, over every training timestep
    time_dtype: ClassVar[torch.dtype] = torch.int64  # of the timesteps before set_timesteps
    plan_inputs: ClassVar[tuple[str, ...]] = ()  # which of timesteps=, sigmas=, mu= the solver can plan from
    sigmas_include_last: ClassVar[bool] = False  # sigmas= that a user gives end with the level after the last step
    run_options: ClassVar[Mapping[str, Any]] = {}  # options of a run and their defaults, such as eta
    _plan, _past, _step_index, _begin_index = OfPlace(), OfPlace(), OfPlace(), OfPlace()  # of the second face

    def __init__(self) -> None:
        config = self.config
        self._require("beta_schedule", self.beta_schedules)
        self._require("prediction_type", self.prediction_types)
        if "timestep_spacing" in config:
            self._require("timestep_spacing", noise_schedule.SPACINGS)
        self.betas = noise_schedule.training_betas(  # (T,)
            config.beta_schedule,
            config.beta_start,
            config.beta_end,
            config.num_train_timesteps,
            config.trained_betas,
            config.get("rescale_betas_zero_snr", False),
        )
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)  # alpha_bar
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def _predicts(self) -> str:
        return self.config.prediction_type

    @property
    def _clip(self) -> Clip:
        # Made when it is needed: a pipeline corrects outdated configurations after the scheduler is built.
        return Clip.of(self._own())

    # ---- the pure core ------------------------------------------------------------------------------------------

    def plan(
        self,
        steps: int | None = None,
        *,
        device: torch.device | str | None = None,
        start: int = 0,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        **options: Any,
    ) -> Plan:
        """Work out a run of ``steps`` steps (or of given ``timesteps`` or ``sigmas``, where the solver has them).

        ``options`` are those in ``run_options``. Raises ValueError for counts and options that cannot be planned.
        """
        options |= {
            name: value
            for name, value in (("timesteps", timesteps), ("sigmas", sigmas), ("mu", mu))
            if value is not None
        }
        for name in options:
            if name not in (*self.plan_inputs, *self.run_options):
                raise ValueError(f"{type(self).__name__} cannot plan from {name}=")
        custom = {name: options.pop(name) for name in self.plan_inputs if name in options}
        given = [name for name in ("timesteps", "sigmas") if name in custom]
        if len(given) + (steps is not None) != 1:
            raise ValueError("give exactly one of num_inference_steps, timesteps and sigmas")
        count = len(custom[given[0]]) - (given == ["sigmas"] and self.sigmas_include_last) if given else _index(steps)
        if count is None or count < 1:
            raise ValueError(f"num_inference_steps should be a positive integer, found {steps!r}")
        if len(self.betas) < len(self):
            raise ValueError(f"trained_betas has {len(self.betas)} entries, num_train_timesteps is {len(self)}")
        return self._plan_of(self._grid(count, **custom), count, device, start, options)

    def start_at(self, plan: Plan, start: int) -> Plan:
        """Return the plan of a run that begins at step ``start`` of ``plan``: solvers warm up from there."""
        return self._plan_of(Grid(*plan[:2]), plan.num_inference_steps, plan.timesteps.device, start, plan.options)

    def advance(
        self, plan: Plan, i: int, x: Tensor, out: Tensor, past: tuple[Any, ...] = (), noise: Tensor | None = None
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Take step ``i`` from x (B, ...) and the network's output; return the next x and what to remember.

        ``noise`` is a standard normal tensor like x, needed where ``wants_noise(plan, i)``.
        """
        update = self._checked_update(plan, i, x, out, past, noise)
        return update.x, update.past

    def denoised(self, plan: Plan, i: int, x: Tensor, out: Tensor) -> Tensor:
        """Return the clean x0 that the network's output ``out`` at step ``i`` implies (for previews)."""
        raise NotImplementedError

    def noised(self, plan: Plan, x0: Tensor, noise: Tensor) -> Tensor:
        """Return the x (B, ...) that the run begins with when it begins at step ``plan.start`` from the clean x0."""
        begun = copy.copy(self)  # the second face knows how to; a copy, because other threads may use this scheduler
        begun._place = Place(plan, _begin_index=plan.start)
        return begun.add_noise(x0, noise, plan.timesteps[plan.start].expand(len(x0)))

    def scale_input(self, plan: Plan, i: int, x: Tensor) -> Tensor:
        """Return what the network is shown at step ``i``: x itself unless the solver works on unscaled samples."""
        return x

    def wants_noise(self, plan: Plan, i: int) -> bool:
        """Say whether step ``i`` draws noise."""
        return False

    def draw_noise(
        self, plan: Plan, i: int, x: Tensor, generator: Generator | Sequence[Generator] | None = None
    ) -> Tensor | None:
        """Draw what step ``i`` needs, or None where it needs nothing, so that draws come in the reference's order."""
        return randn(x.shape, generator, x.device, x.dtype) if self.wants_noise(plan, i) else None

    def _checked_update(
        self, plan: Plan, i: int, x: Tensor, out: Tensor, past: tuple[Any, ...], noise: Tensor | None
    ) -> Update:
        if noise is None and self.wants_noise(plan, i):
            raise ValueError(
                f"step {i} of {type(self).__name__} needs noise: pass what draw_noise(plan, {i}, x) returns"
            )
        return self._update(plan, i, x, out, past, noise)

    # ---- what a solver provides ---------------------------------------------------------------------------------

    def _grid(self, count: int, **custom: Any) -> Grid:
        """Return the timesteps and noise levels of a run of ``count`` steps."""
        raise NotImplementedError

    def _steps(self, plan: Plan) -> tuple[Any, ...]:
        """Return the numbers of each step of ``plan`` (whose own ``steps`` are still empty)."""
        raise NotImplementedError

    def _update(
        self, plan: Plan, i: int, x: Tensor, out: Tensor, past: tuple[Any, ...], noise: Tensor | None
    ) -> Update:
        """Take step ``i``."""
        raise NotImplementedError

    def _init_noise_sigma(self, sigmas: Tensor) -> float:
        """Return the standard deviation of the sample that a run over ``sigmas`` starts from."""
        return 1.0

    def _plan_of(
        self, grid: Grid, count: int, device: torch.device | str | None, start: int, options: Mapping[str, Any]
    ) -> Plan:
        times = tuple(grid.timesteps.tolist())
        if not 0 <= start < len(times):
            raise ValueError(f"a run of {len(times)} steps cannot start at step {start}")
        timesteps = grid.timesteps if device is None else grid.timesteps.to(device)
        sigma = self._init_noise_sigma(grid.sigmas)
        plan = Plan(timesteps, grid.sigmas, (), times, count, sigma, start, {**self.run_options, **options})
        return plan._replace(steps=self._steps(plan))

    # ---- the second face: the loop written by hand --------------------------------------------------------------

    def set_timesteps(self, num_inference_steps: int | None = None, device: torch.device | str | None = None) -> None:
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
        return (
            self._init_noise_sigma(self._training_grid().sigmas) if self._plan is None else self._plan.init_noise_sigma
        )

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
        if type(self).scale_input is Scheduler.scale_input:
            return sample  # works before set_timesteps too, as in the reference
        return self.scale_input(self._ready_plan(), self._clock(timestep), sample)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
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

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # ---- how the second face keeps its place --------------------------------------------------------------------

    def _take_step(
        self,
        out: Tensor,
        timestep: float | Tensor,
        x: Tensor,
        generator: Generator | Sequence[Generator] | None,
        return_dict: bool,
        noise: Tensor | None = None,
        **options: Any,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        plan = self._ready_plan()
        i = self._clock(timestep)
        if i >= len(plan.steps):
            raise ValueError(f"all {len(plan.steps)} steps are done: call set_timesteps to begin another run")
        late = self._step_index is None and not self.looks_up and i != plan.start  # the run begins in the middle
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
        return self._index_of(timestep) if known is None or self.looks_up else known

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

    def _training_grid(self) -> Grid:
        """Return every training timestep, last first."""
        sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5
        last_first = torch.arange(len(self.alphas_cumprod) - 1, -1, -1)
        return Grid(last_first, torch.cat([sigmas.flip(0), torch.zeros(1)]))

    def _training_sigmas(self) -> np.ndarray:
        """Return the noise levels of training, smallest first (T,), float32."""
        return (((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5).numpy()

    def _levels_at(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """Return noise levels at timesteps (B,) of the run (before it: of training), shaped like ``like`` (B, ...)."""
        if self._plan is None:
            index = len(self) - 1 - timesteps.reshape(-1).long()  # the training grid begins with its last timestep
        elif self._begin_index is None:
            index = [self._index_of(t) for t in timesteps.reshape(-1).tolist()]
        else:  # image-to-image noises to the level it begins at, inpainting to the one it has reached
            index = [self._begin_index if self._step_index is None else self._step_index] * timesteps.numel()
        return self.sigmas.to(like.device, like.dtype)[index].reshape(-1, *[1] * (like.ndim - 1))

    def _alpha_bar(self, times: Sequence[float]) -> Tensor:
        """Return alpha_bar (N,) at timesteps, and ``final_alpha_cumprod`` where they have gone below 0."""
        index = torch.tensor(times, dtype=torch.int64)
        return torch.where(index < 0, self.final_alpha_cumprod, self.alphas_cumprod[index.clamp(min=0)])

    def _require_signal(self, alpha_bar: Tensor, clip: Clip) -> None:
        """Refuse runs in which x0 = (x - sigma eps) / sqrt(alpha_bar) divides by 0 with nothing to bound it."""
        if self.config.prediction_type == "epsilon" and clip.limit is None and not bool(alpha_bar.all()):
            raise ValueError(
                "rescale_betas_zero_snr leaves no signal at the last training timestep, where a network that predicts "
                "epsilon says nothing about x0: use prediction_type='v_prediction' or 'sample', clip_sample=True, or "
                "a timestep spacing that does not visit it"
            )

    def _alpha_sigma_at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), shaped to broadcast over ``like`` (B, ...)."""
        if torch.is_floating_point(timesteps) and bool((timesteps != timesteps.floor()).any()):
            raise TypeError(f"timesteps should be integers (0 to {len(self) - 1}), found {timesteps.dtype}")
        key = (like.device, like.dtype)
        if key not in self._tables:  # one copy per device: a training loop must not upload the table at each step
            self._tables[key] = self.alphas_cumprod.to(*key)
        # Cast first and root after, as the reference does: in float16 the order decides the last bits.
        alpha_bar = self._tables[key][timesteps.to(like.device).long()].reshape(-1, *[1] * (like.ndim - 1))
        return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


class Stochastic:
    """The face of solvers that draw noise and take nothing else: ``step`` takes a generator."""

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generator | Sequence[Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Take the step at ``timestep`` with noise from ``generator``; see ``Scheduler.step``."""
        return self._take_step(model_output, timestep, sample, generator, return_dict)


def _number(value: Any) -> float:
    """Return a number of Python's, of NumPy's or in a tensor as Python's."""
    return value.item() if hasattr(value, "item") else value


def _index(value: Any) -> int | None:
    """Return an integer of any library as Python's, None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _absent(timestep: float, times: Sequence[float]) -> str:
    shown = [f"{time:g}" for time in times]
    some = ", ".join(shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-3:]])
    return f"timestep {timestep} is not one of the run's {len(times)}: {some}"
