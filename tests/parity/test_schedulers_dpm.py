"""DPM-Solver against the reference, option by option, over whole trajectories."""

import pytest
import torch
from scheduler_runs import (
    STEPS,
    InDouble,
    by_hand,
    combinations,
    error,
    name,
    network,
    network_with_variance,
    noise,
    one_by_one,
)
from theirs import diffusers

import minidiff

MULTI = "DPMSolverMultistepScheduler"
SHARED = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "trained_betas": [None, torch.linspace(0.001, 0.03, 1000).tolist()],
    "solver_order": [1, 2, 3],
    "prediction_type": ["epsilon", "sample", "v_prediction", "flow_prediction"],
    "thresholding": [False, True],
    "dynamic_thresholding_ratio": [0.995, 0.6],
    "sample_max_value": [1.0, 1.7],
    "solver_type": ["midpoint", "heun", "logrho", "bh1", "bh2"],
    "lower_order_final": [True, False],
    "flow_shift": [1.0, 3.0],
    "final_sigmas_type": ["zero", "sigma_min"],
    "lambda_min_clipped": [-float("inf"), -5.1],
    "variance_type": [None, "learned", "learned_range"],
}
SPACED_BY = [None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas"]
SINGLE = "DPMSolverSinglestepScheduler"
GRIDS = {
    SINGLE: SHARED | {"algorithm_type": ["dpmsolver++", "dpmsolver", "sde-dpmsolver++"], "spaced_by": SPACED_BY},
    MULTI: SHARED
    | {
        "algorithm_type": ["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver", "deis"],
        "euler_at_final": [False, True],
        "spaced_by": [*SPACED_BY, "use_lu_lambdas"],
        "timestep_spacing": ["linspace", "leading", "trailing"],
        "steps_offset": [0, 1],
        "rescale_betas_zero_snr": [False, True],
    },
}


def spell(options: dict) -> dict:
    """Turn the grid's ``spaced_by`` into the reference's switches."""
    options = dict(options)
    switch = options.pop("spaced_by", None)
    return options | ({switch: True} if switch else {})


def predicts_x0(options: dict) -> bool:
    return options.get("algorithm_type", "dpmsolver++").endswith("++")


def complete(options: dict) -> dict:
    """Add what a single option needs to be accepted."""
    if not predicts_x0(options):
        options = options | {"final_sigmas_type": "sigma_min"}
    return spell(options)


def valid(options: dict) -> bool:
    """Leave out what the reference refuses, or what is NaN in it."""
    if not predicts_x0(options):
        if options["final_sigmas_type"] == "zero":
            return False
        if options["prediction_type"] == "flow_prediction" and options["algorithm_type"] != "deis":
            return False
        if options["algorithm_type"] == "sde-dpmsolver" and options["solver_order"] == 3:
            return False
    if options["thresholding"] and "euler_at_final" not in options and not predicts_x0(options):
        return False  # the reference fails here: its singlestep solver looks for a timestep that it was not given
    if options["variance_type"] and options["prediction_type"] != "epsilon":
        return False
    # Karras, exponential, beta and Lu sigmas end at sigma_min already: the last transition has length 0, and the
    # coefficients of Heun's method and of order 3 are 0 / 0.
    respaced = options["spaced_by"] and options["spaced_by"] != "use_flow_sigmas"
    ends_low = options.get("euler_at_final") or options["final_sigmas_type"] == "zero"
    return not (respaced and not ends_low and (options["solver_type"] == "heun" or options["solver_order"] == 3))


def pair(kind: str, options: dict) -> tuple:
    theirs = getattr(diffusers, kind)(**options)
    return getattr(minidiff, kind)(**options), InDouble(theirs) if kind == MULTI else theirs


# Noise is given, not drawn, because in double the reference would draw other numbers; test_draws compares draws.
BOUND = 1e-11  # worst measured: 2e-12


def difference(kind: str, options: dict, schedulers: tuple, steps: int, **how) -> float:
    learned = options.get("variance_type") in ("learned", "learned_range")
    how |= {"given_noise": True} if kind == MULTI else {"seeded": True}
    how |= {"denoise": network_with_variance if learned else network}
    ours, theirs = (by_hand(scheduler, steps, **how) for scheduler in schedulers)
    assert torch.equal(schedulers[0].timesteps, schedulers[1].timesteps)
    assert torch.equal(schedulers[0].sigmas, schedulers[1].sigmas)
    return error(ours, theirs)


@pytest.mark.parametrize("kind, options", [(k, o) for k, grid in GRIDS.items() for o in one_by_one(grid)], ids=name)
def test_option(kind, options):
    options = complete(options)
    for steps in STEPS:  # new schedulers each time: a run of the reference's singlestep solver may change its options
        assert difference(kind, options, pair(kind, options), steps) < BOUND


@pytest.mark.parametrize(
    "kind, options", [(k, o) for k, g in GRIDS.items() for o in combinations(g, 60, valid)], ids=name
)
def test_options_together(kind, options):
    options = spell(options)
    for steps, start in ((3, 0), (20, 0), (7, 2)):
        assert difference(kind, options, pair(kind, options), steps, start=start) < BOUND


@pytest.mark.parametrize(
    "kind, algorithm", [(SINGLE, "sde-dpmsolver++"), (MULTI, "sde-dpmsolver++"), (MULTI, "sde-dpmsolver")]
)
def test_draws(kind, algorithm):
    options = {"algorithm_type": algorithm, "final_sigmas_type": "sigma_min"}
    results = []
    for library in (minidiff, diffusers):
        scheduler, generator = getattr(library, kind)(**options), torch.Generator().manual_seed(1)
        scheduler.set_timesteps(7)
        x = noise(torch.float32)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, generator=generator).prev_sample
        results.append((x, generator.get_state()))
    assert error(results[0][0], results[1][0]) < 1e-6  # measured 3e-7
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("kind", GRIDS)
def test_custom_timesteps(kind):
    ways = []
    for scheduler in pair(kind, {}):
        scheduler.set_timesteps(timesteps=[900, 411, 30, 8])
        x = noise()
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x).prev_sample
        ways.append(x)
        assert scheduler.timesteps.tolist() == [900, 411, 30, 8]
    assert error(*ways) < BOUND


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.float16, 6e-3), (torch.bfloat16, 4e-2)])
def test_lower_precision(kind, dtype, limit):
    ways = [by_hand(getattr(library, kind)(), 20, dtype=dtype) for library in (minidiff, diffusers)]
    assert error(*ways) < limit


