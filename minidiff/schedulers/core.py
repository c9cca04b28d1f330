"""The pure core of a scheduler: what a run will do, and one step of it.

Every function here depends on its arguments and the configuration alone, so any number of threads may share a scheduler
through them. A run is ``plan``, then ``scale_input``, ``draw_noise`` and ``advance`` at each step::

    plan = scheduler.plan(20)
    x, past = plan.init_noise_sigma * noise, ()
    for i in range(plan.start, len(plan.coefficients)):
        out = network(scheduler.scale_input(plan, i, x), plan.timesteps[i])
        x, past = scheduler.advance(plan, i, x, out, past, scheduler.draw_noise(plan, i, x, generator))

The step index i is the clock. A ``Plan`` holds every number a run will need, on the CPU and worked out before the run
starts, so that a step is a few tensor operations and never waits for a device. ``past`` is an immutable tuple: what a
multistep or multi-evaluation solver remembers. Besides, ``start_at`` makes the plan of the rest of a run, ``denoised``
says what clean sample the network means, ``level`` and ``noised`` how much noise a step begins with.
"""

import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minidiff.configured import ConfigMixin
from minidiff.noise import Generators, randn
from minidiff.schedulers import noise_schedule
from minidiff.schedulers.fields import check_fields
from minidiff.schedulers.mixin import SchedulerMixin
from minidiff.schedulers.prediction import Thresholding, predict_x0

Device = torch.device | str | None
Past = tuple[Any, ...]  # what a solver remembers


class Plan(NamedTuple):
    """All that a run will do, fixed before it starts and never changed."""

    timesteps: Tensor  # (N,)      what the network is told, on the run's device
    sigmas: Tensor  # (N + 1,)     noise level before each step and after the last, float32 on the CPU
    coefficients: tuple[Any, ...]  # N  the solver's own numbers for each step
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


