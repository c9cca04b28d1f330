"""How much memory things need beyond the weights that are there: the peak in a fresh process.

On a GPU the peak of allocated memory; on the CPU that of resident memory, in which what ``optimize`` packs counts too.
Resident memory moves in pages and keeps what was freed: less than ``LEAST`` is not reported. A scheduler step holds a
few tensors of 66 kB, far below; there the bytes of its tensors are counted instead.
"""

import gc
import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import minidiff
from benchmarks.memory import live_tensors
from benchmarks.speed.networks import WORKS, size
from benchmarks.speed.settings import EAGER, peak_of
from benchmarks.speed.timing import Measured, in_fresh_processes
from benchmarks.speed.whole import draw, pipelines
from tests import theirs

KINDS = {
    "unet": "guided UNet step",
    "decode": "VAE decode",
    "encode": "VAE encode",
    "text": "text encoding",
    "whole": "whole run",
}
LEAST = 8.0  # MB
STEPS = 2  # of a whole run: the peak of the third is that of the second
IMPORT = """
import torch
from pathlib import Path
from benchmarks.load import memory
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = memory()["VmRSS"]
from {library} import StableDiffusionPipeline
print((memory()["VmHWM"] - before) / 1e6)
"""
APART = """
import torch
from benchmarks.speed.memory import measure
print(measure({kind!r}, {setting!r}, {family!r}, torch.{dtype}, torch.device({device!r}), {side}))
"""


@torch.no_grad()
def measure(kind: str, setting: str, family: str, dtype: torch.dtype, device: torch.device, side: int) -> float:
    """Return the peak of one thing in one setting, in MB. Only for a fresh process: memory is kept after a run."""
    torch.manual_seed(0)
    if kind == "whole":
        pipe = pipelines(family, dtype, device, only=(setting,))[0][setting]
        run: Any = partial(draw, pipe, device, STEPS, 1, side)
    else:
        work = WORKS[kind]
        network = work.build(family, dtype, device, only=(setting,)).networks[setting]
        run = partial(work.use(family, dtype, device, 1, side), network, setting)
    if device.type == "cuda" or kind == "text":
        run()  # libraries load their kernels: small against a UNet step, not against a text
    gc.collect()
    return peak_of(run, device) / 1e6


def peak_memory(family: str, dtype: str, device: torch.device, rounds: int, side: int) -> Iterator[Measured | str]:
    """Measure every kind in every setting, in fresh processes."""
    for kind, what in KINDS.items():
        text = kind == "text"
        settings = [name for name in EAGER if not text or name in ("ours", "theirs")]
        options = {"kind": kind, "family": family, "dtype": dtype, "device": str(device), "side": side}
        codes = {name: APART.format(setting=name, **options) for name in settings}
        where = size(WORKS["text"], 1, side) if text else f"{8 * side}x{8 * side}"
        what = f"peak memory beyond the weights, {family} {what} at {where}"
        yield _unless_small(Measured("memory", what, dtype, in_fresh_processes(codes, rounds, warmups=0), unit="MB"))


def import_memory(rounds: int) -> Iterator[Measured | str]:
    """Measure what importing a pipeline adds to torch."""
    codes = {"ours": IMPORT.format(library="minidiff"), "theirs": IMPORT.format(library="diffusers")}
    figures = in_fresh_processes(codes, rounds)
    yield _unless_small(Measured("memory", "memory of import StableDiffusionPipeline, beyond torch", "", figures, "MB"))


def scheduler_memory() -> Iterator[Measured]:
    """Count the bytes of the tensors that a step in the middle of a run makes and has alive at one time."""
    kinds = [name for name in minidiff.__all__ if name.endswith("Scheduler")]
    both = {"ours": minidiff, "theirs": theirs.diffusers}
    figures = {
        side: [statistics.median(step_bytes(getattr(one, k)()) / 1e3 for k in kinds)] for side, one in both.items()
    }
    what = "tensors alive in a scheduler step, 4x64x64, median over all schedulers"
    yield Measured("memory", what, "float32", figures, unit="kB")


@torch.no_grad()
def step_bytes(scheduler: Any, steps: int = 20, middle: int = 10) -> int:
    """Return the most bytes of new tensors that are alive at one time in a middle step of a run."""
    torch.manual_seed(0)
    scheduler.set_timesteps(steps)
    x, out = torch.randn(2, 1, 4, 64, 64)
    for i, t in enumerate(scheduler.timesteps[: middle + 1]):
        with live_tensors() as live:
            scheduler.step(out, t, scheduler.scale_model_input(x, t))
        if i == middle:
            return live.peak
    raise ValueError(f"a run of {type(scheduler).__name__} has only {len(scheduler.timesteps)} steps")


def _unless_small(row: Measured) -> Measured | str:
    """Return the row, or that what theirs takes is too little to be compared with."""
    least = min(row.median(name) for name in row.figures if name.startswith("theirs"))
    if least >= LEAST:
        return row
    return f"{row.what}, {row.dtype}: {least:.1f} MB in diffusers, too little for resident memory to tell"
