"""Draw docs/float8.png: ``python -m docs.figures.float8_sheet``.

Pictures of the embedded checkpoint, and the same with the weights of the UNet in float8.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from docs.figures.table import table
from minidiff import StableDiffusionPipeline
from minidiff.embedded import GUIDANCE, embedded_checkpoint

PROMPTS = ["red apple", "dog face", "pizza", "rocket", "hot beverage", "rainbow", "penguin", "bicycle"]
STORED = {"float16": None, "e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LEFT, STEPS = 56, 20


def draw(storage: torch.dtype | None) -> list[Image.Image]:
    """Draw a picture of each prompt with the UNet's weights in a dtype, None for as they are stored."""
    pipe = StableDiffusionPipeline.from_pretrained(embedded_checkpoint("emoji64"))
    pipe.set_progress_bar_config(disable=True)
    if storage is not None:
        pipe.unet.enable_layerwise_casting(storage_dtype=storage)
    seeds = list(range(len(PROMPTS)))
    return pipe(PROMPTS, num_inference_steps=STEPS, guidance_scale=GUIDANCE, seeds=seeds).images


def main(arguments: list[str] | None = None) -> None:
    """Draw the sheet from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?", default=Path("docs/float8.png"))
    output = parser.parse_args(arguments).output
    table({name: draw(storage) for name, storage in STORED.items()}, LEFT).save(output, optimize=True)


if __name__ == "__main__":
    main()
