"""What every scheduler class has in common with the reference, or has not, with its defaults."""

import inspect

import pytest
import torch

import minidiff
from tests.schedulers.options import SPACINGS, TRAINED_BETAS
from tests.schedulers.runs import check_same_run, error, name, network, noise
from tests.theirs import diffusers

KINDS = [name for name in minidiff.__all__ if name.endswith("Scheduler")]
# Before set_timesteps these look up a training timestep in tables that run in opposite directions.
MIRRORED = {
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
}
OF_TRAINING = [  # fields that all of them have
    {"trained_betas": TRAINED_BETAS},
    {"beta_start": 0.00085},
    {"beta_end": 0.012},
    {"num_train_timesteps": 500},
]


def pair(kind: str) -> tuple:
    return getattr(minidiff, kind)(), getattr(diffusers, kind)()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_precision(kind, dtype):
    """Bit for bit: the same operations, on scalars that are rounded where the reference's are."""
    ours, theirs = pair(kind)
    check_same_run(ours, theirs, 6, dtype, seeded="generator" in inspect.signature(theirs.step).parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_of_training(kind):
    """Four classes of the reference add the noise of timestep T - 1 - t; ours is that of t, as DDPM's is."""
    ours, theirs = pair(kind)
    clean, eps, t = noise(batch=3), network(noise(batch=3), 0), torch.tensor([0, 17, 999])
    t = theirs.timesteps[t] if kind.startswith("EDM") else t  # times are log(sigma) / 4 there
    if kind not in MIRRORED:
        assert torch.equal(ours.add_noise(clean, eps, t), theirs.add_noise(clean, eps, t))
        return
    assert error(ours.add_noise(clean, eps, 999 - t), theirs.add_noise(clean, eps, t)) < 1e-8  # measured 5e-10
    assert torch.equal(ours.add_noise(clean, eps, t), minidiff.DDPMScheduler().add_noise(clean, eps, t))


@pytest.mark.parametrize("options", [{}, *OF_TRAINING], ids=name)
@pytest.mark.parametrize("kind", ["DDPMScheduler", "PNDMScheduler", "UniPCMultistepScheduler"])
def test_options_of_training(kind, options):
    if kind == "DDPMScheduler":
        options = options | {"clip_sample": False}
    ours, theirs = getattr(minidiff, kind)(**options), getattr(diffusers, kind)(**options)
    for steps in (20, 50):
        check_same_run(ours, theirs, steps, seeded=kind == "DDPMScheduler")


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("kind", ["DDPMScheduler", "PNDMScheduler", "UniPCMultistepScheduler"])
def test_timesteps_of_every_count(kind, spacing, offset):
    options = {"timestep_spacing": spacing, "steps_offset": offset}
    if kind == "PNDMScheduler":
        options["skip_prk_steps"] = True
    ours, theirs = getattr(minidiff, kind)(**options), getattr(diffusers, kind)(**options)
    one_too_many = 0
    for steps in (*range(1, 24), 60, 61, 103, 121, 122, 201, 333):
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
        expected = theirs.timesteps
        if expected.min() < 0:  # the reference asks the network about timestep -1, one step more than it was told to do
            one_too_many += 1
            if kind != "PNDMScheduler":
                assert expected[-1] == -1 and len(expected) == steps + 1
                expected = expected[:-1]
        if kind == "PNDMScheduler" and theirs.timesteps.min() < 0:
            assert ours.timesteps[-1] >= 0 and len(ours.timesteps) == steps + 1
            continue
        assert torch.equal(ours.timesteps, expected), steps
    assert one_too_many == (5 if spacing == "trailing" else 0)  # 61, 103, 121, 122, 201
