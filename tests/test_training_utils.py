"""The helpers of training programs against the reference's: averages, learning rates, weights of the loss, DREAM."""

import random
from pathlib import Path
from typing import Any

import diffusers.optimization
import diffusers.training_utils as theirs
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import minidiff
import minidiff.training_utils as ours
from minidiff.optimization import get_cosine_schedule_with_warmup, get_scheduler
from tests.tiny import UNET


def parameters() -> list[nn.Parameter]:
    shapes = [(3, 4), (5,), (2, 2)]
    rng = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=rng), requires_grad=k != 1) for k, shape in enumerate(shapes)]


OPTIONS = {
    "default": {},
    "warm-up": {"use_ema_warmup": True, "inv_gamma": 2.0, "power": 3 / 4},
    "late": {"update_after_step": 3, "decay": 0.9, "min_decay": 0.3},
    "foreach": {"foreach": True, "decay": 0.99},
    "foreach warm-up": {"foreach": True, "use_ema_warmup": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_average_is_bit_equal(name: str) -> None:
    averages = []
    for library in (ours, theirs):
        weights, rng = parameters(), torch.Generator().manual_seed(2)
        average = library.EMAModel(weights, **OPTIONS[name])
        for _ in range(12):
            for weight in weights:
                weight.data += torch.randn(weight.shape, generator=rng)
            average.step(weights)
        before = [weight.clone() for weight in weights]
        average.store(weights)
        average.copy_to(weights)
        averages.append([weight.clone() for weight in weights])
        average.restore(weights)
        assert all(map(torch.equal, before, weights))
        averages[-1] += [torch.tensor(average.get_decay(k)) for k in (0, 1, 5, 10_000, 10**6)]
        averages[-1] += [torch.tensor(average.cur_decay_value), torch.tensor(average.optimization_step)]
    assert all(map(torch.equal, *averages))


def test_state_both_ways() -> None:
    average = ours.EMAModel(parameters(), decay=0.5, update_after_step=2, use_ema_warmup=True)
    average.step(parameters())
    other = theirs.EMAModel([nn.Parameter(torch.zeros(1))])
    other.load_state_dict(average.state_dict())
    back = ours.EMAModel([])
    back.load_state_dict(other.state_dict())
    found, expected = back.state_dict(), average.state_dict()
    assert all(map(torch.equal, found.pop("shadow_params"), expected.pop("shadow_params"))) and found == expected


def test_saved_average(tmp_path: Path) -> None:
    """The folder is a network, for the reference too, and remembers how it was averaged."""
    unet = minidiff.UNet2DConditionModel(**UNET)
    average = ours.EMAModel(unet.parameters(), 0.9, model_cls=minidiff.UNet2DConditionModel, model_config=unet.config)
    for _ in range(3):
        for weight in unet.parameters():
            weight.data += 1
        average.step(unet.parameters())
    average.save_pretrained(tmp_path)
    for library, cls in ((ours, minidiff.UNet2DConditionModel), (theirs, diffusers.UNet2DConditionModel)):
        loaded = library.EMAModel.from_pretrained(tmp_path, cls)
        assert (loaded.decay, loaded.optimization_step) == (0.9, 3)
        if library is ours:
            assert all(map(torch.equal, loaded.shadow_params, average.shadow_params))
        else:  # the same order, and 1x1 convolutions where ours are linear
            pairs = zip(loaded.shadow_params, average.shadow_params, strict=True)
            assert all(torch.equal(a.flatten(), b.flatten()) for a, b in pairs)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"decay": 2.0}, "decay should be from 0 to 1"),
        ({"optimization_step": "3"}, "optimization_step should be of type"),
        ({"shadow_params": [1]}, "shadow_params should be a list of tensors"),
    ],
)
def test_states_that_are_refused(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.EMAModel(parameters()).load_state_dict(state)


def test_calls_that_are_refused() -> None:
    average = ours.EMAModel(parameters())
    with pytest.raises(ValueError, match="these 2 weights are not the 3"):
        average.step(parameters()[:2])
    with pytest.raises(TypeError, match=r"pass model.parameters\(\)"):
        average.step(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"pass model.parameters\(\)"):
        ours.EMAModel(nn.Linear(1, 1))
    with pytest.raises(RuntimeError, match="store was not called"):
        average.restore(parameters())
    with pytest.raises(ValueError, match="model_cls="):
        average.save_pretrained("nowhere")


SCHEDULES = {
    "constant": {},
    "constant_with_warmup": {"num_warmup_steps": 3},
    "linear": {"num_warmup_steps": 3, "num_training_steps": 12},
    "cosine": {"num_warmup_steps": 3, "num_training_steps": 12},
    "cosine_with_restarts": {"num_warmup_steps": 0, "num_training_steps": 12, "num_cycles": 3},
    "polynomial": {"num_warmup_steps": 3, "num_training_steps": 12, "power": 2.0},
}


def rates(make: Any, *arguments: Any, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
    schedule = make(*[optimizer if one is None else one for one in arguments], **options)
    found = []
    for _ in range(15):
        found += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_are_equal(name: str) -> None:
    found = rates(get_scheduler, name, None, **SCHEDULES[name])
    assert found == rates(diffusers.optimization.get_scheduler, name, None, **SCHEDULES[name])
    enum = diffusers.optimization.SchedulerType(name)
    assert found == rates(get_scheduler, enum, None, **SCHEDULES[name])


def test_learning_rates_of_the_tutorial() -> None:
    options = {"num_warmup_steps": 4, "num_training_steps": 12, "num_cycles": 1.5}
    expected = rates(diffusers.optimization.get_cosine_schedule_with_warmup, None, **options)
    assert rates(get_cosine_schedule_with_warmup, None, **options) == expected


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosin", {}, "'cosin' is none of constant, "),
        ("linear", {}, "'linear' needs num_warmup_steps"),
        ("linear", {"num_warmup_steps": 1}, "'linear' needs num_training_steps"),
        ("piecewise_constant", {}, "'piecewise_constant' is none of constant, "),
        ("polynomial", {"num_warmup_steps": 1, "num_training_steps": 2}, "should be below the first, 1e-08"),
    ],
)
def test_schedules_that_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_scheduler(name, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-8), **options)


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_signal_to_noise_ratio_is_bit_equal(shape: tuple[int, ...]) -> None:
    t = torch.tensor([0, 10, 500, 999]).reshape(shape)
    expected = theirs.compute_snr(diffusers.DDPMScheduler(), t)
    assert torch.equal(ours.compute_snr(minidiff.DDPMScheduler(), t), expected)


