"""Time minidiff against diffusers, side by side in the same run.

    python -m benchmarks.speed                        # all parts but growth and host, over an hour on two cores
    python -m benchmarks.speed unet vae --dtype bfloat16
    python -m benchmarks.speed whole --steps 4        # a look at whole runs of published size
    python -m benchmarks.speed growth --longest 600   # batches 1 to 8, and pictures until one would not fit
    python -m benchmarks.speed unet --family sd15 sdxl --dtype bfloat16
    python -m benchmarks.speed --device cuda          # float16 and bfloat16; eager, compiled, with CUDA graphs

    part        what is measured
    import      importing a pipeline, beyond torch
    load        SD 1.5 as stored and converted, SDXL as published, from warm and cold files
    start       a fresh process from its first line to the first picture
    text        text encoding
    unet        a guided step
    vae         decoding and encoding
    run         whole runs of the embedded checkpoint
    whole       whole runs of published size, random weights
    scheduler   a step of every scheduler
    memory      the peak of each
    growth      UNet steps and decodings: batches, and pictures up to what fits
    host        a UNet step without its arithmetic: what bounds a GPU in eager mode

Writes tables, plots and JSON to --out; a part that fails is named there, and the others go on. ``benchmarks.load`` says
more about loading.
"""

import argparse
import gc
import json
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import growth, host, memory, networks, peak, plots, processes, report, runs, whole
from benchmarks.speed.timing import Measured, machine

PARTS = ("import", "load", "start", "text", "unet", "vae", "run", "whole", "scheduler", "memory")
ON_REQUEST = ("growth", "host")
SIDES = {"sd15": 64, "sd21": 96, "sdxl": 128}  # latents at the size that the family was trained on
OF_NETWORKS = ("text", "unet", "vae", "whole", "memory", "growth")
DTYPES = {"cpu": ["float32", "bfloat16"], "cuda": ["float16", "bfloat16"]}


