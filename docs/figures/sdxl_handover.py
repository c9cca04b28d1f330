"""Draw docs/sdxl_handover.png: ``python -m docs.figures.sdxl_handover``.

The noise levels that a run of SDXL passes through, and which of its steps base and refiner take: once with the spacing
of the published scheduler, once with Karras'. Needs matplotlib.
"""

import argparse
from pathlib import Path
from typing import Any

from minidiff import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from minidiff.pipelines.strength import cut_timestep, steps_until

CONFIG = {  # scheduler_config.json of stabilityai/stable-diffusion-xl-base-1.0
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
SCHEDULERS = {
    "Euler, as published": EulerDiscreteScheduler(**CONFIG),
    "DPM++ 2M Karras": DPMSolverMultistepScheduler(**CONFIG, use_karras_sigmas=True),
}
STEPS, SHARE = 40, 0.8
BASE, REFINER = "tab:blue", "tab:orange"


def handover(scheduler: Any, steps: int = STEPS, share: float = SHARE) -> tuple[list[float], list[float], int]:
    """Return timesteps and noise levels of a run, and how many of its steps base takes."""
    plan = scheduler.plan(steps)
    return list(plan.times), plan.sigmas[: len(plan.times)].tolist(), steps_until(scheduler, plan, share)


def main(arguments: list[str] | None = None) -> None:
    """Draw the picture from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("docs/sdxl_handover.png"))
    options = parser.parse_args(arguments)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(9, 3.6), dpi=90, sharey=True)
    for axes, (name, scheduler) in zip(both, SCHEDULERS.items(), strict=True):
        times, sigmas, count = handover(scheduler)
        steps = range(len(times))
        table = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5
        level = table[cut_timestep(scheduler, SHARE)].item()
        axes.axhline(level, color="grey", linewidth=0.8, linestyle="--")
        axes.annotate(
            f"t = {cut_timestep(scheduler, SHARE)}, \u03c3 = {level:.2f}", (0, level * 1.15), fontsize=8, color="grey"
        )
        axes.axvspan(count - 0.5, len(times) - 0.5, color=REFINER, alpha=0.12)
        axes.semilogy(steps[:count], sigmas[:count], "o-", color=BASE, markersize=3, label=f"base: {count} steps")
        axes.semilogy(
            steps[count:],
            sigmas[count:],
            "o-",
            color=REFINER,
            markersize=3,
            label=f"refiner: {len(times) - count} steps",
        )
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    both[0].set_ylabel("noise level \u03c3 before the step")
    figure.tight_layout()
    figure.savefig(options.to, metadata={"Software": None})


if __name__ == "__main__":
    main()
