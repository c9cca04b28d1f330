"""Whole pictures, seed for seed: every scheduler, and every pipeline that the checkpoint is good for."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from PIL import Image

import minidiff
from benchmarks.parity.both import Both

PROMPT = "red apple"
SEED = 7


class Picture(NamedTuple):
    """One picture by both."""

    what: str
    ours: Image.Image
    theirs: Image.Image

    @property
    def levels(self) -> np.ndarray:
        """Differences in levels of 255, (H, W, C)."""
        return np.abs(np.asarray(self.ours, np.int16) - np.asarray(self.theirs, np.int16))

    @property
    def amplified(self) -> Image.Image:
        """The difference as a picture; one level is a fifth of full white."""
        return Image.fromarray((self.levels * 51).clip(0, 255).astype(np.uint8))


def tasks(both: Both, steps: int) -> dict[str, Callable[[Any], Image.Image]]:
    """Return what can be drawn with the checkpoint: name -> function of a pipeline of either library.

    A UNet of 4 channels draws, redraws and inpaints; one of 9 inpaints; one of 8 edits. The refiner redraws.
    """
    kind = type(both.ours).__name__
    generator = {"generator": None}

    def call(pipe: Any, **arguments: Any) -> Image.Image:
        generator["generator"] = torch.Generator().manual_seed(SEED)
        return pipe(num_inference_steps=steps, **generator, **arguments).images[0]

    if kind in ("DDPMPipeline", "DDIMPipeline"):
        return {"a picture from noise": lambda pipe: call(pipe)}
    side = both.ours._latent_size(None, None)[0] * both.ours.vae_scale_factor
    gradient = np.linspace(0, 255, side)[:, None, None] * np.ones((1, side, 3))
    image = Image.fromarray(gradient.astype(np.uint8))
    mask = Image.fromarray((np.arange(side)[None, :] * np.ones((side, 1)) > side // 2).astype(np.uint8) * 255)
    size = {"height": side, "width": side}
    redraw = {
        "image to image": lambda pipe: call(
            _as(pipe, "Img2Img"), prompt=PROMPT, image=image, strength=max(0.6, 1 / steps)
        )
    }
    inpaint = {
        "inpainting": lambda pipe: call(_as(pipe, "Inpaint"), prompt=PROMPT, image=image, mask_image=mask, **size)
    }
    channels = both.ours.unet.config.in_channels
    if channels == 8:
        return {"editing": lambda pipe: call(pipe, prompt=PROMPT, image=image)}
    if channels == 9:
        return inpaint
    if both.ours.config.get("requires_aesthetics_score"):
        return redraw
    return {"text to image": lambda pipe: call(pipe, prompt=PROMPT, **size), **redraw, **inpaint}


def draw(both: Both, steps: int) -> Iterator[Picture]:
    """Yield the first task with every scheduler, the others with the checkpoint's own."""
    what = tasks(both, steps)
    first = next(iter(what))
    own = both.ours.scheduler, both.theirs.scheduler
    kinds = [name for name in minidiff.__all__ if name.endswith("Scheduler") and not name.startswith("EDM")]
    if first == "a picture from noise":
        kinds = (
            ["DDPMScheduler", "DDIMScheduler"] if isinstance(both.ours, minidiff.DDPMPipeline) else ["DDIMScheduler"]
        )
    for kind in kinds:
        both.ours.scheduler = getattr(minidiff, kind).from_config(own[0].config)
        both.theirs.scheduler = getattr(diffusers, kind).from_config(own[1].config)
        yield Picture(f"{first}, {kind}", what[first](both.ours), what[first](both.theirs))
    both.ours.scheduler, both.theirs.scheduler = own
    for name, task in list(what.items())[1:]:
        yield Picture(f"{name}, {type(own[0]).__name__}", task(both.ours), task(both.theirs))


def table(pictures: list[Picture]) -> str:
    """Return the figures as a Markdown table."""
    lines = ["| picture | largest difference, of 255 | values that differ | bit-identical |", "|---|---:|---:|---|"]
    for p in pictures:
        different = int((p.levels > 0).sum())
        lines.append(
            f"| {p.what} | {p.levels.max()} | {different} of {p.levels.size} | {'no' if different else 'yes'} |"
        )
    return "\n".join(lines)


def _as(pipe: Any, task: str) -> Any:
    library = minidiff if type(pipe).__module__.startswith("minidiff") else diffusers
    name = type(pipe).__name__.removesuffix("Pipeline").removesuffix("Img2Img").removesuffix("Inpaint")
    made = getattr(library, f"{name}{task}Pipeline")(**pipe.components)
    made.set_progress_bar_config(disable=True)
    return made
