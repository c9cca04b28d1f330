"""DDPM against the reference, over whole trajectories with any two options together."""

import pytest
import torch

import minidiff
from tests.schedulers.options import LEARNED, pairs
from tests.schedulers.runs import check_same_run, name, network, network_with_variance, noise
from tests.theirs import diffusers


def pair(options: dict) -> tuple:
    return minidiff.DDPMScheduler(**options), diffusers.DDPMScheduler(**options)


def denoiser(options: dict):
    return network_with_variance if options.get("variance_type") in LEARNED else network


@pytest.mark.parametrize("options", pairs("DDPMScheduler"), ids=name)
def test_options(options):
    for steps in (1, 3, 7):
        check_same_run(*pair(options), steps, denoise=denoiser(options), seeded=True)


def test_predicts_the_clean_sample_too():
    ours, theirs = pair({"prediction_type": "v_prediction"})
    x, out = noise(), network(noise(), 500)
    mine, reference = ours.step(out, 500, x), theirs.step(out, 500, x)  # before set_timesteps: every training timestep
    assert torch.equal(mine.pred_original_sample, reference.pred_original_sample)
    ours.set_timesteps(10)
    assert torch.equal(ours.step(out, 500, x, return_dict=False)[1], reference.pred_original_sample)
    plan = ours.plan(10)
    assert torch.equal(ours.denoised(plan, plan.times.index(500), x, out), reference.pred_original_sample)


def test_without_set_timesteps_visits_every_training_timestep():
    ours, theirs = pair({"num_train_timesteps": 12})
    ways = []
    for scheduler in (ours, theirs):
        x, generator = noise(), torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, generator).prev_sample
        ways.append(x)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(*ways)


def test_draws_as_often_as_the_reference():
    states = []
    for scheduler in pair({}):
        scheduler.set_timesteps(7)
        x, generator = noise(), torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, generator).prev_sample
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_custom_timesteps():
    ours, theirs = pair({})
    ways = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=[900, 411, 30, 7])
        x, generator = noise(), torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), int(t), x, generator).prev_sample
        ways.append(x)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(*ways)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"beta_schedule": "scaled_linear"}, {"rescale_betas_zero_snr": True}], ids=name
)
def test_noising_and_velocity(options, dtype):
    ours, theirs = pair(options)
    clean, eps, t = noise(dtype, 4), network(noise(dtype, 4), 0), torch.tensor([0, 17, 500, 999])
    assert torch.equal(ours.add_noise(clean, eps, t), theirs.add_noise(clean, eps, t))
    assert torch.equal(ours.get_velocity(clean, eps, t), theirs.get_velocity(clean, eps, t))
