"""DEIS against the reference, over whole trajectories with any two options together."""

import pytest
import torch
from scheduler_runs import check_same_run, name, pairwise
from theirs import diffusers

import minidiff

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


@pytest.mark.parametrize("options", pairwise(GRID), ids=name)
def test_options(options):
    for steps, start in ((1, 0), (3, 0), (15, 0), (7, 2)):  # from 15 steps on the order stays at the end
        check_same_run(*pair(options), steps, start=start)


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
