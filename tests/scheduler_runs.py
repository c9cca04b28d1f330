"""What the scheduler tests share: a stand-in network, whole runs through it, and grids of options."""

import random
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

STEPS = (1, 2, 3, 7, 20, 50)
Options = dict[str, Any]


def network(x: Tensor, t: Any) -> Tensor:
    """A deterministic, nonlinear stand-in for a denoiser, different at each timestep.

    It saturates: where sqrt(alpha_bar) is 1e-4, as in the cosine schedule, a steeper one would be chaotic.
    """
    return torch.tanh(1.3 * x + float(t) / 1000) + 0.3 * torch.tanh(0.7 * x.flip(-1))


def network_with_variance(x: Tensor, t: Any) -> Tensor:
    """The same with learned variances in (0, 1) in a second half of the channels."""
    return torch.cat([network(x, t), torch.sigmoid(x + float(t) / 500)], dim=1)


def noise(dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    """The sample every run starts from (B, 3, 4, 4)."""
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def by_hand(
    scheduler: Any,
    steps: int,
    *,
    start: int = 0,
    dtype: torch.dtype = torch.float64,
    denoise: Callable[[Tensor, Any], Tensor] = network,
    seeded: bool = False,
    given_noise: bool = False,
    **step_options: Any,
) -> Tensor:
    """Sample with the loop of the tutorials, ours or theirs, and return every x of the way (N + 1, B, 3, 4, 4)."""
    scheduler.set_timesteps(steps)
    repeats = len(set(scheduler.timesteps.tolist())) < len(scheduler.timesteps)
    if (start or repeats) and hasattr(scheduler, "set_begin_index"):  # values are no clock where timesteps repeat
        scheduler.set_begin_index(start)
    if seeded:
        step_options["generator"] = torch.Generator().manual_seed(1)
    x = noise(dtype) * scheduler.init_noise_sigma
    way = [x]
    source = torch.Generator().manual_seed(2)
    for t in scheduler.timesteps[start:]:
        if given_noise:
            step_options["variance_noise"] = torch.randn(x.shape, generator=source, dtype=dtype)
        out = denoise(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, **step_options).prev_sample
        way.append(x)
    return torch.stack(way)


class InDouble:
    """A reference scheduler whose ``step`` does not bring samples to float32.

    Some of the reference's solvers round float64 samples to float32 at every step, which would hide any difference
    below 1e-7. Here ``torch.float32`` means float64 to their module while ``step`` runs, and nothing else changes.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.module = scheduler, sys.modules[type(scheduler).__module__]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(self.module, "torch", _DoubleTorch("torch")):
            return self.scheduler.step(*args, **kwargs)


class _DoubleTorch(types.ModuleType):
    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def through_core(
    scheduler: Any, steps: int, *, denoise: Callable[[Tensor, Any], Tensor] = network, **options: Any
) -> Tensor:
    """Sample with the pure core and return every x of the way."""
    plan, generator = scheduler.plan(steps, **options), torch.Generator().manual_seed(1)
    x, past = noise() * plan.init_noise_sigma, ()
    way = [x]
    for i in range(plan.start, len(plan.steps)):
        out = denoise(scheduler.scale_input(plan, i, x), plan.timesteps[i])
        x, past = scheduler.advance(plan, i, x, out, past, scheduler.draw_noise(plan, i, x, generator))
        way.append(x)
    return torch.stack(way)


def error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference anywhere on the way, relative to the largest value on it. Both must be finite."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert ours.isfinite().all() and theirs.isfinite().all(), "not finite"
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def one_by_one(grid: dict[str, Sequence[Any]]) -> list[Options]:
    """Return the defaults, and each value of each option on its own."""
    return [{}] + [{name: value} for name, values in grid.items() for value in values]


def combinations(
    grid: dict[str, Sequence[Any]], count: int, valid: Callable[[Options], bool], seed: int = 0
) -> list[Options]:
    """Return ``count`` random combinations of options that are ``valid``, the same ones each time."""
    source = random.Random(seed)

    def draws() -> Iterator[Options]:
        while True:
            yield {name: source.choice(values) for name, values in grid.items()}

    found: list[Options] = []
    for options in draws():
        if len(found) == count:
            return found
        if valid(options) and options not in found:
            found.append(options)


def name(value: Any) -> str:
    """Return the options as the id of a test."""
    if not isinstance(value, dict):
        return str(value)
    return ",".join(f"{key}={str(item)[:20]}" for key, item in value.items()) or "defaults"
