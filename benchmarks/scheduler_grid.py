"""Check the laws of tests/laws/grid.py on whole grids: ``python -m benchmarks.scheduler_grid``.

Every class, 1 to 60, 100, 999 and 1000 steps, every spacing, noise schedule, prediction and last noise level: plans are
finite, noise levels descend, the network is called exactly as often as it should be, the last level is reached, runs
are finite and a perfect denoiser gets its picture back. Stops with the options of the first run that fails.
"""

import argparse
import random
import time

import minidiff
from benchmarks.from_tests import from_tests


def check(kind: str, share: float, seconds: float) -> str:
    """Check a random ``share`` of the grid of a class, for at most so many seconds; return a line of figures."""
    grid, source, start = from_tests("laws.grid"), random.Random(0), time.monotonic()
    cases = [(options, n) for options in grid.every_option(kind) for n in grid.COUNTS]
    source.shuffle(cases)
    planned = refused = ran = 0
    worst = 0.0
    for options, n in cases[: max(1, round(len(cases) * share))]:
        if time.monotonic() - start > seconds:
            break
        try:
            found = grid.check_plan(kind, options, n)
            refused, planned = refused + (found is None), planned + (found is not None)
            if found is not None and n <= 60:
                worst, ran = max(worst, grid.check_runs(kind, options, *found)), ran + 1
        except AssertionError as error:
            raise SystemExit(f"{kind} with {options}, {n} steps: {error or 'see tests/laws/grid.py'}") from error
    return f"| {kind} | {len(cases)} | {planned} | {refused} | {ran} | {worst:.1e} |"


def main(arguments: list[str] | None = None) -> None:
    """Run the check from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the grid, chosen at random")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop each class after this time")
    options = parser.parse_args(arguments)
    print("| class | grid | plans checked | refused as they should be | runs checked | perfect denoiser off by |")
    print("|---" + "|---:" * 5 + "|")
    for kind in minidiff.__all__:
        if kind.endswith("Scheduler"):
            print(check(kind, options.share, options.seconds), flush=True)


if __name__ == "__main__":
    main()
