"""Draw docs/film_strip.png: ``python -m docs.figures.film_strip``.

What the embedded checkpoint predicts at each step for two prompts: in linear colours, and decoded.
"""

import argparse
from pathlib import Path

from PIL import Image

from minidiff import DDIMScheduler, DiffusionPipeline
from minidiff.embedded import GUIDANCE, embedded_checkpoint
from minidiff.previews import FilmStrip, previewer

PROMPTS, SEEDS, STEPS, TILE = ["smiling face with sunglasses", "cat face"], [5, 8], 8, 64


def film_strip() -> Image.Image:
    """Return the strip: each prompt in both ways, one below the other."""
    pipe = DiffusionPipeline.from_pretrained(embedded_checkpoint())
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    films = [FilmStrip(previewer(pipe, vae), TILE) for vae in (None, pipe.vae)]
    for film in films:
        options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "seeds": SEEDS}
        pipe(PROMPTS, **options, callback_on_step_end=film)
    strips = [film.image() for film in films]
    sheet = Image.new("RGB", (STEPS * TILE, 4 * TILE))
    for k in range(len(PROMPTS)):
        for j, strip in enumerate(strips):
            row = strip.crop((0, k * TILE, STEPS * TILE, (k + 1) * TILE))
            sheet.paste(row, (0, (2 * k + j) * TILE))
    return sheet


def main(arguments: list[str] | None = None) -> None:
    """Draw the picture from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("docs"))
    film_strip().quantize(128).save(parser.parse_args(arguments).to / "film_strip.png", optimize=True)


if __name__ == "__main__":
    main()
