"""What every scheduler class has in common with the reference, or has not, with its defaults."""

import inspect

import pytest
import torch
from scheduler_runs import check_same_run, error, network, noise
from theirs import diffusers

import minidiff

KINDS = [name for name in minidiff.__all__ if name.endswith("Scheduler")]
# Before set_timesteps these look up a training timestep in tables that run in opposite directions.
MIRRORED = {
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
}


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
    if kind not in MIRRORED:
        assert torch.equal(ours.add_noise(clean, eps, t), theirs.add_noise(clean, eps, t))
        return
    assert error(ours.add_noise(clean, eps, 999 - t), theirs.add_noise(clean, eps, t)) < 1e-8  # measured 5e-10
    assert torch.equal(ours.add_noise(clean, eps, t), minidiff.DDPMScheduler().add_noise(clean, eps, t))
