"""What can only be measured in a fresh process: importing, the first picture from a cold start, peak memory."""

from collections.abc import Iterator
from pathlib import Path

from benchmarks import load
from benchmarks.speed.timing import Measured, in_fresh_processes
from minidiff.embedded import GUIDANCE, embedded_checkpoint

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
pipe.set_progress_bar_config(disable=True)
{optimize}
pipe("red apple", num_inference_steps={steps}, guidance_scale={guidance}, generator=torch.manual_seed(0))
print(time.perf_counter() - start)
"""

MEMORY = """
import torch
from pathlib import Path
from benchmarks.load import memory
from benchmarks.speed.networks import fields_of, empty
import diffusers, minidiff
from minidiff.fast import optimize
kind, setting = {kind!r}, {setting!r}
library = minidiff if setting.startswith("ours") else diffusers
fields = fields_of("sd15", kind)
name = "AutoencoderKL" if kind == "vae" else "UNet2DConditionModel"
network = empty(lambda: getattr(library, name).from_config(fields), torch.{dtype}, torch.device("cpu"))
if "optimized" in setting:
    optimize(network)
if "channels_last" in setting:
    network.to(memory_format=torch.channels_last)
z, ctx = torch.randn(2, 4, 64, 64).to(network.dtype), torch.randn(2, 77, 768).to(network.dtype)
with torch.no_grad():
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory()["VmRSS"]
    if kind == "vae":
        network.decode(z[:1])
    else:
        network(z, 501, ctx)
print((memory()["VmHWM"] - before) / 1e6)
"""
SETTINGS = ("ours", "ours, optimized", "theirs", "theirs, channels_last")


def imports(rounds: int) -> Iterator[Measured]:
    """Time the import of the pipeline class beyond torch."""
    codes = {"ours": IMPORT.format(library="minidiff"), "theirs": IMPORT.format(library="diffusers")}
    yield Measured("import", "import StableDiffusionPipeline, beyond torch", "", in_fresh_processes(codes, rounds))


def first_picture(rounds: int, steps: int = 25) -> Iterator[Measured]:
    """Time a fresh process from its first line to a picture of the embedded checkpoint."""
    common = {"checkpoint": str(embedded_checkpoint()), "steps": steps, "guidance": GUIDANCE, "optimize": ""}
    codes = {
        "ours": START.format(library="minidiff", options="", **common),
        "ours, optimized": START.format(library="minidiff", options="", **{**common, "optimize": "pipe.optimize()"}),
        "theirs": START.format(library="diffusers", options=", safety_checker=None", **common),
    }
    what = f"cold start to the first picture, embedded checkpoint, {steps} steps"
    yield Measured("start", what, "float32", in_fresh_processes(codes, rounds))


def loads(rounds: int, folder: Path) -> Iterator[Measured]:
    """Time loading the networks of SD 1.5 in fresh processes: as stored and converted, from warm and cold files."""
    load.make_checkpoint(folder)
    for kind in load.DTYPES:
        for state, prepare in {"warm": load.warm, "cold": load.cool}.items():
            seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
            memory: dict[str, list[float]] = {"ours": [], "theirs": []}
            for _ in range(rounds):
                for side in seconds:
                    prepare(folder)
                    figures = load.measure_apart("sd15", side, kind, folder)
                    seconds[side].append(figures["seconds"])
                    memory[side].append(figures["peak_mb"])
            yield Measured("load", f"load the networks of SD 1.5, {state} files", kind, seconds)
        what = "loading as stored" if kind == "as stored" else "a converting load"
        yield Measured("load", f"peak memory of {what}", kind, memory, unit="MB")


def peak_memory(rounds: int, dtype: str = "float32") -> Iterator[Measured]:
    """Measure how far the resident memory rises above the loaded weights."""
    for kind, what in {"unet": "guided UNet step at 512x512", "vae": "VAE decode at 512x512"}.items():
        codes = {name: MEMORY.format(kind=kind, setting=name, dtype=dtype) for name in SETTINGS}
        figures = in_fresh_processes(codes, rounds)
        yield Measured("memory", f"peak memory beyond the weights, sd15 {what}", dtype, figures, unit="MB")
