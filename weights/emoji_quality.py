"""How often emoji64 draws what it is told: ``python -m weights.emoji_quality``.

200 names, drawn once from the training data, are generated with one fixed seed each, 25 UniPC steps and the guidance
below. A picture is right if its nearest training picture, by squared difference of pixels, is the one of that name
(or one that is equal to it pixel for pixel in the data). The distance is taken at 16x16 (averaged) and at 64x64.
Chance is 1 in 1,636. About a minute and a half of CPU time with OMP_NUM_THREADS=1.
"""

import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from minidiff import StableDiffusionPipeline
from minidiff.embedded import embedded_checkpoint
from weights.emoji_reference import Reference, read_reference

COUNT, STEPS, BATCH = 200, 25, 25
GUIDANCE = 2.0  # tuned once, on other names than the 200: see the model card
SHOWN = 24  # the first of the 200, so the sheet is as good as the measure


class Quality(NamedTuple):
    """The share of right pictures by the distance at 16x16 and at 64x64, and which were right at 64x64."""

    at_16: float
    at_64: float
    right: list[bool]


def sample_names(reference: Reference, count: int = COUNT, seed: int = 0) -> list[int]:
    """Return ``count`` different pictures of the data, in random order."""
    return random.Random(seed).sample(range(len(reference.names)), count)


def generate(pipe: StableDiffusionPipeline, prompts: list[str], guidance: float, steps: int = STEPS) -> Tensor:
    """Return one picture per prompt, (B, 3, 64, 64) in [0, 1]; picture k has seed k."""
    pictures = []
    pipe.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, len(prompts), BATCH), unit="batch"):
        some = prompts[start : start + BATCH]
        out = pipe(some, num_inference_steps=steps, guidance_scale=guidance, seed=start, output_type="pt")
        pictures.append(out.images)
    return torch.cat(pictures)


def nearest(pictures: Tensor, reference: Tensor, size: int) -> Tensor:
    """Return the index of the nearest reference picture of each picture, (B,), compared at ``size`` x ``size``."""
    a, b = (F.adaptive_avg_pool2d(x.float(), size).flatten(1) for x in (pictures, reference))
    return torch.cdist(a, b).argmin(dim=1)


def measure(pictures: Tensor, chosen: list[int], reference: Reference) -> Quality:
    """Compare pictures with the training pictures ``chosen`` they should be."""
    groups = torch.tensor(reference.groups)
    right = [groups[nearest(pictures, reference.pictures, size)] == groups[chosen] for size in (16, 64)]
    return Quality(right[0].float().mean().item(), right[1].float().mean().item(), right[1].tolist())


def contact_sheet(pictures: Tensor, names: list[str], columns: int = 8) -> Image.Image:
    """Return the pictures at twice their size with their names below, ``columns`` in a row."""
    width, height = 136, 164
    sheet = Image.new("RGB", (columns * width, -(-len(names) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        x, y = i % columns * width, i // columns * height
        tile = Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())
        sheet.paste(tile.resize((128, 128), Image.Resampling.LANCZOS), (x + 4, y + 4))
        for line, text in enumerate(_two_lines(name)):
            draw.text((x + width / 2, y + 134 + 13 * line), text, fill="black", anchor="ma")
    return sheet


def _two_lines(name: str, width: int = 22) -> list[str]:
    """Break a name into at most two lines of about ``width`` letters."""
    lines = [""]
    for word in name.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines if len(lines) <= 2 else [lines[0], lines[1] + "…"]


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None, help="a checkpoint folder; default: the embedded one")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--names-seed", type=int, default=0, help="another sample of names, to tune on")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--sheet", type=Path, help=f"write a contact sheet of the first {SHOWN} pictures there")
    args = parser.parse_args()

    reference = read_reference()
    chosen = sample_names(reference, seed=args.names_seed)
    names = [reference.names[i] for i in chosen]
    pipe = StableDiffusionPipeline.from_pretrained(args.model or embedded_checkpoint())
    pictures = generate(pipe, names, args.guidance)
    quality = measure(pictures, chosen, reference)
    print(f"nearest training picture is the right one: {quality.at_16:.1%} at 16x16, {quality.at_64:.1%} at 64x64")
    print(f"({len(names)} names, {STEPS} steps of {type(pipe.scheduler).__name__}, guidance {args.guidance})")
    if args.json:
        settings = {"names": len(names), "steps": STEPS, "guidance": args.guidance, "names_seed": args.names_seed}
        record = {"at_16": quality.at_16, "at_64": quality.at_64, **settings}
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if args.sheet:
        contact_sheet(pictures[:SHOWN], names[:SHOWN]).save(args.sheet, optimize=True)


if __name__ == "__main__":
    main()
