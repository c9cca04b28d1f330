"""Every scheduler class against the reference's, over random combinations of their options, in float32.

For each combination timesteps and noise levels are compared, and whole trajectories of 1, 2, 3, 7, 20 and 50 steps
through a nonlinear stand-in network, value by value. Where they are not bit-identical, the error is relative to the
largest value on the way.

The grids of options are those of tests/schedulers, and so is what is valid: combinations that the reference refuses,
or in which it returns NaN, are left out there, each with its reason. Any others in which it is NaN are counted apart.
"""

import argparse
import inspect
import itertools
import math
import random
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import minidiff
from tests.schedulers import runs
from tests.schedulers.options import GRIDS, LEARNED, spell, valid
from tests.schedulers.runs import Options
from tests.theirs import diffusers


def sample(kind: str, count: int, seed: int) -> Iterator[Options]:
    """Yield ``count`` different valid combinations in random order, or all of them if there are fewer."""
    grid, source, seen = GRIDS[kind], random.Random(seed), set()
    size = math.prod(map(len, grid.values()))
    if size <= 20_000:
        combinations = list(itertools.product(*grid.values()))
        source.shuffle(combinations)
    else:
        combinations = (tuple(map(source.choice, grid.values())) for _ in itertools.count())
    for values in combinations:
        if len(seen) == count:
            return
        options = dict(zip(grid, values, strict=True))
        if str(values) not in seen and valid(kind, options):
            seen.add(str(values))
            yield options


class Comparison(NamedTuple):
    """One combination of options."""

    error: float  # largest relative error of any trajectory
    identical: bool  # every trajectory, bit for bit
    timesteps: float  # largest difference
    sigmas: float  # largest relative difference, 0 where bit-equal or where the reference has none
    nan: tuple[bool, bool]  # ours, theirs: somewhere on the way


def compare(kind: str, options: Options, learned: bool) -> Comparison:
    """Run all trajectories on both sides."""
    reference = getattr(diffusers, kind)
    how: dict[str, Any] = {
        "denoise": runs.network_with_variance if learned else runs.network,
        "seeded": "generator" in inspect.signature(reference.step).parameters,
        "dtype": torch.float32,
    }
    error, identical, timesteps, sigmas, nan = 0.0, True, 0.0, 0.0, (False, False)
    for steps in runs.STEPS:
        if not options.get("skip_prk_steps", True) and steps < 4:
            continue  # minidiff refuses it: there is no Runge-Kutta start
        # A new one for each run: the reference's set_timesteps may change the configuration for good.
        ours, theirs = getattr(minidiff, kind)(**options), reference(**options)
        a, b = (runs.by_hand(scheduler, steps, **how) for scheduler in (ours, theirs))
        timesteps = max(timesteps, (ours.timesteps - theirs.timesteps).abs().max().item())
        if hasattr(theirs, "sigmas"):
            sigmas = max(sigmas, _difference(ours.sigmas, theirs.sigmas))
        nan = tuple(before or not bool(way.isfinite().all()) for before, way in zip(nan, (a, b), strict=True))
        if any(nan):
            continue
        error, identical = max(error, runs.error(a, b)), identical and torch.equal(a, b)
    return Comparison(error, identical, timesteps, sigmas, nan)


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return 0.0 if torch.equal(ours, theirs) else ((ours - theirs).abs() / theirs.abs().clamp(min=1e-9)).max().item()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this part."""
    parser.add_argument("--limit", type=int, default=400, help="combinations per class")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop each class after this time")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of combinations")
    parser.add_argument("--classes", nargs="*", help="only these")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return class -> figures."""
    kinds = [name for name in minidiff.__all__ if name.endswith("Scheduler")]
    result = {}
    for kind in options.classes or kinds:
        start = time.monotonic()
        found: list[tuple[Comparison, Options]] = []
        for combination in tqdm(sample(kind, options.limit, options.seed), kind, options.limit, disable=None):
            if time.monotonic() - start > options.seconds:
                break
            learned = combination.get("variance_type") in LEARNED
            found.append((compare(kind, spell(combination), learned), combination))
        result[kind] = _figures(found)
    return result


def _figures(found: list[tuple[Comparison, Options]]) -> dict[str, Any]:
    finite = [(comparison, options) for comparison, options in found if not any(comparison.nan)]
    worst, worst_options = max(finite, key=lambda pair: pair[0].error)
    return {
        "combinations": len(finite),
        "timesteps_equal": sum(c.timesteps == 0 for c, _ in finite),
        "timesteps_largest_difference": max(c.timesteps for c, _ in finite),
        "sigmas_bit_equal": sum(c.sigmas == 0 for c, _ in finite),
        "sigmas_largest_difference": max(c.sigmas for c, _ in finite),
        "bit_identical": sum(c.identical for c, _ in finite),
        "within_1e-6": sum(c.error <= 1e-6 for c, _ in finite),
        "largest_error": worst.error,
        "worst_options": worst_options,
        "nan_in_the_reference_only": sum(c.nan == (False, True) for c, _ in found),
        "nan_in_ours": sum(c.nan[0] for c, _ in found),
        "nan_options": [options for c, options in found if any(c.nan)],
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures as a Markdown table."""
    head = ("class", "combinations", "timesteps equal", "sigmas bit-equal", "bit-identical", "within 1e-6")
    columns = ("combinations", "timesteps_equal", "sigmas_bit_equal", "bit_identical", "within_1e-6")
    lines = [f"| {' | '.join(head)} | largest error |", "|---" + "|---:" * 6 + "|"]
    for kind, row in [*result.items(), ("all", _total(result))]:
        lines.append(f"| {kind} | {' | '.join(str(row[c]) for c in columns)} | {row['largest_error']:.1e} |")
    return "\n".join(lines)


def _total(result: dict[str, Any]) -> dict[str, Any]:
    rows = list(result.values())
    total = {name: sum(row[name] for row in rows) for name in rows[0] if not name.endswith("options")}
    return total | {"largest_error": max(row["largest_error"] for row in rows)}
