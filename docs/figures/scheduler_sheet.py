"""Draw docs/scheduler_sheet.webp: ``python -m docs.figures.scheduler_sheet``.

One picture of the embedded checkpoint per scheduler class (down) and number of steps (across), from the same noise.
The number is that of ``num_inference_steps``; classes with two evaluations per step ask the network twice as often.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

import minidiff
from docs.figures.table import table
from minidiff.embedded import GUIDANCE, embedded_checkpoint

STEPS = (2, 4, 8, 16, 25, 50)
LEFT = 172


def draw(pipe: minidiff.StableDiffusionPipeline, kind: str, steps: int, prompt: str, seed: int) -> Image.Image:
    """Return the picture of a scheduler class, with its defaults but for what the checkpoint was trained with."""
    config = pipe.scheduler.config
    trained = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    options = {name: config[name] for name in trained} | {"timestep_spacing": "trailing"}
    if kind == "PNDMScheduler":  # leading is the only spacing that its multistep formula is made for
        options |= {"skip_prk_steps": True, "timestep_spacing": "leading", "steps_offset": 1}
    if kind.startswith(("DPMSolverSinglestep", "LCM", "TCD")):  # has timesteps of its own
        del options["timestep_spacing"]
    if kind in ("DDPMScheduler", "DDIMScheduler", "LCMScheduler", "TCDScheduler"):
        options["clip_sample"] = False  # latents have no range
    scheduler = getattr(minidiff, kind)(**options)
    parts = {**pipe.components, "scheduler": scheduler}
    pipe = minidiff.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, num_inference_steps=steps, guidance_scale=GUIDANCE, seed=seed).images[0]


def sheet(prompt: str, seed: int) -> Image.Image:
    """Return the table of pictures."""
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(embedded_checkpoint())
    kinds = [name for name in minidiff.__all__ if name.endswith("Scheduler") and not name.startswith("EDM")]
    rows = {kind: [draw(pipe, kind, steps, prompt, seed) for steps in STEPS] for kind in kinds}
    return table({kind.removesuffix("Scheduler"): row for kind, row in rows.items()}, LEFT, list(map(str, STEPS)))


def main(arguments: list[str] | None = None) -> None:
    """Draw the sheet from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("docs/scheduler_sheet.webp"))
    parser.add_argument("--prompt", default="red apple")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with torch.inference_mode():
        sheet(options.prompt, options.seed).save(options.to, quality=85)


if __name__ == "__main__":
    main()
