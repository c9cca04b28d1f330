"""DDIM against the reference, over whole trajectories with any two options together."""

import pytest
import torch

import minidiff
from tests.schedulers.options import SCHEDULES, pairs
from tests.schedulers.runs import check_same_run, name, network, noise
from tests.theirs import diffusers

STEP_OPTIONS = [
    {},
    {"eta": 0.4},
    {"eta": 1.0},
    {"use_clipped_model_output": True},
    {"eta": 0.7, "use_clipped_model_output": True},
]


def pair(options: dict) -> tuple:
    return minidiff.DDIMScheduler(**options), diffusers.DDIMScheduler(**options)


@pytest.mark.parametrize("options", pairs("DDIMScheduler", how=STEP_OPTIONS), ids=name)
def test_options(options):
    options = dict(options)
    how = options.pop("how")
    for steps in (1, 3, 7):
        check_same_run(*pair(options), steps, seeded=True, **how)


def test_many_steps():
    for steps in (2, 20, 50):
        check_same_run(*pair({"clip_sample": False, "beta_start": 0.00085, "beta_end": 0.012}), steps)


@pytest.mark.parametrize("how", STEP_OPTIONS, ids=name)
def test_draws_and_predicted_sample(how):
    results = []
    for scheduler in pair({}):
        scheduler.set_timesteps(7)
        x, generator = noise(), torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            x, x0 = scheduler.step(network(x, t), t, x, generator=generator, return_dict=False, **how)
        results.append((x, x0, generator.get_state()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][2], results[1][2])


def test_all_of_the_noise_and_none_of_the_signal():
    """In the first step the predicted eps has no part left; the reference takes the root of -6e-8 there."""
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    for schedule in SCHEDULES:
        scheduler = minidiff.DDIMScheduler(**options, beta_schedule=schedule)
        for steps in range(1, 60):
            first = scheduler.plan(steps, eta=1.0).coefficients[0]
            assert 0 <= first.to_eps < 1e-3


def test_given_noise():
    ways = []
    for scheduler in pair({}):
        scheduler.set_timesteps(5)
        ways.append(
            scheduler.step(network(noise(), 1), 800, noise(), eta=0.5, variance_noise=noise().flip(0)).prev_sample
        )
    assert torch.equal(*ways)
    with pytest.raises(ValueError, match="not both"):
        scheduler, _ = pair({})
        scheduler.set_timesteps(5)
        scheduler.step(noise(), 800, noise(), eta=0.5, generator=torch.Generator(), variance_noise=noise())


def test_noising_and_velocity():
    ours, theirs = pair({})
    clean, eps, t = noise(batch=3), network(noise(batch=3), 0), torch.tensor([0, 17, 999])
    assert torch.equal(ours.add_noise(clean, eps, t), theirs.add_noise(clean, eps, t))
    assert torch.equal(ours.get_velocity(clean, eps, t), theirs.get_velocity(clean, eps, t))


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_eta_has_a_range(eta):
    with pytest.raises(ValueError, match=f"eta should lie between 0 .* found {eta}"):
        minidiff.DDIMScheduler().plan(5, eta=eta)
