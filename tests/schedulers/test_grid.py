"""The laws of ``grid.py`` on a sample of every class's grid; ``benchmarks/scheduler_grid.py`` takes it whole."""

import inspect

import pytest

import minidiff
from tests.schedulers.grid import CLASSES, COUNTS, T, build, check_plan, check_runs, every_option, grid_of, some_options
from tests.schedulers.runs import by_hand, pairwise

SCHEDULERS = [name for name in minidiff.__all__ if name.endswith("Scheduler")]
FEW_STEPS = (1, 2, 3, 7, 24)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_runs_of_every_class(kind):
    worst, checked = 0.0, 0
    for options in pairwise(grid_of(kind) | {"steps": FEW_STEPS}):
        n = options.pop("steps")
        checked_plan = check_plan(kind, options, n)
        if checked_plan is not None:
            worst = max(worst, check_runs(kind, options, *checked_plan))
            checked += 1
    assert checked > 10
    # Measured 4e-10 for DDPM, whose x0 has a coefficient of 1 - 4e-10; 3e-7 for LMS, whose weights are integrals of
    # float32 functions and add up to its last step only to 1e-8 of it; 4e-13 for the others.
    assert worst < (1e-6 if kind == "LMSDiscreteScheduler" else 1e-8)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_long_runs_of_every_class(kind):
    for options, n in zip(some_options(kind, 3), COUNTS[60:], strict=False):
        check_plan(kind, options, n)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_timesteps_that_repeat(kind):
    """The step index is the clock, so a run over nearly all timesteps, some of them twice, gets to its end."""
    options = next(o for o in every_option(kind) if check_plan(kind, o, T) is not None)
    scheduler = build(kind, options)
    way = by_hand(scheduler, T, seeded="generator" in inspect.signature(scheduler.step).parameters)
    assert way.isfinite().all() and scheduler.step_index == len(scheduler.timesteps)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_zero_snr_is_finite_or_refused(kind):
    """Its first step is where nothing is left of the signal."""
    if not any(options.get("rescale_betas_zero_snr") for options in every_option(kind)):
        return
    spacing = {"timestep_spacing": "trailing"} if "timestep_spacing" in next(every_option(kind)) else {}
    for prediction in getattr(minidiff, kind).prediction_types[:3]:
        options = next(every_option(kind)) | {"rescale_betas_zero_snr": True, "prediction_type": prediction} | spacing
        for n in (*FEW_STEPS, 999):
            check_plan(kind, options, n)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"])
def test_a_flow_that_ends_below_the_last_level_is_finite(kind, algorithm):
    options = next(every_option(kind)) | {"spaced_by": "use_flow_sigmas", "final_sigmas_type": "sigma_min"}
    assert check_plan(kind, options | {"algorithm_type": algorithm}, 200) is not None


def test_every_scheduler_has_a_row():
    assert set(SCHEDULERS) <= set(CLASSES)
