"""The laws of ``laws.grid`` on a sample of every class's grid; ``benchmarks/scheduler_grid.py`` takes it whole."""

import inspect
import random

import pytest
import torch
from laws.grid import CLASSES, COUNTS, T, build, check_plan, check_runs, every_option, some_options
from scheduler_runs import by_hand, through_core

import minidiff

SCHEDULERS = [name for name in minidiff.__all__ if name.endswith("Scheduler")]
SAMPLE = 24  # combinations of options per class
ALL_TIMESTEPS = (999, 1000)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_runs_of_every_class(kind):
    source, worst, checked = random.Random(kind), 0.0, 0
    for options in some_options(kind, SAMPLE):
        for n in {1, 2, 3, *source.sample(COUNTS[3:60], 2)}:
            checked_plan = check_plan(kind, options, n)
            if checked_plan is not None:
                worst = max(worst, check_runs(kind, options, *checked_plan))
                checked += 1
    assert checked > 20
    assert worst < 1e-8  # measured 4e-10 for DDPM, whose x0 has a coefficient of 1 - 4e-10; 4e-13 for the others


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_long_runs_of_every_class(kind):
    for options in some_options(kind, 3):
        for n in COUNTS[60:]:
            check_plan(kind, options, n)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_timesteps_that_repeat(kind):
    """The step index is the clock, so a run over nearly all timesteps, some of them twice, gets to its end."""
    options = next(o for o in every_option(kind) if check_plan(kind, o, T) is not None)
    scheduler = build(kind, options)
    way = by_hand(scheduler, T, seeded="generator" in inspect.signature(scheduler.step).parameters)
    assert way.isfinite().all() and torch.equal(way, through_core(scheduler, T))


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_zero_snr_is_finite_or_refused(kind):
    """Its first step is where nothing is left of the signal."""
    if not any(options.get("rescale_betas_zero_snr") for options in every_option(kind)):
        return
    spacing = {"timestep_spacing": "trailing"} if "timestep_spacing" in next(every_option(kind)) else {}
    for prediction in getattr(minidiff, kind).prediction_types[:3]:
        options = next(every_option(kind)) | {"rescale_betas_zero_snr": True, "prediction_type": prediction} | spacing
        for n in (*COUNTS[:20], *ALL_TIMESTEPS):
            check_plan(kind, options, n)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"])
def test_a_flow_that_ends_below_the_last_level_is_finite(kind, algorithm):
    options = next(every_option(kind)) | {"spaced_by": "use_flow_sigmas", "final_sigmas_type": "sigma_min"}
    assert check_plan(kind, options | {"algorithm_type": algorithm}, 200) is not None


def test_every_scheduler_has_a_row():
    assert set(SCHEDULERS) <= set(CLASSES)