@pytest.mark.parametrize("kind", GRIDS)
def test_noising_to_a_step(kind):
    ours, theirs = pair(kind, {})
    clean, eps = noise(batch=3), network(noise(batch=3), 0)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    t = ours.timesteps[[2, 5, 9]]
    assert torch.equal(ours.add_noise(clean, eps, t), theirs.add_noise(clean, eps, t))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"algorithm_type": "dpmsolver"}, "cannot reach final_sigmas_type='zero'"),
        ({"algorithm_type": "dpmsolver3"}, "algorithm_type='dpmsolver3'"),
        ({"solver_type": "euler"}, "solver_type='euler'"),
        ({"solver_order": 4}, "solver_order=4"),
        ({"use_flow_sigmas": True, "use_karras_sigmas": True}, "use_flow_sigmas cannot be combined"),
        ({"use_beta_sigmas": True, "use_karras_sigmas": True}, "exclude each other"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
        ({"variance_type": "big"}, "variance_type='big'"),
    ],
)
@pytest.mark.parametrize("kind", GRIDS)
def test_refused(kind, options, words):
    with pytest.raises(ValueError, match=words):
        getattr(minidiff, kind)(**options)


def test_there_is_no_third_order_with_noise_in_eps():
    with pytest.raises(ValueError, match="solver_order=3"):
        minidiff.DPMSolverMultistepScheduler(
            algorithm_type="sde-dpmsolver", solver_order=3, final_sigmas_type="sigma_min"
        )


def test_timesteps_or_levels():
    scheduler = minidiff.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    with pytest.raises(ValueError, match="timesteps= cannot be combined"):
        scheduler.set_timesteps(timesteps=[5, 1])
