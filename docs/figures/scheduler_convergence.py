"""Draw docs/scheduler_convergence.png: ``python -m docs.figures.scheduler_convergence``.

The error of the deterministic solvers against the number of network evaluations, on data whose exact solution is known
(tests/schedulers/mixture.py), in double logarithmic scale: the slope of a line is the order of its solver. Needs
matplotlib.
"""

import argparse
from pathlib import Path
from typing import Any

from tests.schedulers import convergence

COUNTS = (5, 7, 10, 14, 20, 28, 40, 57, 80, 113, 160)
DIVISORS = (5, 8, 10, 16, 20, 32, 40, 80, 160)  # of the training steps, for the classes spaced in whole timesteps
SHOWN = (  # what each line shows that no other does
    "DDIM",
    "PNDM skip_prk_steps=True",
    "DPMSolverMultistep",
    "DPMSolverSinglestep solver_order=3",
    "HeunDiscrete",
    "KDPM2Discrete",
    "LMSDiscrete",
    "DEISMultistep solver_order=3",
    "UniPCMultistep",
    "UniPCMultistep solver_order=3",
)


def line(case: Any) -> tuple[list[int], list[float]]:
    """Return evaluations and errors of runs of more and more steps."""
    counts = COUNTS if "use_exponential_sigmas" in case.options else DIVISORS
    if case.options.get("solver_order", 2) > 1 and "Singlestep" in case.kind:
        counts = [3 * (count // 3) + 1 for count in COUNTS]  # whole groups
    runs = [convergence.solve(convergence.make(case), count, **case.run) for count in counts if count > 4]
    return [run.evaluations for run in runs], [run.error for run in runs]


def main(arguments: list[str] | None = None) -> None:
    """Draw the picture from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("docs/scheduler_convergence.png"))
    options = parser.parse_args(arguments)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5), dpi=90)
    cases = {case.name: case for case in convergence.existing()}
    for name in SHOWN:
        if name in cases:
            axes.loglog(*line(cases[name]), marker="o", markersize=3, label=f"{name} ({cases[name].measured:.1f})")
    for order, level in ((1, 2.0), (2, 8.0), (3, 20.0)):
        axes.loglog((10, 160), (level / 10**order, level / 160**order), color="grey", linewidth=0.7, linestyle=":")
        axes.annotate(f"order {order}", (160, level / 160**order), fontsize=8, color="grey")
    axes.set_xlabel("network evaluations")
    axes.set_ylabel("largest error of a sample")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title="measured order in brackets", title_fontsize=8)
    figure.tight_layout()
    figure.savefig(options.to, metadata={"Software": None})


if __name__ == "__main__":
    main()
