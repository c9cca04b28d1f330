"""What can only be timed in a fresh process: importing, loading, and the first picture from a cold start."""

from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import load
from benchmarks.speed.timing import Measured, in_fresh_processes
from minidiff.embedded import GUIDANCE, embedded_checkpoint

FRESH = "fresh memory"  # the time to write as much new memory as the weights take, which no load can do without

IMPORT = """
import torch, time
start = time.perf_counter()
from {library} import StableDiffusionPipeline
print(time.perf_counter() - start)
"""

START = """
import time
start = time.perf_counter()
from {library} import StableDiffusionPipeline
import torch
pipe = StableDiffusionPipeline.from_pretrained({checkpoint!r}, torch_dtype=torch.float32{options})
pipe.text_encoder.to(torch.float32)
pipe.to({device!r})
pipe.set_progress_bar_config(disable=True)
{optimize}
pipe("red apple", num_inference_steps={steps}, guidance_scale={guidance}, generator=torch.manual_seed(0))
print(time.perf_counter() - start)
"""


def imports(rounds: int) -> Iterator[Measured]:
    """Time the import of the pipeline class beyond torch."""
    codes = {"ours": IMPORT.format(library="minidiff"), "theirs": IMPORT.format(library="diffusers")}
    yield Measured("import", "import StableDiffusionPipeline, beyond torch", "", in_fresh_processes(codes, rounds))


def first_picture(rounds: int, device: torch.device, steps: int = 25) -> Iterator[Measured]:
    """Time a fresh process from its first line to a picture of the embedded checkpoint."""
    common = {"checkpoint": str(embedded_checkpoint()), "steps": steps, "guidance": GUIDANCE, "device": str(device)}
    ours = {"library": "minidiff", "options": "", **common}
    codes = {
        "ours": START.format(optimize="", **ours),
        "ours, optimized": START.format(optimize="pipe.optimize()", **ours),
        "theirs": START.format(library="diffusers", options=", safety_checker=None", optimize="", **common),
    }
    what = f"cold start to the first picture, embedded checkpoint, {steps} steps"
    yield Measured("start", what, "float32", in_fresh_processes(codes, rounds))


def loads(rounds: int, folder: Path) -> Iterator[Measured]:
    """Time loading the networks of SD 1.5 in fresh processes: as stored and converted, from warm and cold files.

    The files hold float32; beside them lie some in float16, which are loaded as stored.
    """
    load.make_checkpoint(folder)
    for kind in load.DTYPES:
        yield from _load(folder, kind, "SD 1.5", rounds)
    half = folder.with_name(folder.name + "-float16")
    for name, network in load.NETWORKS.items():
        if not any((half / name).glob("*.safetensors")):
            load.write_network(network, load.CONFIGS / name, half / name, torch.float16)
    yield from _load(half, "float16", "SD 1.5 stored in float16", rounds, as_stored=True)


def loads_xl(rounds: int, folder: Path) -> Iterator[Measured]:
    """Time loading SDXL in float16 as its files are published, from warm and cold files."""
    load.make_xl_checkpoint(folder)
    yield from _load(folder, "as stored", "SDXL stored in float16", rounds, as_stored=True, model="sdxl")


def _load(
    folder: Path, kind: str, what: str, rounds: int, *, as_stored: bool = False, model: str = "sd15"
) -> Iterator[Measured]:
    """Time one way of loading, and measure the memory that it takes."""
    as_stored = as_stored or kind == "as stored"
    dtype = "float16" if model == "sdxl" else kind
    memory: dict[str, list[float]] = {"ours": [], "theirs": []}
    for state, prepare in {"warm": load.warm, "cold": load.cool}.items():
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(rounds):
            for side in memory:
                prepare(folder)
                figures = load.measure_apart(model, side, kind, folder)
                seconds[side].append(figures["seconds"])
                if state == "warm":  # mapped pages count once they are touched, and of cold files fewer are
                    memory[side].append(figures["peak_mb"])
            if not as_stored and state == "warm":
                fresh = load.fresh_memory(round(1e6 * figures["weights_mb"]))
                seconds.setdefault(FRESH, []).append(fresh)
        yield Measured("load", f"load the networks of {what}, {state} files", dtype, seconds)
    loading = "loading as stored" if as_stored else "a converting load"
    yield Measured("load", f"peak memory of {loading}, {what}", dtype, memory, unit="MB")
