"""Draw docs/edm.png: ``python -m docs.figures.edm_levels``.

What stands around the networks of Playground v2.5 and CosXL at each noise level, and the noise levels of a run of both
schedules. Needs matplotlib.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidiff import EDMEulerScheduler
from minidiff.checkpoints.original.configs import PackagedConfigs

NETWORKS = {"Playground v2.5": "playground-v2.5-1024px-aesthetic", "CosXL": "cosxl"}
LINES = {"Playground v2.5": "-", "CosXL": "--"}
COLOURS = {"c_in": "tab:blue", "c_skip": "tab:green", "c_out": "tab:red"}
COLOURS |= {"karras": "tab:blue", "exponential": "tab:orange"}
STEPS = 10


def scheduler(network: str, **options: Any) -> EDMEulerScheduler:
    """Return the scheduler of a network, as its configuration is packaged."""
    config = PackagedConfigs(NETWORKS[network]).read("scheduler/scheduler_config.json")
    return EDMEulerScheduler.from_config(config, **options)


def surroundings(network: str, sigma: Tensor) -> dict[str, Tensor]:
    """Return c_in, c_skip and c_out of noise levels (N,)."""
    edm, one, zero = scheduler(network), torch.ones_like(sigma), torch.zeros_like(sigma)
    return {
        "c_in": edm.precondition_inputs(one, sigma),
        "c_skip": edm.precondition_outputs(one, zero, sigma),
        "c_out": edm.precondition_outputs(zero, one, sigma),
    }


def levels(network: str, schedule: str) -> Tensor:
    """Return the noise levels (STEPS,) before each step of a run."""
    return scheduler(network, sigma_schedule=schedule).plan(STEPS).sigmas[:STEPS]


def main(arguments: list[str] | None = None) -> None:
    """Draw the picture from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("docs/edm.png"))
    options = parser.parse_args(arguments)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.8), dpi=90)
    styles, sigma = [], torch.logspace(-3, 2.2, 200)
    for network, line in LINES.items():
        config = scheduler(network).config
        for name, values in surroundings(network, sigma).items():
            left.semilogx(sigma, values, line, color=COLOURS[name], label=name if line == "-" else None)
        for schedule in ("karras", "exponential"):
            label = f"{network}, {schedule}" + " (published)" * (schedule == config.sigma_schedule)
            right.semilogy(levels(network, schedule), "o" + line, markersize=3, color=COLOURS[schedule], label=label)
        label = f"{network}: σ_data = {config.sigma_data:g}, {config.prediction_type}"
        styles.append(Line2D([], [], color="grey", linestyle=line, label=label))
    left.add_artist(left.legend(handles=styles, fontsize=8, loc="lower left"))
    left.set_ylim(-1.7, 2.2)  # room for the legend
    left.set_xlabel("noise level σ")
    right.set_xlabel("step")
    right.set_ylabel("noise level σ before the step")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper right" if axes is left else "lower left")
    figure.tight_layout()
    figure.savefig(options.to, metadata={"Software": None})


if __name__ == "__main__":
    main()
