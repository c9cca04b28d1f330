"""Draw docs/few_steps.webp: ``python -m docs.figures.few_steps_sheet``.

The embedded checkpoint, which is not distilled, in 1 to 20 steps from one noise: a scheduler and a spacing in each row.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import minidiff
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
TILE, GAP, LEFT, TOP = 64, 4, 124, 18


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
    size = (LEFT + len(STEPS) * (TILE + GAP), TOP + len(ROWS) * (TILE + GAP))
    table = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(table)
    places = [LEFT + column * (TILE + GAP) for column in range(len(STEPS))]
    for x, steps in zip(places, STEPS, strict=True):
        pen.text((x + TILE / 2, 4), f"{steps} step{'s' * (steps > 1)}", fill="black", anchor="ma")
    for k, row in enumerate(ROWS):
        y = TOP + k * (TILE + GAP)
        pen.text((LEFT - 8, y + TILE / 2), row, fill="black", anchor="rm")
        for x, steps in zip(places, STEPS, strict=True):
            table.paste(draw(pipe, row, steps, prompt, seed), (x, y))
    return table


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