class Core(SchedulerMixin, ConfigMixin):
    """A scheduler without state. A solver provides ``_grid``, ``_coefficients`` and ``_update``."""

    order: ClassVar[int] = 1  # network evaluations per step that the caller asked for
    beta_schedules: ClassVar[tuple[str, ...]] = noise_schedule.BETA_SCHEDULES
    prediction_types: ClassVar[tuple[str, ...]] = ("epsilon", "sample", "v_prediction")
    run_options: ClassVar[Mapping[str, Any]] = {}  # options of a run and their defaults, such as eta

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
        if "set_alpha_to_one" in config:
            self.final_alpha_cumprod = torch.tensor(1.0) if config.set_alpha_to_one else self.alphas_cumprod[0]
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def _check_fields(self, parameters: Mapping[str, inspect.Parameter], fields: Mapping[str, Any]) -> None:
        check_fields(type(self).__name__, parameters, fields)

    @property
    def _predicts(self) -> str:
        return self.config.prediction_type

    @property
    def _thresholding(self) -> Thresholding:
        # Made when it is needed: a pipeline corrects outdated configurations after the scheduler is built.
        return Thresholding.of(self._own())

    # ---- the pure core ------------------------------------------------------------------------------------------

    def plan(
        self,
        steps: int | None = None,
        *,
        device: Device = None,
        start: int = 0,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        **options: Any,
    ) -> Plan:
        """Work out a run of ``steps`` steps, or of given ``timesteps`` or ``sigmas`` where ``_grid`` takes them.

        ``options`` are those in ``run_options``. Raises ValueError for counts and options that cannot be planned.
        """
        given = {"timesteps": timesteps, "sigmas": sigmas, "mu": mu, **options}
        given = {name: value for name, value in given.items() if value is not None}
        _, *grid_inputs = inspect.signature(self._grid).parameters
        for name in given:
            if name not in (*grid_inputs, *self.run_options):
                raise ValueError(f"{type(self).__name__} cannot plan from {name}=")
        custom = {name: given.pop(name) for name in grid_inputs if name in given}
        lists = [custom[name] for name in ("timesteps", "sigmas") if name in custom]
        if len(lists) + (steps is not None) != 1:
            raise ValueError("give exactly one of num_inference_steps, timesteps and sigmas")
        count = len(lists[0]) if lists else _index(steps)
        if count is None or count < 1:
            raise ValueError(f"num_inference_steps should be a positive integer, found {steps!r}")
        betas = self.config.get("trained_betas")
        if betas is not None and len(betas) < len(self):
            raise ValueError(f"trained_betas has {len(betas)} entries, num_train_timesteps is {len(self)}")
        grid = self._grid(count, **custom)
        return self._plan_of(grid, len(grid.timesteps) if "sigmas" in custom else count, device, start, given)

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
        """Return the clean x0 that the network's output ``out`` at step ``i`` implies."""
        step = plan.coefficients[i]
        return self._thresholding(predict_x0(self._predicts, x, out, step.alpha, step.sigma))

    def level(self, plan: Plan, i: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma, x = alpha x0 + sigma noise, where step ``i`` begins; N is after the last.

        Both are () on the CPU and worked out in ``dtype``, as the reference does in that of the sample: rounded from
        float64 to float32, sigma would be another number at 250 of 1000 timesteps (of linear betas; by 1e-7).
        """
        ended = i == len(plan.times)
        alpha_bar = 1 / (plan.sigmas[i] ** 2 + 1) if ended else self.alphas_cumprod[int(plan.times[i])]
        return alpha_sigma(alpha_bar.to(dtype))

    def noised(self, plan: Plan, x0: Tensor, noise: Tensor) -> Tensor:
        """Return the x (B, ...) that the run begins with when it begins at step ``plan.start`` from the clean x0."""
        alpha, sigma = self.level(plan, plan.start, x0.dtype)
        return alpha * x0 + sigma * noise

    def scale_input(self, plan: Plan, i: int, x: Tensor) -> Tensor:
        """Return what the network is shown at step ``i``: x itself unless the solver works on unscaled samples."""
        return x

    def wants_noise(self, plan: Plan, i: int) -> bool:
        """Say whether step ``i`` draws noise."""
        return False

    def draw_noise(self, plan: Plan, i: int, x: Tensor, generator: Generators = None) -> Tensor | None:
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

    def _coefficients(self, plan: Plan) -> tuple[Any, ...]:
        """Return the numbers of each step of ``plan`` (whose own ``coefficients`` are still empty)."""
        raise NotImplementedError

    def _update(self, plan: Plan, i: int, x: Tensor, out: Tensor, past: Past, noise: Tensor | None) -> Update:
        """Take step ``i``."""
        raise NotImplementedError

    def _init_noise_sigma(self, sigmas: Tensor) -> float:
        """Return the standard deviation of the sample that a run over ``sigmas`` starts from."""
        return 1.0

    def _plan_of(self, grid: Grid, count: int, device: Device, start: int, options: Mapping[str, Any]) -> Plan:
        times = tuple(grid.timesteps.tolist())
        if not 0 <= start < len(times):
            raise ValueError(f"a run of {len(times)} steps cannot start at step {start}")
        timesteps = grid.timesteps if device is None else grid.timesteps.to(device)
        sigma = self._init_noise_sigma(grid.sigmas)
        plan = Plan(timesteps, grid.sigmas, (), times, count, sigma, start, {**self.run_options, **options})
        return plan._replace(coefficients=self._coefficients(plan))

    # ---- what solvers share: timesteps and tables of training ---------------------------------------------------

    def _spaced_timesteps(self, count: int, **how: Any) -> Tensor:
        """Return ``count`` timesteps as the configuration spaces them; see ``noise_schedule.spaced_timesteps``."""
        own = self._own()
        spacing, offset = own.get("timestep_spacing", "linspace"), own.get("steps_offset", 0)
        return noise_schedule.spaced_timesteps(spacing, count, len(self), offset, **how)

    def _grid_of(self, times: Tensor, final: Tensor | None = None) -> Grid:
        """Return the grid of training timesteps (N,), at whose end alpha_bar is ``final``, by default 1."""
        alpha_bar = torch.cat([self.alphas_cumprod[times], torch.ones(1) if final is None else final[None]])
        return Grid(times, noise_schedule.noise_level(alpha_bar))

    def _training_grid(self) -> Grid:
        """Return every training timestep, last first."""
        return self._grid_of(torch.arange(len(self.alphas_cumprod) - 1, -1, -1))

    def _training_sigmas(self) -> np.ndarray:
        """Return the noise levels of training, smallest first (T,), float32."""
        return noise_schedule.noise_level(self.alphas_cumprod).numpy()

    def _alpha_bar(self, times: Sequence[float]) -> Tensor:
        """Return alpha_bar (N,) at timesteps, and ``final_alpha_cumprod`` where they have gone below 0."""
        index = torch.tensor(times, dtype=torch.int64)
        return torch.where(index < 0, self.final_alpha_cumprod, self.alphas_cumprod[index.clamp(min=0)])

    def _require_signal(self, alpha_bar: Tensor) -> None:
        """Refuse runs in which x0 = (x - sigma eps) / sqrt(alpha_bar) divides by 0 with nothing to bound it."""
        bounded = self._thresholding.limit is not None
        if self.config.prediction_type == "epsilon" and not bounded and not bool(alpha_bar.all()):
            raise ValueError(
                "rescale_betas_zero_snr leaves no signal at the last training timestep, where a network that predicts "
                "epsilon says nothing about x0: use prediction_type='v_prediction' or 'sample', clip_sample=True, or "
                "a timestep spacing that does not visit it"
            )

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def alpha_sigma(alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma, x = alpha x0 + sigma noise, of alpha_bar, in its type: in half precision it matters."""
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def _index(value: Any) -> int | None:
    """Return an integer of any library as Python's, None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
