"""Draw docs/clip_image.png: ``python -m docs.figures.clip_image``.

What ``CLIPImageProcessor`` makes of a wide picture, for the safety checker and image prompts: the wide picture is three
pictures of the embedded checkpoint side by side.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from minidiff import CLIPImageProcessor, StableDiffusionPipeline
from minidiff.embedded import GUIDANCE, embedded_checkpoint

PROMPTS, SEEDS, STEPS = ("penguin", "cat face", "rocket"), (1, 8, 2), 20
EDGE, GAP, TOP = 112, 10, 18  # of each step in the picture


def wide() -> Image.Image:
    """Return the pictures side by side."""
    pipe = StableDiffusionPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    images = pipe(list(PROMPTS), num_inference_steps=STEPS, guidance_scale=GUIDANCE, seeds=list(SEEDS)).images
    return Image.fromarray(np.concatenate([np.asarray(image) for image in images], axis=1))


def stages(image: Image.Image) -> dict[str, Image.Image]:
    """Return what the processor makes of an image step by step; at last each channel by itself, grey for 0."""
    pixels = {"do_rescale": False, "do_normalize": False}
    resized = CLIPImageProcessor(**pixels, do_center_crop=False)(image).pixel_values[0]
    cropped = CLIPImageProcessor(**pixels)(image).pixel_values[0]
    values = np.asarray(CLIPImageProcessor()(image).pixel_values[0])
    shown = {f"{image.width}x{image.height}": image}
    for what, array in (("resized", resized), ("its middle", cropped)):
        picture = Image.fromarray(np.asarray(array).astype(np.uint8).transpose(1, 2, 0))
        shown[f"{what}, {picture.width}x{picture.height}"] = picture
    for name, channel in zip(("red", "green", "blue"), values, strict=True):
        grey = np.clip(127.5 + channel * 127.5 / np.abs(values).max(), 0, 255).astype(np.uint8)
        shown[f"{name}, {channel.min():.2f} to {channel.max():.2f}"] = Image.fromarray(grey).convert("RGB")
    return shown


def sheet(shown: dict[str, Image.Image]) -> Image.Image:
    """Return the steps in two rows, the three channels in the second; 224 pixels are drawn as half as many."""
    tiles = [(label, image.resize((image.width * EDGE // image.height, EDGE))) for label, image in shown.items()]
    tiles[0] = next(iter(shown.items()))  # in its own size
    rows = tiles[:3], tiles[3:]
    width = max(sum(GAP + tile.width for _, tile in row) for row in rows) + GAP
    table = Image.new("RGB", (width, len(rows) * (TOP + EDGE + GAP)), "white")
    pen = ImageDraw.Draw(table)
    for k, row in enumerate(rows):
        x, y = GAP, k * (TOP + EDGE + GAP) + TOP
        for label, tile in row:
            pen.text((x, y - 3), label, fill="black", anchor="ls")
            pen.rectangle((x - 1, y - 1, x + tile.width, y + tile.height), outline="lightgrey")
            table.paste(tile, (x, y))
            x += tile.width + GAP
    return table


def main(arguments: list[str] | None = None) -> None:
    """Draw the picture from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("docs/clip_image.png"))
    options = parser.parse_args(arguments)
    sheet(stages(wide())).save(options.to, optimize=True)


if __name__ == "__main__":
    main()
