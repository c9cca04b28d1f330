"""How the cost of a UNet step and of a decoding grows with the batch and with the picture, up to what fits."""

import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from benchmarks.speed.networks import WORKS, Use, Work, count, size
from benchmarks.speed.settings import Settings, available, peak_of
from benchmarks.speed.timing import Measured, in_turn, name_of

BATCHES = (1, 2, 4, 8)
SPARE = 1.25  # how much more than expected must be free


class Cost(NamedTuple):
    """What a case took at most, of all settings."""

    seconds: float
    peak: int  # bytes beyond the weights


def sides(side: int) -> Iterator[int]:
    """Yield 1/2, 3/4, 1, 3/2, 2, 3, 4, 6... times ``side``, without end."""
    for k in itertools.count(-1):
        yield int(side * 2**k)
        yield int(side * 1.5 * 2**k)


@torch.no_grad()
def growth(
    names: tuple[str, ...],
    family: str,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    side: int,
    *,
    longest: float,
    compiled: bool = False,
) -> Iterator[Measured | str]:
    """Time works for growing batches and growing pictures until the next would not fit; say why each stops.

    Args:
        names: of ``WORKS``.
        side: of the latents whose batch grows.
        longest: seconds that one run may take.
    """
    for name in names:
        work = WORKS[name]
        settings = work.build(family, dtype, device, compiled=compiled)
        costs: dict[tuple[int, int], Cost] = {}
        _pack(work, settings, family, dtype, device, side // 2)
        batches, pictures = ((batch, side) for batch in BATCHES), ((1, one) for one in sides(side))
        for cases, power in ((batches, 1), (pictures, 2)):  # the time of attention grows with the square of the pixels
            last: tuple[int, int] | None = None
            for batch, one in cases:
                what = f"{family} {work.what}, {size(work, batch, one)}"
                why = None
                if last is not None:
                    ratio = batch * one**2 / (last[0] * last[1] ** 2)
                    why = too_much(costs[last], ratio, ratio**power, device, longest)
                if why is None and (batch, one) not in costs:
                    try:
                        row, costs[batch, one] = measure(work, settings, family, dtype, device, rounds, batch, one)
                    except RuntimeError as error:  # out of memory after all, or more elements than a kernel can count
                        why = f"it failed: {error}".splitlines()[0][:300]
                    else:
                        yield row
                        yield from (f"{what} in {name_of(dtype)}: {note}" for note in settings.notes)
                        settings.notes.clear()
                if why is not None:
                    yield f"growth stops before {what} in {name_of(dtype)}: {why}"
                    break
                last = batch, one
        del settings
        gc.collect()  # an optimized network refers to itself


def _pack(work: Work, settings: Settings, family: str, dtype: torch.dtype, device: torch.device, side: int) -> None:
    """Let an optimized network pack its weights, which would count as memory of the first case."""
    use = work.use(family, dtype, device, 1, side)
    for name in settings.networks:
        if "optimized" in name:
            use(settings.networks[name], name)


def too_much(cost: Cost, memory: float, time: float, device: torch.device, longest: float) -> str | None:
    """Return why a case should not be tried that may take so many times the memory and the time of ``cost``."""
    need, free = SPARE * memory * cost.peak, available(device)
    if need > free:
        return f"it needs about {need / 1e9:.2g} GB beyond the weights, {free / 1e9:.2g} GB are free"
    if time * cost.seconds > longest:
        return f"one run may take {time * cost.seconds:.0f} s, more than --longest {longest:g}"
    return None


def measure(
    work: Work,
    settings: Settings,
    family: str,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    batch: int,
    side: int,
) -> tuple[Measured, Cost]:
    """Time one case, and measure the memory that it takes."""
    use: Use = work.use(family, dtype, device, batch, side)
    peaks: list[int] = []
    runs: dict[str, Callable[[], Any]] = settings.runs(use)
    for run in runs.values():
        peaks.append(peak_of(run, device))  # in the run that does not count
    figures = in_turn(runs, rounds, device, warmups=2 if device.type == "cuda" else 0)
    what = f"{family} {work.what}, {size(work, batch, side)}"
    case = {"batch": batch, "pixels": (8 * side) ** 2}
    flop = count(work, family, batch, side)
    row = Measured("growth", what, name_of(dtype), figures, flop=flop, case=case)
    return row, Cost(max(max(times) for times in figures.values()), max(peaks))
