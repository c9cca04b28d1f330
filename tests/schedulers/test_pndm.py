"""PNDM against the reference, over whole trajectories with any two options together."""

import pytest
import torch

import minidiff
from tests.schedulers.options import pairs
from tests.schedulers.runs import check_same_run, name, network, noise
from tests.theirs import diffusers


def pair(options: dict) -> tuple:
    return minidiff.PNDMScheduler(**options), diffusers.PNDMScheduler(**options)


@pytest.mark.parametrize("options", pairs("PNDMScheduler"), ids=name)
def test_options(options):
    for steps in (1, 2, 3, 7, 20) if options["skip_prk_steps"] else (4, 5, 7, 20):
        check_same_run(*pair(options), steps)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("start", [1, 2, 5])
def test_begins_in_the_middle(skip, start):
    check_same_run(*pair({"skip_prk_steps": skip}), 20, start=start)


def test_noising_with_pndm():
    clean, eps, t = noise(batch=3), network(noise(batch=3), 0), torch.tensor([0, 17, 999])
    ours, theirs = minidiff.PNDMScheduler(), diffusers.PNDMScheduler()
    assert torch.equal(ours.add_noise(clean, eps, t), theirs.add_noise(clean, eps, t))
