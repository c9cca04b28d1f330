"""How near the pictures of emoji32-ddpm are to its training data: ``python -m weights.emoji32_quality``.

128 pictures are drawn without a prompt, with the seeds 0 to 127, by each of two samplers. The distance of two pictures
is the root of the mean squared difference of their pixels in [0, 1], at 32x32. For each picture drawn,

    d1 = distance to the nearest training picture            d2 = distance to the nearest other one

It counts as a copy if d1 < d2 / 2: it is clearly one training picture and no other. The rest are pictures between
several, and kinds of which the data have many alike (clocks, faces), where no copy can be told from its neighbours. For
scale, the same is measured among the training pictures, each to the nearest other. About two minutes of CPU time.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import minidiff
from minidiff import DDIMPipeline, DDPMPipeline
from minidiff.embedded import embedded_checkpoint
from weights.emoji_reference import Reference, read_reference

SIZE, COUNT, BATCH = 32, 128, 32
RUNS = (("DDPMPipeline", 50), ("DDIMPipeline", 50))  # the first is what the command line does by default
SIDE = 6  # pictures on a side of the sheet


class Nearest(NamedTuple):
    """For each of B pictures: d1 and d2 as above, and the number of the nearest training picture."""

    d1: Tensor
    d2: Tensor
    index: Tensor


def shrink(pictures: Tensor) -> Tensor:
    """Return pictures (N, 3, 64, 64) at the size of the network: the mean of every 2x2 pixels."""
    return F.adaptive_avg_pool2d(pictures, SIZE)


def nearest(pictures: Tensor, reference: Reference) -> Nearest:
    """Compare pictures (B, 3, 32, 32) in [0, 1] with the training pictures; equal training pictures count as one."""
    apart = torch.cdist(pictures.flatten(1), shrink(reference.pictures).flatten(1)) / (3 * SIZE**2) ** 0.5
    groups = torch.tensor(reference.groups)
    d1, index = apart.min(dim=1)
    other = apart.masked_fill(groups[None, :] == groups[index][:, None], torch.inf)
    return Nearest(d1, other.min(dim=1).values, index)


def generate(pipe: DDPMPipeline | DDIMPipeline, steps: int, count: int = COUNT) -> Tensor:
    """Return ``count`` pictures (B, 3, 32, 32) in [0, 1]; picture k has seed k."""
    pipe.set_progress_bar_config(disable=True)
    starts = tqdm(range(0, count, BATCH), unit="batch")
    call = {"num_inference_steps": steps, "output_type": "pt"}
    return torch.cat([pipe(min(BATCH, count - start), seed=start, **call).images for start in starts])


def contact_sheet(pictures: Tensor, reference: Reference, found: Nearest) -> Image.Image:
    """Return the first pictures at twice their size, and beside them, in the same places, the nearest training ones."""
    edge = 2 * SIZE
    sheet = Image.new("RGB", ((2 * SIDE + 1) * edge, SIDE * edge), "white")
    twins = shrink(reference.pictures[found.index])
    for k in range(SIDE**2):
        for picture, left in ((pictures[k], 0), (twins[k], (SIDE + 1) * edge)):
            tile = Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())
            place = (left + k % SIDE * edge, k // SIDE * edge)
            sheet.paste(tile.resize((edge, edge), Image.Resampling.LANCZOS), place)
    return sheet


def measure(found: Nearest) -> dict[str, float]:
    """Return the numbers of one run: the share of copies, the median of d1, and how many training pictures are met."""
    return {
        "copies": round((found.d1 < found.d2 / 2).float().mean().item(), 4),
        "distance": round(found.d1.median().item(), 4),
        "met": len(found.index.unique()),
    }


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a checkpoint folder; default: the embedded one")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--sheet", type=Path, help=f"write the first {SIDE**2} pictures and the nearest of the data")
    args = parser.parse_args()

    reference = read_reference()
    among_data = nearest(shrink(reference.pictures), reference).d2.median().item()
    record = {"pictures": args.count, "distance_in_data": round(among_data, 4), "runs": []}
    for name, steps in RUNS:
        pipe = getattr(minidiff, name).from_pretrained(args.model or embedded_checkpoint("emoji32-ddpm"))
        pictures = generate(pipe, steps, args.count)
        found = nearest(pictures, reference)
        record["runs"].append({"pipeline": name, "steps": steps, **measure(found)})
        if args.sheet and (name, steps) == RUNS[0]:
            contact_sheet(pictures, reference, found).save(args.sheet, optimize=True)
    print(json.dumps(record, indent=2))
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
