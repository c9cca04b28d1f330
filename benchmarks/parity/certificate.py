"""Compare a checkpoint in minidiff and in the reference: networks, schedulers, pictures; and say where they differ."""

import argparse
import itertools
import json
import platform
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

import minidiff
from benchmarks.parity import components, locate, page, pictures, schedulers
from benchmarks.parity.both import load
from minidiff.embedded import embedded_checkpoint

SUSPICIOUS = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}  # relative error that is no rounding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this part."""
    parser.add_argument("checkpoint", nargs="?", help="folder, Hub id or single file (default: the embedded one)")
    parser.add_argument("--reference", metavar="CHECKPOINT", help="what the reference loads, if not the same")
    parser.add_argument("--prediction-type", help="of a single file that cannot tell: epsilon or v_prediction")
    parser.add_argument("--config", help="a folder that describes a single file of no published family")
    parser.add_argument(
        "--dtype", nargs="+", default=list(components.DTYPES), help="of the networks (default: %(default)s)"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="of the networks")
    parser.add_argument("--steps", type=int, default=20, help="of a picture (default: %(default)s)")
    parser.add_argument(
        "--combinations", type=int, default=4, help="of options per scheduler class (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/parity"), help="folder of the report")


def run(options: argparse.Namespace) -> bool:
    """Compare everything, write the report, and return whether nothing is suspicious."""
    name = options.checkpoint or str(embedded_checkpoint())
    both = load(name, options.reference, options.prediction_type, options.config)
    rows = []
    for row in components.compare(both, tuple(options.dtype), options.device):
        rows.append(row)
        print(components.table([row]).splitlines()[-1], flush=True)
    wrong = {r.what.split(":")[0] for r in rows if not r.relative <= SUSPICIOUS[r.dtype]}
    found = [locate.describe(locate.first_departure(*both.networks()[part]), part) for part in sorted(wrong)]
    for text in found:
        print(text, flush=True)

    drawn = []
    for picture in pictures.draw(both, options.steps):
        drawn.append(picture)
        print(pictures.table([picture]).splitlines()[-1], flush=True)
    chained: dict[str, Any] = {}
    if options.combinations:
        chosen = argparse.Namespace(limit=options.combinations, seconds=float("inf"), seed=0, classes=None)
        chained = schedulers.measure(chosen)

    title = f"minidiff and diffusers on {Path(name).name or name}"
    versions = (
        f"minidiff {minidiff.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}, "
        f"torch {torch.__version__}, {platform.machine()}, {options.device}"
    )
    sections = [("What was compared", versions), ("Networks", components.table(rows))]
    sections += [("Where they differ", "\n\n".join(found))] if found else []
    sections += [("Pictures", pictures.table(drawn))]
    sections += [("Schedulers, whole trajectories in float32", schedulers.table(chained))] if chained else []
    write(options.out, title, sections, drawn, rows, chained)
    print(f"written to {options.out}/parity.md, .html and .json")
    return not wrong


def write(
    folder: Path,
    title: str,
    sections: list[tuple[str, str]],
    drawn: list[pictures.Picture],
    rows: list[components.Row],
    chained: dict[str, Any],
) -> None:
    """Write the report as Markdown, HTML and JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(itertools.chain([f"# {title}"], *((f"## {heading}", body) for heading, body in sections)))
    (folder / "parity.md").write_text(text + "\n")
    (folder / "parity.html").write_text(page.page(title, sections, drawn))
    figures = {
        "networks": [row._asdict() for row in rows],
        "pictures": [
            {"what": p.what, "levels": int(p.levels.max()), "values": int((p.levels > 0).sum())} for p in drawn
        ],
        "schedulers": chained,
    }
    (folder / "parity.json").write_text(json.dumps(figures, indent=2, default=str) + "\n")
