"""Base and refiner of SDXL share one run: wherever it is cut, the steps of the two halves are those of the whole."""

import pytest

import minidiff
from minidiff.pipelines.strength import cut_timestep, steps_until, take_over

SCHEDULERS = [name for name in minidiff.__all__ if name.endswith("Scheduler") and not name.startswith("EDM")]
FIELDS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "skip_prk_steps": True,
}
CUTS = [k / 23 for k in range(1, 23)] + [0.2, 0.499, 0.5, 0.501, 0.75, 0.8]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_two_halves_are_the_run(name: str) -> None:
    """Solvers with two evaluations per step begin a step that was cut between them anew."""
    scheduler = getattr(minidiff, name).from_config(FIELDS)
    whole_cuts = 0
    for count in (1, 2, 5, 26):
        plan = scheduler.plan(count)
        for cut in CUTS:
            t = cut_timestep(scheduler, cut)
            if plan.times[0] < t:
                with pytest.raises(ValueError, match=f"denoising_end={cut} leaves nothing to do"):
                    steps_until(scheduler, plan, cut)
                continue
            stop = steps_until(scheduler, plan, cut)
            if plan.times[-1] >= t:
                assert stop == len(plan.times)
                with pytest.raises(ValueError, match=f"denoising_start={cut} of {count} steps leaves no step"):
                    take_over(scheduler, plan, cut)
                continue
            start = take_over(scheduler, plan, cut).start
            assert all(time >= t for time in plan.times[:stop]) and all(time < t for time in plan.times[stop:])
            assert start == stop - stop % scheduler.order, (count, cut)  # the beginning of a step
            whole_cuts += start == stop
    assert whole_cuts > 30 or scheduler.order == 2


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_a_whole_run_needs_no_cut(name: str) -> None:
    scheduler = getattr(minidiff, name).from_config(FIELDS)
    plan = scheduler.plan(10)
    assert steps_until(scheduler, plan, None) is None and steps_until(scheduler, plan, 1.0) is None
