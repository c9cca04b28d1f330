"""Every run that can be asked for: what must hold of its plan and of its way, class by class and option by option.

``CLASSES`` has one row per scheduler class. The options that its constructor has among ``AXES`` make its grid, with
those in ``Row.also``; ``check_plan`` and ``check_runs`` are the laws.
"""

import inspect
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import minidiff
from minidiff.errors import ConfigError
from minidiff.schedulers import noise_schedule
from tests.schedulers.runs import network, noise

COUNTS = (*range(1, 61), 100, 999, 1000)
T = 1000
AXES: dict[str, Sequence[Any]] = {
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "rescale_betas_zero_snr": (False, True),
    "set_alpha_to_one": (True, False),
    "skip_prk_steps": (True, False),
}
SPACED_BY = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
)
ONE_MORE = ("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")  # space n + 1 timesteps
PURE_NOISE = ("DDIMScheduler", "DDPMScheduler", "LCMScheduler", "TCDScheduler")  # zero-SNR leaves them no signal at all
OWN_TIMES = ("LCMScheduler", "TCDScheduler")  # whatever the spacing, from the last one on
Options = dict[str, Any]


class Row(NamedTuple):
    """What is particular about a class."""

    calls: Callable[[int, Options], int] = lambda n, options: n  # how often a run of n steps asks the network
    last: str = ""  # the last noise level, zero or sigma_min, where it is not the options that say so
    also: Mapping[str, Sequence[Any]] = {}  # further options of the grid
    fixed: Mapping[str, Any] = {}  # options that every run of the grid has
    beyond: int = 1  # noise levels that there are more of than evaluations
    perfect: bool = True  # the last step returns the predicted x0


def _pndm(n: int, options: Options) -> int:
    if options["skip_prk_steps"]:
        return n + 1 if n > 1 else n  # the second timestep is visited twice
    return n + 9  # three steps of four evaluations


def _twice(n: int, options: Options) -> int:
    return 2 * n - 1  # two evaluations per step, but one in the last


def _euler(n: int, options: Options) -> int:
    return n + (_one_more(options) and _tells_levels(options))  # it visits the level that is one more


DPM = {
    "algorithm_type": ("dpmsolver++", "dpmsolver", "sde-dpmsolver++"),
    "solver_order": (1, 2, 3),
    "solver_type": ("midpoint", "heun"),
    "lower_order_final": (True, False),
}
EULER = {"interpolation_type": ("linear", "log_linear"), "timestep_type": ("discrete", "continuous")}
EDM = {
    "sigma_schedule": ("karras", "exponential"),
    "sigma_data": (0.5, 1.0),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
}
LONG = {"original_inference_steps": T}  # so that LCM and TCD can be asked for any number of steps
UNCLIPPED = {"clip_sample": False}

CLASSES = {
    "DDIMScheduler": Row(fixed=UNCLIPPED),
    "DDPMScheduler": Row(fixed=UNCLIPPED),
    "DEISMultistepScheduler": Row(last="sigma_min", also={"solver_order": (1, 2, 3)}),
    "DPMSolverMultistepScheduler": Row(also={**DPM, "euler_at_final": (False, True)}),
    "DPMSolverSinglestepScheduler": Row(also=DPM),
    "EDMDPMSolverMultistepScheduler": Row(also=DPM | EDM | {"euler_at_final": (False, True)}),
    "EDMEulerScheduler": Row(also={name: EDM[name] for name in ("sigma_schedule", "sigma_data")}),
    "EulerAncestralDiscreteScheduler": Row(),
    "EulerDiscreteScheduler": Row(_euler, also=EULER),
    "HeunDiscreteScheduler": Row(_twice),
    "KDPM2AncestralDiscreteScheduler": Row(_twice, beyond=3),
    "KDPM2DiscreteScheduler": Row(_twice, beyond=3),
    "LCMScheduler": Row(last="zero", fixed=UNCLIPPED | LONG, perfect=False),
    "LMSDiscreteScheduler": Row(),
    "PNDMScheduler": Row(_pndm, perfect=False),
    "TCDScheduler": Row(last="zero", fixed=UNCLIPPED | LONG, perfect=False),
    "UniPCMultistepScheduler": Row(
        also={
            "solver_order": (1, 2, 3),
            "solver_type": ("bh1", "bh2"),
            "predict_x0": (True, False),
            "lower_order_final": (True, False),
        }
    ),
}


