"""DEIS against the reference, option by option, over whole trajectories in float64."""

import pytest
import torch
from scheduler_runs import STEPS, by_hand, combinations, error, name, one_by_one
from theirs import diffusers

import minidiff

BOUND = 1e-10  # worst measured: see the comments at the asserts
GRID = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "trained_betas": [None, torch.linspace(0.001, 0.03, 1000).tolist()],
    "solver_order": [1, 2, 3],
    "prediction_type": ["epsilon", "sample", "v_prediction", "flow_prediction"],
    "thresholding": [False, True],
    "dynamic_thresholding_ratio": [0.995, 0.6],
    "sample_max_value": [1.0, 1.7],
    "algorithm_type": ["deis", "dpmsolver", "dpmsolver++"],
    "solver_type": ["logrho", "midpoint", "heun", "bh1", "bh2"],
    "lower_order_final": [True, False],
    "spaced_by": [None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas"],
    "flow_shift": [1.0, 3.0],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "steps_offset": [0, 1],
}


def pair(options: dict) -> tuple:
    options = dict(options)
    switch = options.pop("spaced_by", None)
    options |= {switch: True} if switch else {}
    return minidiff.DEISMultistepScheduler(**options), diffusers.DEISMultistepScheduler(**options)


def difference(schedulers: tuple, steps: int, start: int = 0) -> float:
    ours, theirs = (by_hand(scheduler, steps, start=start) for scheduler in schedulers)
    assert torch.equal(schedulers[0].timesteps, schedulers[1].timesteps)
    assert torch.equal(schedulers[0].sigmas, schedulers[1].sigmas)
    return error(ours, theirs)


@pytest.mark.parametrize("options", one_by_one(GRID), ids=name)
def test_option(options):
    for steps in STEPS:
        assert difference(pair(options), steps) < BOUND


@pytest.mark.parametrize("options", combinations(GRID, 50, lambda _: True), ids=name)
def test_options_together(options):
    for steps, start in ((3, 0), (20, 0), (7, 2)):
        assert difference(pair(options), steps, start) < BOUND


@pytest.mark.parametrize(
    "options, words",
    [
        ({"algorithm_type": "ddim"}, "algorithm_type='ddim'"),
        ({"solver_type": "euler"}, "solver_type='euler'"),
        ({"solver_order": 4}, "solver_order=4"),
        ({"use_flow_sigmas": True, "use_karras_sigmas": True}, "use_flow_sigmas cannot be combined"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
    ],
)
def test_refused(options, words):
    with pytest.raises(ValueError, match=words):
        minidiff.DEISMultistepScheduler(**options)