class Network(nn.Module):
    def forward(self, x: Tensor, t: Tensor, ctx: Tensor) -> Any:
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=x.tanh() + ctx.mean())


def test_dream() -> None:
    rng = torch.Generator().manual_seed(4)
    noise, noisy, target, ctx = (torch.randn(2, 4, 3, 3, generator=rng) for _ in range(4))
    t, results = torch.tensor([10, 700]), []
    for library, package in ((ours, minidiff), (theirs, diffusers)):
        arguments = Network(), package.DDPMScheduler(), t, noise, noisy, target, ctx, 2.0
        results.append(library.compute_dream_and_update_latents(*arguments))
    assert all(map(torch.equal, *results))
    with pytest.raises(NotImplementedError, match="DREAM"):
        scheduler = minidiff.DDPMScheduler(prediction_type="v_prediction")
        ours.compute_dream_and_update_latents(Network(), scheduler, t, noise, noisy, target, ctx)


def test_seeds_and_dtypes() -> None:
    drawn = []
    with torch.random.fork_rng(devices=[]):
        states = random.getstate(), np.random.get_state()
        for library in (ours, theirs):
            library.set_seed(3)
            drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
        random.setstate(states[0])
        np.random.set_state(states[1])
    assert drawn[0] == drawn[1]
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).half()
    network[0].requires_grad_(False)
    ours.cast_training_params(network)
    assert [p.dtype for p in network.parameters()] == [torch.float16] * 2 + [torch.float32] * 2
    ours.free_memory()
