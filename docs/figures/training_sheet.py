"""Draw docs/training.png: ``python -m docs.figures.training_sheet --run runs/emoji32``.

The pictures that ``weights/train_emoji32.py`` drew on the way, always from the same seeds, one row per stage; at the
left the number of training steps, and the loss then.
"""

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw

TILE, SHOWN, ZOOM, LABEL = 32, 12, 2, 96


def read_losses(run: Path) -> dict[int, float]:
    """Return the logged loss by step."""
    records = map(json.loads, (run / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def loss_at(losses: dict[int, float], step: int) -> float:
    """Return the loss last logged up to a step."""
    return losses[max(logged for logged in losses if logged <= step)]


def row(sheet: Path, label: str) -> Image.Image:
    """Return the first pictures of a sheet in one row, with a label at the left."""
    edge = TILE * ZOOM
    line = Image.new("RGB", (LABEL + SHOWN * edge, edge), "white")
    ImageDraw.Draw(line).multiline_text((8, edge / 2), label, fill="black", anchor="lm", spacing=6)
    with Image.open(sheet) as pictures:
        columns = pictures.width // TILE
        for k in range(SHOWN):
            left, top = k % columns * TILE, k // columns * TILE
            tile = pictures.crop((left, top, left + TILE, top + TILE))
            line.paste(tile.resize((edge, edge), Image.Resampling.LANCZOS), (LABEL + k * edge, 0))
    return line


def main() -> None:
    """Draw the picture from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/emoji32"))
    parser.add_argument("--steps", type=int, nargs="+", default=[200, 400, 800, 1200, 2400, 2640])
    parser.add_argument("--to", type=Path, default=Path("docs/training.png"))
    args = parser.parse_args()
    losses = read_losses(args.run)
    rows = [
        row(args.run / "samples" / f"{step:05d}.png", f"{step} steps\nloss {loss_at(losses, step):.3f}")
        for step in args.steps
    ]
    picture = Image.new("RGB", (rows[0].width, sum(r.height for r in rows)), "white")
    for i, line in enumerate(rows):
        picture.paste(line, (0, i * line.height))
    picture.save(args.to, optimize=True)


if __name__ == "__main__":
    main()