def refusals(kind: str, options: Options, n: int) -> list[str]:
    """Return what is said (as patterns) of a run that cannot be, [] if it can."""
    said = []
    predicts_x0 = options.get("predict_x0", options.get("algorithm_type", "++").endswith("++"))
    if not predicts_x0 and options["prediction_type"] == "flow_prediction":
        said.append("prediction_type='flow_prediction'")
    if "algorithm_type" in options and not predicts_x0 and options["final_sigmas_type"] == "zero":
        said.append("cannot reach final_sigmas_type='zero'")
    if kind.startswith("EDM") and options.get("solver_order") == 3 and options["algorithm_type"].startswith("sde"):
        said.append("solver_order=3")
    if not options.get("skip_prk_steps", True) and n < 4:
        said.append("needs at least 4 inference steps")
    own_spacing = options.get("timestep_spacing") if options["spaced_by"] is None else None
    if own_spacing == "leading" and n == T and kind in ONE_MORE:
        said.append("room for at most 999 steps")
    blind = options["prediction_type"] == "epsilon" and options.get("rescale_betas_zero_snr")
    if (
        blind
        and kind in PURE_NOISE
        and (kind in OWN_TIMES or noise_schedule.spaced_timesteps(own_spacing, n, T)[0] == T - 1)
    ):
        said.append("no signal at the last training timestep")
    return said


def grid_of(kind: str) -> dict[str, Sequence[Any]]:
    """Return the options of a class's grid and their values."""
    cls, row = getattr(minidiff, kind), CLASSES[kind]
    parameters = inspect.signature(cls.__init__).parameters
    grid = {name: values for name, values in AXES.items() if name in parameters}
    spaced_by = (None, *(name for name in SPACED_BY if name in parameters))
    return {**grid, "prediction_type": cls.prediction_types, "spaced_by": spaced_by, **row.also}


def every_option(kind: str) -> Iterator[Options]:
    """Yield every combination of a class's grid."""
    grid = grid_of(kind)
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def some_options(kind: str, count: int) -> list[Options]:
    """Return ``count`` random combinations of it, the same ones each time, or all if there are fewer."""
    options = list(every_option(kind))
    return random.Random(kind).sample(options, min(count, len(options)))


def build(kind: str, options: Options) -> Any:
    """Make the scheduler; the grid's ``spaced_by`` is a switch."""
    options = CLASSES[kind].fixed | options
    switch = options.pop("spaced_by")
    return getattr(minidiff, kind)(**options, **({switch: True} if switch else {}))


def turns(kind: str, options: Options, n: int) -> bool:
    """Say whether the noise levels go up at one place, which is the reference's doing in three cases.

    Zero-SNR rescaling replaces the last training level, infinite, by 4096; the one before it is 15,406, and a run of
    nearly all timesteps visits both. A flow may end below the ``sigma_min`` of the training schedule. And EDM's levels
    come down to sigma_min by float32 powers, which may miss the sigma_min that is the level after the last step.
    """
    both = n >= 999 and options.get("rescale_betas_zero_snr") and options["spaced_by"] is None
    flow = options["spaced_by"] == "use_flow_sigmas" and options.get("final_sigmas_type", "sigma_min") == "sigma_min"
    powers = kind == "EDMDPMSolverMultistepScheduler" and options["final_sigmas_type"] == "sigma_min"
    return both or powers or (flow and n >= 60)


def stops_early(options: Options) -> bool:
    """Say whether there is one noise level more than the run visits, as in the reference: log_linear interpolation."""
    return _one_more(options) and not _tells_levels(options)


def _one_more(options: Options) -> bool:
    return options.get("interpolation_type") == "log_linear" and options["spaced_by"] is None


def _tells_levels(options: Options) -> bool:
    return options["timestep_type"] == "continuous" and options["prediction_type"] == "v_prediction"


