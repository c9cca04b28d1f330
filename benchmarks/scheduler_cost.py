"""What a step costs beside the network: ``python -m benchmarks.scheduler_cost``.

A step in the middle of a 50-step run on a 4x64x64 latent in float32 on the CPU, scaling of the input included. Ours and
the reference's alternate in one process, and the ratio is the median over pairs of neighbouring runs, so that whatever
else the machine does slows down both. Every run has 50 steps as in practice; its 20 middle ones are timed.
"""

import argparse
import inspect
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import minidiff
from tests.theirs import diffusers

STEPS, TIMED = 50, range(15, 35)


def measure(scheduler: Any, x: Tensor, out: Tensor) -> float:
    """Return the seconds of one middle step, the median over ``TIMED``: a step that was interrupted does not count."""
    scheduler.set_timesteps(STEPS)
    generator = {"generator": torch.Generator().manual_seed(0)}
    if "generator" not in inspect.signature(scheduler.step).parameters:
        generator = {}
    seconds = []
    for t in scheduler.timesteps[: TIMED.stop]:
        start = time.perf_counter()
        scheduler.scale_model_input(x, t)
        scheduler.step(out, t, x, **generator)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[TIMED.start :])


def compare(kind: str, repeats: int) -> dict[str, float]:
    """Return the median microseconds of both sides and the median ratio."""
    sides = [getattr(minidiff, kind)(), getattr(diffusers, kind)()]
    x, out = torch.randn(2, 1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    for scheduler in sides:
        measure(scheduler, x, out)  # warm up
    pairs = [tuple(measure(scheduler, x, out) for scheduler in sides) for _ in range(repeats)]
    ours, theirs = (statistics.median(column) * 1e6 for column in zip(*pairs, strict=True))
    return {"ours_us": ours, "theirs_us": theirs, "ratio": statistics.median(a / b for a, b in pairs)}


def table(result: dict[str, dict[str, float]]) -> str:
    """Return the figures as a Markdown table."""
    lines = ["| class | ours, µs | theirs, µs | ratio |", "|---|---:|---:|---:|"]
    lines += [f"| {k} | {r['ours_us']:.0f} | {r['theirs_us']:.0f} | {r['ratio']:.2f} |" for k, r in result.items()]
    lines.append(f"| median | | | {statistics.median(r['ratio'] for r in result.values()):.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="runs of each side per class")
    parser.add_argument("--json", type=Path, default=Path("runs/scheduler_cost.json"), help="where to write the result")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kinds = [name for name in minidiff.__all__ if name.endswith("Scheduler")]
    result = {kind: compare(kind, options.repeats) for kind in kinds}
    print(table(result))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
