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

Writes tables, plots and JSON to --out. ``benchmarks.load`` says more about loading.
"""

import argparse
import gc
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.speed import growth, host, memory, networks, peak, plots, processes, report, runs, whole
from benchmarks.speed.timing import Measured, machine

PARTS = ("import", "load", "start", "text", "unet", "vae", "run", "whole", "scheduler", "memory")
ON_REQUEST = ("growth", "host")
SIDES = {"sd15": 64, "sd21": 96, "sdxl": 128}  # latents at the size that the family was trained on
DTYPES = {"cpu": ["float32", "bfloat16"], "cuda": ["float16", "bfloat16"]}


def measure(part: str, options: argparse.Namespace) -> Iterator[Measured | str]:
    """Yield what a part measures, and what is to be said about it."""
    rounds, device, few = options.rounds, options.device, max(options.rounds // 3, 1)
    if part == "import":
        yield from processes.imports(rounds)
    elif part == "load" and options.family != ["sdxl"]:
        yield from processes.loads(rounds, options.checkpoint)
    elif part == "start":
        yield from processes.first_picture(rounds, device)
    elif part == "scheduler":
        yield from runs.scheduler_steps(3 * rounds)
    elif part == "memory":
        yield from memory.import_memory(few)
        yield from memory.scheduler_memory()
    for family in options.family:
        if part == "load" and family == "sdxl":
            yield from processes.loads_xl(rounds, options.checkpoint_xl)
        elif part == "host":
            yield from host.host_time(family, 10 * rounds)
        for dtype in options.dtype:
            yield from measure_networks(part, family, dtype, options, few)
    if part == "run":
        for dtype in options.dtype:
            for batch in (1, 4):
                yield from runs.embedded_runs(getattr(torch, dtype), device, rounds, batch=batch)


def measure_networks(
    part: str, family: str, name: str, options: argparse.Namespace, few: int
) -> Iterator[Measured | str]:
    """Yield what a part measures of a family's networks in one dtype."""
    gc.collect()  # an optimized network refers to itself: those of the part before are still there
    rounds, device, dtype = options.rounds, options.device, getattr(torch, name)
    side = options.side or SIDES[family]
    # On a CPU half the size suffices to compare decodings of SDXL, and a whole picture takes a minute.
    decoded = side if device.type == "cuda" else min(side, SIDES["sd15"])
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


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, *ON_REQUEST], default=list(PARTS), metavar="PART")
    parser.add_argument("--family", nargs="+", choices=SIDES, default=["sd15"], help="whose networks (default: sd15)")
    parser.add_argument("--side", type=int, help="height and width of the latents (default: the family's own)")
    parser.add_argument("--dtype", nargs="+", help="default: float32 bfloat16, on a GPU float16 bfloat16")
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
    kind = options.device.type
    options.dtype = options.dtype or DTYPES[kind]
    options.rounds = options.rounds or (9 if kind == "cuda" else 3)
    options.out.mkdir(parents=True, exist_ok=True)
    where = machine(options.device)
    print(", ".join(f"{name} {value}" for name, value in where.items()), flush=True)
    peaks = {name: peak.measure(getattr(torch, name), options.device) for name in options.dtype}
    for name, operations in peaks.items():
        best = max(operations, key=operations.__getitem__)
        print(f"peak in {name}: {operations[best]:.0f} GFLOP/s ({best})", flush=True)
    rows: list[Measured] = []
    notes: list[str] = []
    for part in options.parts:
        for found in measure(part, options):
            (notes if isinstance(found, str) else rows).append(found)
            print(found if isinstance(found, str) else report.table([found], peaks).splitlines()[-1], flush=True)
            written = report.to_json(rows, peaks, where, notes)  # after every row: a long run may be cut off
            (options.out / "speed.json").write_text(json.dumps(written, indent=2) + "\n")
    (options.out / "speed.md").write_text(report.markdown(rows, peaks, where, notes, kind))
    plots.ratios(rows, options.out / "speed.png")
    if any(row.part == "growth" for row in rows):
        plots.growth(rows, options.out / "growth.png")
    print(f"\n{report.table(rows, peaks)}\n\n{report.bounds(rows, kind)}\n\nwritten to {options.out}")


if __name__ == "__main__":
    main()