def check_plan(kind: str, options: Options, n: int) -> Any:
    """Check what must hold of the plan of n steps; return scheduler and plan, or None where it has to be refused."""
    said = refusals(kind, options, n)
    if said:
        with pytest.raises((ConfigError, ValueError), match=said[0]):
            build(kind, options).plan(n)
        return None
    scheduler = build(kind, options)
    plan = scheduler.plan(n)
    calls = CLASSES[kind].calls(n, options)
    unvisited = stops_early(options)
    assert len(plan.timesteps) == len(plan.times) == len(plan.coefficients) == calls
    assert len(plan.sigmas) == calls + CLASSES[kind].beyond + unvisited
    assert plan.timesteps.isfinite().all() and all(map(math.isfinite, _numbers(plan.coefficients)))
    sigmas = plan.sigmas.double()
    trained = getattr(scheduler, "alphas_cumprod", torch.ones(1))  # EDM has no table of betas
    first_is_pure_noise = trained[-1] == 0 and plan.times[0] == T - 1
    assert sigmas[first_is_pure_noise:].isfinite().all()
    levels = sigmas.unique_consecutive()
    assert (levels.diff() < 0).all() or turns(kind, options, n)
    if n <= 100 and options.get("skip_prk_steps", True):  # more steps round to equal timesteps; Runge-Kutta has halves
        assert n <= len(levels) - _one_more(options) <= n + 1
    _check_last(kind, options, scheduler, sigmas)
    return scheduler, plan


def _check_last(kind: str, options: Options, scheduler: Any, sigmas: Tensor) -> None:
    by_options = options.get("final_sigmas_type", "zero" if options.get("set_alpha_to_one", True) else "sigma_min")
    last = CLASSES[kind].last or by_options
    if last == "zero":
        assert sigmas[-1] == 0
    else:  # the smallest training level; or the last that was visited is repeated
        smallest = scheduler.config.sigma_min if kind.startswith("EDM") else float(scheduler._training_sigmas()[0])
        assert sigmas[-1] in (pytest.approx(smallest, rel=1e-4), sigmas[-2])


def _numbers(step: Any) -> Iterator[float]:
    if isinstance(step, int | float | Tensor):
        yield float(step)
    elif isinstance(step, tuple):
        for part in step:
            yield from _numbers(part)


def check_runs(kind: str, options: Options, scheduler: Any, plan: Any) -> float:
    """Check that a run with a network is finite; return how far a perfect denoiser ends from its picture."""
    assert run(scheduler, plan, lambda i, x: network(x, plan.times[i])).isfinite().all()
    picture = noise().flip(0).clamp(-1, 1)
    end = run(scheduler, plan, lambda i, x: perfect(scheduler, plan, i, x, picture))
    assert end.isfinite().all()
    return (end - picture).abs().max().item() if _ends_at_x0(kind, options, plan) else 0.0


def _ends_at_x0(kind: str, options: Options, plan: Any) -> bool:
    """Say whether the last step returns the predicted x0 itself, so that nothing before it matters.

    Solvers that predict eps divide by the signal of the first step; DDIM's stride is T // n whatever the spacing, as in
    the reference, so its last step may end above timestep 0 in a trailing run whose n does not divide T.
    """
    if stops_early(options):
        return False
    if kind == "DDIMScheduler" and plan.times[-1] >= T // plan.num_inference_steps:
        return False
    return plan.sigmas[-1] == 0 and CLASSES[kind].perfect and options.get("predict_x0", True)


def run(scheduler: Any, plan: Any, denoise: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Sample with the pure core; the network is given the step's index and what it is shown."""
    generator = torch.Generator().manual_seed(1)
    x, past = noise() * plan.init_noise_sigma, ()
    for i in range(len(plan.coefficients)):
        out = denoise(i, scheduler.scale_input(plan, i, x))
        x, past = scheduler.advance(plan, i, x, out, past, scheduler.draw_noise(plan, i, x, generator))
    return x


def perfect(scheduler: Any, plan: Any, i: int, x: Tensor, picture: Tensor) -> Tensor:
    """Return the output that means ``picture``, whatever the network predicts: x0 = a x + b out, solved for out."""
    y = x * plan.coefficients[i].level.scale if hasattr(plan.coefficients[i], "level") else x
    a_x = scheduler.denoised(plan, i, y, torch.zeros_like(y))
    b = scheduler.denoised(plan, i, torch.zeros_like(y), torch.ones_like(y))
    return (picture - a_x) / b