def tasks(part: str, options: argparse.Namespace) -> Iterator[tuple[str, Iterator[Measured | str]]]:
    """Yield what a part measures, piece by piece: a name, and what yields figures and what is to be said about them."""
    rounds, device, few = options.rounds, options.device, max(options.rounds // 3, 1)
    if part == "import":
        yield part, processes.imports(rounds)
    elif part == "load" and options.family != ["sdxl"]:
        yield part, processes.loads(rounds, options.checkpoint)
    elif part == "start":
        yield part, processes.first_picture(rounds, device)
    elif part == "scheduler":
        yield part, runs.scheduler_steps(3 * rounds)
    elif part == "memory":
        yield part, memory.import_memory(few)
        yield part, memory.scheduler_memory()
    if part == "run":
        for dtype in options.dtype:
            for batch in (1, 4):
                yield f"{part} in {dtype}", runs.embedded_runs(getattr(torch, dtype), device, rounds, batch=batch)
    for family in options.family:
        if part == "load" and family == "sdxl":
            yield f"{part} of {family}", processes.loads_xl(rounds, options.checkpoint_xl)
        elif part == "host":
            yield f"{part} of {family}", host.host_time(family, 10 * rounds)
        elif part in OF_NETWORKS:
            for dtype in options.dtype:
                yield f"{part} of {family} in {dtype}", measure_networks(part, family, dtype, options, few)


def measure_networks(
    part: str, family: str, name: str, options: argparse.Namespace, few: int
) -> Iterator[Measured | str]:
    """Yield what a part measures of a family's networks in one dtype."""
    gc.collect()  # an optimized network refers to itself: those of the part before are still there
    rounds, device, dtype = options.rounds, options.device, getattr(torch, name)
    side = options.side or SIDES[family]
    # On a CPU, decoding 1024 x 1024 pixels takes half a minute; half the sides suffice to compare.
    decoded = side if device.type == "cuda" else min(side, 64)
    compiled = device.type == "cuda" if options.compiled is None else options.compiled
    common = family, dtype, device
    if part == "text":
        yield from networks.timed(networks.works_of("text", family), *common, 3 * rounds, side, compiled)
    elif part == "unet":
        yield from networks.timed(["unet"], *common, rounds, side, compiled)
    elif part == "vae":
        yield from networks.timed(["decode", "encode"], *common, rounds, decoded, compiled)
    elif part == "whole":
        steps = options.steps or (50 if device.type == "cuda" else 20)
        yield from whole.whole_runs(*common, few, side, steps=steps, compiled=compiled)
    elif part == "memory":
        yield from memory.peak_memory(family, name, device, few, decoded)
    elif part == "growth":  # every case would be compiled anew: only where asked for
        grown = {"longest": options.longest, "compiled": bool(options.compiled)}
        yield from growth.growth(("unet", "decode"), *common, few, side, **grown)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # No choices=: on some versions of Python, argparse checks an absent list against them as if it were one of them.
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all but growth and host")
    parser.add_argument("--family", nargs="+", choices=SIDES, default=["sd15"], help="whose networks (default: sd15)")
    parser.add_argument("--side", type=int, help="height and width of the latents (default: the family's own)")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=("float64", "float32", "float16", "bfloat16"),
        help="default: float32 bfloat16, on a GPU float16 bfloat16",
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, help="how often each setting is timed (default: 3, on a GPU 9)")
    parser.add_argument("--steps", type=int, help="of whole runs of published size (default: 20, on a GPU 50)")
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        help="time torch.compile too, on both sides (default: on a GPU, but for growth)",
    )
    parser.add_argument(
        "--longest", type=float, default=120, help="for growth: seconds that one run may take (default: %(default)s)"
    )
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("runs/sd15"), help="for load: 4 GB of random weights, made if absent"
    )
    parser.add_argument(
        "--checkpoint-xl", type=Path, default=Path("runs/sdxl"), help="for load --family sdxl: 7 GB, made if absent"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="folder of the report")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - {*PARTS, *ON_REQUEST}:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join([*PARTS, *ON_REQUEST])}")
    options.parts = options.parts or list(PARTS)
    kind = options.device.type
    if kind not in DTYPES or (kind == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device {options.device}: there is no such device here, or it is neither a CPU nor a GPU")
    options.dtype = options.dtype or DTYPES[kind]
    options.rounds = options.rounds or (9 if kind == "cuda" else 3)
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark from the command line; return the exit status, 1 if a part failed."""
    options = parse(arguments)
    kind = options.device.type
    options.out.mkdir(parents=True, exist_ok=True)
    where = machine(options.device)
    print(", ".join(f"{name} {value}" for name, value in where.items()), flush=True)
    peaks = {name: peak.measure(getattr(torch, name), options.device) for name in options.dtype}
    for name, operations in peaks.items():
        best = max(operations, key=operations.__getitem__)
        print(f"peak in {name}: {operations[best]:.0f} GFLOP/s ({best})", flush=True)
    rows: list[Measured] = []
    notes: list[str] = []
    failed = False
    for part in options.parts:
        for name, found in tasks(part, options):
            try:
                for one in found:
                    (notes if isinstance(one, str) else rows).append(one)
                    print(one if isinstance(one, str) else report.table([one], peaks).splitlines()[-1], flush=True)
                    write(options, rows, peaks, where, notes)  # after every row: a long run may be cut off
            except Exception as error:
                traceback.print_exc()
                notes.append(f"{name} FAILED: {type(error).__name__}: {error}"[:400])
                write(options, rows, peaks, where, notes)
                failed = True
    plots.ratios(rows, options.out / "speed.png")
    if any(row.part == "growth" for row in rows):
        plots.growth(rows, options.out / "growth.png")
    print(f"\n{report.markdown(rows, peaks, where, notes, kind)}\nwritten to {options.out}")
    return int(failed)


def write(
    options: argparse.Namespace,
    rows: list[Measured],
    peaks: dict[str, dict[str, float]],
    where: dict[str, Any],
    notes: list[str],
) -> None:
    """Write what is known so far as JSON and Markdown."""
    written = report.to_json(rows, peaks, where, notes)
    (options.out / "speed.json").write_text(json.dumps(written, indent=2) + "\n")
    (options.out / "speed.md").write_text(report.markdown(rows, peaks, where, notes, options.device.type))


if __name__ == "__main__":
    sys.exit(main())
