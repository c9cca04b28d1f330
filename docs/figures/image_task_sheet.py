"""Draw docs/image_to_image.png and docs/inpainting.png: ``python -m docs.figures.image_task_sheet``.

The embedded checkpoint redraws one of its pictures, more and more of it, and repaints the right half of another.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from minidiff import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from minidiff.embedded import GUIDANCE, embedded_checkpoint

STRENGTHS = (0.06, 0.1, 0.14, 0.2, 0.3, 0.5, 1.0)  # from 0.5 on the noise of this checkpoint hides all of the image
TILE, GAP, TOP, STEPS = 64, 6, 16, 50


def half_mask(size: int = TILE) -> Image.Image:
    """Return a mask of the right half of a picture."""
    mask = Image.new("L", (size, size))
    mask.paste(255, (size // 2, 0, size, size))
    return mask


def row(tiles: dict[str, Image.Image]) -> Image.Image:
    """Lay pictures side by side with their names above."""
    sheet = Image.new("RGB", (GAP + len(tiles) * (TILE + GAP), TOP + TILE + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (name, tile) in enumerate(tiles.items()):
        x = GAP + column * (TILE + GAP)
        pen.text((x + TILE / 2, 2), name, fill="black", anchor="ma")
        sheet.paste(tile, (x, TOP))
        pen.rectangle((x - 1, TOP - 1, x + TILE, TOP + TILE), outline="lightgrey")
    return sheet


def image_to_image(pipe: StableDiffusionPipeline, source: str, prompt: str, seed: int) -> Image.Image:
    """Return a picture of ``source`` and what becomes of it by ``prompt`` at each strength."""
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "seed": seed}
    image = pipe(source, **options).images[0]
    redraw = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    redraw.set_progress_bar_config(disable=True)
    tiles = {str(s): redraw(prompt, image=image, strength=s, **options).images[0] for s in STRENGTHS}
    return row({"image": image, **tiles})


def inpainting(pipe: StableDiffusionPipeline, source: str, prompt: str, seed: int) -> Image.Image:
    """Return a picture of ``source``, the mask, and ``prompt`` in its right half: at two strengths, and pasted."""
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "seed": seed}
    image, mask = pipe(source, **options).images[0], half_mask()
    repaint = StableDiffusionInpaintPipeline.from_pipe(pipe)
    repaint.set_progress_bar_config(disable=True)
    asked = {"prompt": prompt, "image": image, "mask_image": mask, **options}
    tiles = {str(s): repaint(**asked, strength=s).images[0] for s in (0.2, 1.0)}
    pasted = repaint.image_processor.apply_overlay(mask, image, tiles["1.0"])
    return row({"image": image, "mask": mask, **tiles, "pasted": pasted})


def main(arguments: list[str] | None = None) -> None:
    """Draw both pictures from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("docs"))
    options = parser.parse_args(arguments)
    pipe = StableDiffusionPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    image_to_image(pipe, "smiling face with sunglasses", "sunflower", 0).save(
        options.to / "image_to_image.png", optimize=True
    )
    inpainting(pipe, "full moon", "sun with face", 2).save(options.to / "inpainting.png", optimize=True)


if __name__ == "__main__":
    main()
