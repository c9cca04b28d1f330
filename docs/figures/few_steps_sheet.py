"""Draw docs/few_steps.webp: ``python -m docs.figures.few_steps_sheet``.

The embedded checkpoint, which is not distilled, in 1 to 20 steps from one noise: a scheduler and a spacing in each row.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

import minidiff
from docs.figures.table import table
from minidiff.embedded import GUIDANCE, embedded_checkpoint

STEPS = (1, 2, 4, 8, 20)
ROWS = {
    "DDIM, leading": ("DDIMScheduler", {"timestep_spacing": "leading"}),
    "DDIM, linspace": ("DDIMScheduler", {"timestep_spacing": "linspace"}),
    "DDIM, trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    "DPM++ 2M, leading": ("DPMSolverMultistepScheduler", {"timestep_spacing": "leading"}),
    "DPM++ 2M, trailing": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    "UniPC, trailing": ("UniPCMultistepScheduler", {"timestep_spacing": "trailing"}),
    "LCM": ("LCMScheduler", {}),
    "TCD, eta 0.3": ("TCDScheduler", {}),
}
LEFT = 124


def draw(pipe: minidiff.StableDiffusionPipeline, row: str, steps: int, prompt: str, seed: int) -> Image.Image:
    """Return the picture of a row and a number of steps."""
    kind, options = ROWS[row]
    scheduler = getattr(minidiff, kind).from_config(pipe.scheduler.config, **options)
    parts = {**pipe.components, "scheduler": scheduler}
    pipe = minidiff.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, num_inference_steps=steps, guidance_scale=GUIDANCE, seed=seed).images[0]


def sheet(prompt: str, seed: int) -> Image.Image:
    """Return the table of pictures."""
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(embedded_checkpoint())
    rows = {row: [draw(pipe, row, steps, prompt, seed) for steps in STEPS] for row in ROWS}
    return table(rows, LEFT, [f"{steps} step{'s' * (steps > 1)}" for steps in STEPS])


def main(arguments: list[str] | None = None) -> None:
    """Draw the sheet from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("docs/few_steps.webp"))
    parser.add_argument("--prompt", default="sunflower")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with torch.inference_mode():
        sheet(options.prompt, options.seed).save(options.to, quality=85)


if __name__ == "__main__":
    main()
