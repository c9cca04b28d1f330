"""Time minidiff against diffusers, side by side in the same run.

    python -m benchmarks.speed                           # import, load, start, text, unet, vae, run, scheduler, memory
    python -m benchmarks.speed unet vae --dtype bfloat16
    python -m benchmarks.speed growth                    # batches 1 to 8 and growing pictures, half an hour
    python -m benchmarks.speed unet --family sdxl --dtype bfloat16
    python -m benchmarks.speed --device cuda --dtype float16 bfloat16

Writes a table, a plot and JSON to --out. ``benchmarks.load`` says more about loading.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.speed import networks, peak, processes, report, runs
from benchmarks.speed.timing import Measured, machine

PARTS = ("import", "load", "start", "text", "unet", "vae", "run", "scheduler", "memory")
SIDES = {"sd15": 64, "sd21": 96, "sdxl": 128}  # latents at the size that the family was trained on


def measure(part: str, options: argparse.Namespace, device: torch.device) -> Iterator[Measured]:
    """Yield what a part measures."""
    rounds, family, side = options.rounds, options.family, options.side or SIDES[options.family]
    if part == "import":
        yield from processes.imports(rounds)
    elif part == "load":
        yield from processes.loads(rounds, options.checkpoint)
    elif part == "start":
        yield from processes.first_picture(rounds)
    elif part == "memory":
        yield from processes.peak_memory(max(rounds // 3, 1))
    elif part == "run":
        for batch in (1, 4):
            yield from runs.whole_runs(device, rounds, batch=batch)
    elif part == "scheduler":
        yield from runs.scheduler_steps(3 * rounds)
    else:
        for name in options.dtype:
            dtype = getattr(torch, name)
            if part == "text":
                yield from networks.text(family, dtype, device, rounds)
            elif part == "unet":
                yield from networks.unet_steps(family, dtype, device, rounds, [(1, side)])
            elif part == "vae":
                yield from networks.vae(family, dtype, device, rounds, [(1, min(side, 64))])
            elif part == "growth":
                sides = (side // 2, side * 3 // 4, side * 3 // 2, side * 2)
                cases = [(batch, side) for batch in (1, 2, 4, 8)] + [(1, one) for one in sides]
                yield from networks.unet_steps(family, dtype, device, 1, cases)


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "growth"], default=list(PARTS), metavar="PART")
    parser.add_argument("--family", choices=SIDES, default="sd15", help="whose networks (default: %(default)s)")
    parser.add_argument("--side", type=int, help="height and width of the latents (default: the family's own)")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, default=3, help="how often each setting is timed (default: %(default)s)")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("runs/sd15"), help="for load: 4 GB of random weights, made if absent"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/speed"), help="folder of the report")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    where = machine(options.device)
    print(", ".join(f"{name} {value}" for name, value in where.items()), flush=True)
    peaks = {name: peak.measure(getattr(torch, name), options.device) for name in options.dtype}
    for name, operations in peaks.items():
        best = max(operations, key=operations.__getitem__)
        print(f"peak in {name}: {operations[best]:.0f} GFLOP/s ({best})", flush=True)
    rows: list[Measured] = []
    for part in options.parts:
        for row in measure(part, options, options.device):
            rows.append(row)
            print(report.table([row], peaks).splitlines()[-1], flush=True)
            written = report.to_json(rows, peaks, where)  # after every row: a long run may be cut off
            (options.out / "speed.json").write_text(json.dumps(written, indent=2) + "\n")
    text = (
        f"{', '.join(f'{k} {v}' for k, v in where.items())}\n\n{report.table(rows, peaks)}\n\n{report.bounds(rows)}\n"
    )
    (options.out / "speed.md").write_text(text)
    report.plot(rows, options.out / "speed.png")
    print(f"\n{report.table(rows, peaks)}\n\n{report.bounds(rows)}\n\nwritten to {options.out}")


if __name__ == "__main__":
    main()
