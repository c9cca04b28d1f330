"""Check the laws of tests/schedulers/grid.py on whole grids: ``python -m benchmarks.scheduler_grid``.

Every class, 1 to 60, 100, 999 and 1000 steps, every spacing, noise schedule, prediction and last noise level: plans are
finite, noise levels descend, the network is called exactly as often as it should be, the last level is reached, runs
are finite and a perfect denoiser gets its picture back. Prints how much was checked and what failed, and exits with 1
if anything did. The whole grid has 1.8 million cases, most of them of DPM-Solver: ``--share`` takes some of each class.
"""

import argparse
import random
import time
from typing import NamedTuple

from tqdm import tqdm

import minidiff
from tests.schedulers import grid


class Figures(NamedTuple):
    """What was checked of a class's grid."""

    grid: int  # combinations of options and steps
    planned: int
    refused: int  # as they should be
    ran: int
    worst: float  # how far a perfect denoiser ended from its picture
    failed: list[str]  # options, steps and law


def check(kind: str, share: float, seconds: float) -> Figures:
    """Check a random ``share`` of the grid of a class, for at most so many seconds."""
    source, start = random.Random(0), time.monotonic()
    options_of = list(grid.every_option(kind))
    size = len(options_of) * len(grid.COUNTS)
    planned = refused = ran = 0
    worst, failed = 0.0, []
    for case in tqdm(source.sample(range(size), max(1, round(size * share))), kind):
        if time.monotonic() - start > seconds:
            break
        options, n = options_of[case // len(grid.COUNTS)], grid.COUNTS[case % len(grid.COUNTS)]
        try:
            found = grid.check_plan(kind, options, n)
            refused, planned = refused + (found is None), planned + (found is not None)
            if found is not None and n <= 60:
                worst, ran = max(worst, grid.check_runs(kind, options, *found)), ran + 1
        except (AssertionError, ValueError) as error:
            failed.append(f"{kind} with {options}, {n} steps: {error or 'see tests/schedulers/grid.py'}")
    return Figures(size, planned, refused, ran, worst, failed)


def main(arguments: list[str] | None = None) -> None:
    """Run the check from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the grid, chosen at random")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop each class after this time")
    parser.add_argument("--classes", nargs="*", help="only these")
    options = parser.parse_args(arguments)
    kinds = options.classes or [name for name in minidiff.__all__ if name.endswith("Scheduler")]
    found = {kind: check(kind, options.share, options.seconds) for kind in kinds}
    print("| class | grid | plans checked | refused as they should be | runs checked | perfect denoiser off by |")
    print("|---" + "|---:" * 5 + "|")
    for kind, row in found.items():
        print(f"| {kind} | {row.grid:,} | {row.planned:,} | {row.refused:,} | {row.ran:,} | {row.worst:.1e} |")
    failed = [failure for row in found.values() for failure in row.failed]
    checked = sum(row.planned + row.refused for row in found.values())
    print(f"{checked:,} cases checked, {len(failed):,} failed", *failed[:20], sep="\n")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
