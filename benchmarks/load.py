"""Measure how fast, and in how much memory, Stable Diffusion 1.5 is loaded: ours against diffusers and transformers.

    python -m benchmarks.load [--folder FOLDER] [--repeats 3] [--json runs/load.json]

The three networks have their full size and random weights (4.3 GB in float32, made once in FOLDER by minidiff itself).
Each measurement is a fresh process that has imported everything before the clock starts; ours and theirs alternate on
the same files, which are in the page cache. The figures are medians of:

- time: from the call of ``from_pretrained`` to the last network, by the clock and of the processor (the fairer figure
  on a machine that is busy with other things);
- peak: the largest resident memory since the clock started, less that at the start. Pages of mapped files count as
  soon as they are touched, so this is an upper bound of what is needed beyond the mapped weights;
- anonymous: memory afterwards that is not backed by a file, less that at the start.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).parent / "configs" / "stable-diffusion-v1-5"
NETWORKS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
DTYPES = {"as stored": None, "bfloat16": torch.bfloat16}
SIDES: dict[str, dict[str, Any]] = {  # and the options that make the difference
    "ours": {},
    "theirs": {},  # with accelerate, if it is installed
    "without accelerate": {"low_cpu_mem_usage": False},  # theirs: what diffusers does where accelerate is missing
}


def make_checkpoint(folder: Path) -> None:
    """Write the three networks with random float32 weights in Hub layout, unless they are there."""
    import minidiff
    from minidiff.config import read_json

    for name, kind in NETWORKS.items():
        if any((folder / name).glob("*.safetensors")):
            continue
        with torch.device("meta"):
            network = getattr(minidiff, kind).from_config(read_json(CONFIGS / name / "config.json"))
        network.to_empty(device="cpu")
        for parameter in network.parameters():
            parameter.data.uniform_(-0.05, 0.05)
        network.save_pretrained(folder / name)


def memory() -> dict[str, int]:
    """Return this process's memory in bytes, from /proc: VmRSS, VmHWM (its peak), RssAnon and so on."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}


def measure(side: str, dtype: str, folder: Path) -> dict[str, float]:
    """Load the networks once in this process. Only for a fresh process: the peak cannot be measured twice."""
    if side == "ours":
        import minidiff as diffusion
        import minidiff as text
    else:
        import diffusers as diffusion
        import transformers as text
    classes = {name: getattr(text if kind.startswith("CLIP") else diffusion, kind) for name, kind in NETWORKS.items()}
    options: dict[str, Any] = {} if DTYPES[dtype] is None else {"torch_dtype": DTYPES[dtype]}
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = memory()
    start, cpu = time.perf_counter(), time.process_time()
    networks = [
        cls.from_pretrained(folder / name, **options, **({} if name == "text_encoder" else SIDES[side]))
        for name, cls in classes.items()
    ]
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    after = memory()
    weights = sum(p.numel() * p.element_size() for network in networks for p in network.parameters())
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_mb": (after["VmHWM"] - before["VmRSS"]) / 1e6,
        "anonymous_mb": (after["RssAnon"] - before["RssAnon"]) / 1e6,
        "weights_mb": weights / 1e6,
    }


def measure_apart(side: str, kind: str, folder: Path) -> dict[str, float]:
    """Call ``measure`` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.load", "--folder", str(folder), "--measure", side, kind]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]).stdout
    return json.loads(output.splitlines()[-1])


def compare(folder: Path, repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return the medians of ``repeats`` alternating measurements: dtype -> side -> figure."""
    for path in folder.rglob("*.safetensors"):  # into the page cache
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(repeats):
        for kind in DTYPES:
            for side in SIDES:
                runs.setdefault((kind, side), []).append(measure_apart(side, kind, folder))
    return {
        kind: {
            side: {figure: statistics.median(run[figure] for run in runs[kind, side]) for figure in runs[kind, side][0]}
            for side in SIDES
        }
        for kind in DTYPES
    }


def report(result: dict[str, dict[str, dict[str, float]]]) -> str:
    """Format the medians as a table."""
    head = (
        f"{'dtype':<10} {'side':<18} {'seconds':>8} {'CPU s':>6} {'peak MB':>9} {'anonymous MB':>13} {'weights MB':>11}"
    )
    lines = [
        f"{kind:<10} {side:<18} {m['seconds']:8.2f} {m['cpu_seconds']:6.2f} {m['peak_mb']:9.0f} "
        f"{m['anonymous_mb']:13.0f} {m['weights_mb']:11.0f}"
        for kind, sides in result.items()
        for side, m in sides.items()
    ]
    ratios = [
        f"{kind}: {sides['ours']['seconds'] / m['seconds']:.2f} of the time of {side}"
        for kind, sides in result.items()
        for side, m in sides.items()
        if side != "ours"
    ]
    return "\n".join([head, *lines, *ratios])


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/sd15"), help="the checkpoint, made if absent")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("runs/load.json"), help="where to write the result")
    parser.add_argument("--measure", nargs=2, metavar=("SIDE", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(*options.measure, options.folder)))
        return
    make_checkpoint(options.folder)
    result: dict[str, Any] = compare(options.folder, options.repeats)
    print(report(result))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
