"""What the scheduler tests share: a stand-in network, whole runs through it, and grids of options."""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

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


def through_core(
    scheduler: Any, steps: int, *, denoise: Callable[[Tensor, Any], Tensor] = network, **options: Any
) -> Tensor:
    """Sample with the pure core and return every x of the way."""
    plan, generator = scheduler.plan(steps, **options), torch.Generator().manual_seed(1)
    x, past = noise() * plan.init_noise_sigma, ()
    way = [x]
    for i in range(plan.start, len(plan.coefficients)):
        out = denoise(scheduler.scale_input(plan, i, x), plan.timesteps[i])
        x, past = scheduler.advance(plan, i, x, out, past, scheduler.draw_noise(plan, i, x, generator))
        way.append(x)
    return torch.stack(way)


def check_same_run(ours: Any, theirs: Any, steps: int, dtype: torch.dtype = torch.float32, **how: Any) -> None:
    """Assert that both sides have the same timesteps and noise levels and take the same steps, bit for bit.

    Every x of the way, in float32 or half precision: a wrong formula cannot hide in a bound, and a coefficient that is
    rounded elsewhere is found too.
    """
    one, other = (by_hand(scheduler, steps, dtype=dtype, **how) for scheduler in (ours, theirs))
    assert torch.equal(ours.timesteps, theirs.timesteps)
    if hasattr(theirs, "sigmas"):
        assert torch.equal(ours.sigmas, theirs.sigmas)
    assert torch.equal(one, other), f"{steps} steps: off by {error(one, other):.1e}"


def error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference anywhere on the way, relative to the largest value on it. Both must be finite."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert ours.isfinite().all() and theirs.isfinite().all(), "not finite"
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def pairwise(grid: dict[str, Sequence[Any]], valid: Callable[[Options], bool] | None = None) -> list[Options]:
    """Return ``valid`` combinations of options in which any two values of two options come together.

    They find what depends on one or two options; ``benchmarks.parity`` has thousands for the rest. Pairs that are never
    valid are left out. Greedy: of 12 candidates the one with most new pairs.
    """
    source, names = random.Random(0), list(grid)
    columns = list(itertools.combinations(range(len(names)), 2))
    missing = {(a, b, i, j) for a, b in columns for i in range(len(grid[names[a]])) for j in range(len(grid[names[b]]))}

    def pairs(row: Sequence[int]) -> set[tuple[int, ...]]:
        return {(a, b, row[a], row[b]) for a, b in columns}

    def options(row: Sequence[int]) -> Options:
        return {name: grid[name][i] for name, i in zip(names, row, strict=True)}

    rows: list[list[int]] = []
    while missing:
        a, b, i, j = wanted = min(missing)
        found: list[list[int]] = []
        for _ in range(400):
            row = [source.randrange(len(grid[name])) for name in names]
            row[a], row[b] = i, j
            if valid is None or valid(options(row)):
                found.append(row)
            if len(found) == 12:
                break
        if found:
            rows.append(max(found, key=lambda row: len(pairs(row) & missing)))
            missing -= pairs(rows[-1])
        missing.discard(wanted)
    return [options(row) for row in rows]


def name(value: Any) -> str:
    """Return the options as the id of a test."""
    if not isinstance(value, dict):
        return str(value)
    return ",".join(f"{key}={str(item)[:20]}" for key, item in value.items()) or "defaults"
