"""LCM and TCD against the reference, over whole trajectories with any two options together."""

import pytest
import torch

import minidiff
from tests.schedulers.options import pairs, spell
from tests.schedulers.runs import check_same_run, name, network, noise
from tests.theirs import diffusers

KINDS = ["LCMScheduler", "TCDScheduler"]


def pair(kind: str, options: dict) -> tuple:
    return getattr(minidiff, kind)(**options), getattr(diffusers, kind)(**options)


@pytest.mark.parametrize("options", pairs("LCMScheduler"), ids=name)
@pytest.mark.parametrize("kind", KINDS)
def test_options(kind, options):
    for steps in (1, 2, 7):
        check_same_run(*pair(kind, spell(options)), steps, seeded=True)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_eta(eta):
    ours, theirs = pair("TCDScheduler", {})
    check_same_run(ours, theirs, 5, seeded=True, eta=eta)
    assert ours.wants_noise(ours.plan(5, eta=eta), 1) == (eta > 0)


@pytest.mark.parametrize(
    "given",
    [
        {"num_inference_steps": 4, "original_inference_steps": 40},
        {"num_inference_steps": 4, "strength": 0.6},
        {"num_inference_steps": 4, "original_inference_steps": 40, "strength": 0.6},
        {"timesteps": [999, 499, 19]},
        {"timesteps": [999, 759, 499, 259], "strength": 0.5},
    ],
    ids=name,
)
@pytest.mark.parametrize("kind", KINDS)
def test_ways_to_plan_a_run(kind, given):
    results = []
    for scheduler in pair(kind, {}):
        scheduler.set_timesteps(**given)
        x, generator = noise(), torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            x, second = scheduler.step(network(x, t), t, x, generator=generator, return_dict=False)
        results.append((x, second, scheduler.timesteps, generator.get_state()))
    for mine, reference in zip(*results, strict=True):
        assert torch.equal(mine, reference)


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_the_outputs_and_noising(kind):
    ours, theirs = pair(kind, {})
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
    t = ours.timesteps[0]
    mine, reference = ours.step(noise(), t, noise()), theirs.step(noise(), t, noise())
    assert list(mine.keys()) == list(reference.keys())
    clean, eps, t = noise(), network(noise(), 0), torch.tensor([17, 999])
    assert torch.equal(ours.add_noise(clean, eps, t), theirs.add_noise(clean, eps, t))
    assert torch.equal(ours.get_velocity(clean, eps, t), theirs.get_velocity(clean, eps, t))
    assert [one.__name__ for one in ours.compatibles] == [one.__name__ for one in theirs.compatibles]


@pytest.mark.parametrize(
    "given, words",
    [
        ({"num_inference_steps": 51}, "51 steps are more than the 50"),
        ({"num_inference_steps": 4, "strength": 0.0}, "strength should be above 0"),
        ({"num_inference_steps": 4, "original_inference_steps": 1001}, "original_inference_steps should lie in 1"),
    ],
)
def test_refused(given, words):
    with pytest.raises(ValueError, match=words):
        minidiff.LCMScheduler().set_timesteps(**given)


def test_eta_has_a_range():
    with pytest.raises(ValueError, match="eta should lie between 0"):
        minidiff.TCDScheduler().plan(4, eta=1.1)
