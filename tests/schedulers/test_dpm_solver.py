"""DPM-Solver against the reference, over whole trajectories with any two options together."""

import pytest
import torch

import minidiff
from tests.schedulers.options import LEARNED, pairs, spell
from tests.schedulers.runs import check_same_run, name, network, network_with_variance, noise
from tests.theirs import diffusers

MULTI, SINGLE = KINDS = ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"]


def pair(kind: str, options: dict) -> tuple:
    return getattr(minidiff, kind)(**options), getattr(diffusers, kind)(**options)


@pytest.mark.parametrize("kind, options", [(k, o) for k in KINDS for o in pairs(k)], ids=name)
def test_options(kind, options):
    denoise = network_with_variance if options["variance_type"] in LEARNED else network
    for steps, start in ((1, 0), (3, 0), (15, 0), (7, 2)):  # from 15 steps on the order stays at the end
        # New ones each time: a run of the reference's singlestep solver may change its options.
        check_same_run(*pair(kind, spell(options)), steps, start=start, seeded=True, denoise=denoise)


@pytest.mark.parametrize("kind", KINDS)
def test_many_steps(kind):
    for steps in (2, 20, 50):
        check_same_run(*pair(kind, {"beta_start": 0.00085, "beta_end": 0.012, "solver_order": 3}), steps)


@pytest.mark.parametrize("algorithm", ["sde-dpmsolver++", "sde-dpmsolver"])
def test_given_noise(algorithm):
    how = {"algorithm_type": algorithm, "final_sigmas_type": "sigma_min"}
    check_same_run(*pair(MULTI, how), 7, given_noise=True)


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
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("kind", KINDS)
def test_custom_timesteps(kind):
    ways = []
    for scheduler in pair(kind, {}):
        scheduler.set_timesteps(timesteps=[900, 411, 30, 8])
        x = noise(torch.float32)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x).prev_sample
        ways.append(x)
        assert scheduler.timesteps.tolist() == [900, 411, 30, 8]
    assert torch.equal(*ways)


@pytest.mark.parametrize("kind", KINDS)
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
@pytest.mark.parametrize("kind", KINDS)
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
