"""Measure how fast, and in how much memory, a checkpoint is loaded: ours against diffusers and transformers.

    python -m benchmarks.load [--folder FOLDER] [--repeats 3] [--json runs/load.json]    # Stable Diffusion 1.5
    python -m benchmarks.load --model sdxl                                               # SDXL base, float16

The networks have their full size and random weights, written once to FOLDER tensor by tensor: 4.3 GB in float32 for
Stable Diffusion 1.5, 6.9 GB in float16 for SDXL. Of the first the three networks are loaded, as stored and converted;
the second is loaded as its files are published, with
``StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float16, variant="fp16")``.
Each measurement is a fresh process that has imported everything before the clock starts; ours and theirs alternate on
the same files, which are in the page cache. The figures are medians of:

- time: from the call of ``from_pretrained`` to the last network, by the clock and of the processor (the fairer figure
  on a machine that is busy with other things);
- peak: the largest resident memory since the clock started, less that at the start. Pages of mapped files count as
  soon as they are touched, so this is an upper bound of what is needed beyond the mapped weights;
- anonymous: memory afterwards that is not backed by a file, less that at the start;
- touched: the peak after one value of every page of every weight has been read, so that mapped weights count in full.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
CONFIGS = Path(__file__).parent / "configs" / "stable-diffusion-v1-5"
XL_CONFIGS = ROOT / "tests" / "data" / "hub_configs" / "stabilityai--stable-diffusion-xl-base-1.0"
NETWORKS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
XL_NETWORKS = NETWORKS | {"text_encoder_2": "CLIPTextModelWithProjection"}
DTYPES = {"as stored": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIDES: dict[str, dict[str, Any]] = {  # and the options that make the difference
    "ours": {},
    "theirs": {},  # with accelerate, if it is installed
    "without accelerate": {"low_cpu_mem_usage": False},  # theirs: what diffusers does where accelerate is missing
}
XL_OPTIONS = {"torch_dtype": torch.float16, "variant": "fp16"}
PAGE = 4096  # bytes


def make_checkpoint(folder: Path) -> None:
    """Write the three networks of Stable Diffusion 1.5 in float32 and Hub layout, unless they are there."""
    for name, kind in NETWORKS.items():
        if not any((folder / name).glob("*.safetensors")):
            write_network(kind, CONFIGS / name, folder / name, torch.float32)


def make_xl_checkpoint(folder: Path) -> None:
    """Write SDXL base in float16 and Hub layout, with the tokenizer of a small checkpoint, unless it is there."""
    import minidiff

    if (folder / "model_index.json").exists():
        return
    for name, kind in XL_NETWORKS.items():
        write_network(kind, XL_CONFIGS / name, folder / name, torch.float16, ".fp16")
    tokenizer = minidiff.CLIPTokenizer.from_pretrained(ROOT / "weights" / "emoji64", subfolder="tokenizer")
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer.save_pretrained(folder / name)
    minidiff.EulerDiscreteScheduler(beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text((XL_CONFIGS / "model_index.json").read_text())


def write_network(kind: str, config: Path, folder: Path, dtype: torch.dtype, variant: str = "") -> None:
    """Write a network with random weights, which are never in memory together."""
    import minidiff
    from minidiff.checkpoints.remap import translate
    from minidiff.config import read_json

    with torch.device("meta"):
        network = getattr(minidiff, kind).from_config(read_json(config / "config.json"))
    tensors = translate(torch.nn.Module.state_dict(network), network.rows(), "ours", "hub")
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * dtype.itemsize
        code = {torch.float32: "F32", torch.float16: "F16"}[dtype]
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    noise = torch.empty(2**22).uniform_(-0.05, 0.05).to(dtype).numpy().tobytes()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text((config / "config.json").read_text())
    with (folder / f"{network.weights_stem}{variant}.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for start in range(0, end, len(noise)):
            file.write(noise[: end - start])


def memory() -> dict[str, int]:
    """Return this process's memory in bytes, from /proc: VmRSS, VmHWM (its peak), RssAnon and so on."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}


def load_networks(side: str, dtype: str, folder: Path) -> Any:
    """Return what loads the three networks of Stable Diffusion 1.5, once called."""
    if side == "ours":
        import minidiff as diffusion
        import minidiff as text
    else:
        import diffusers as diffusion
        import transformers as text
    classes = {name: getattr(text if kind.startswith("CLIP") else diffusion, kind) for name, kind in NETWORKS.items()}
    options: dict[str, Any] = {} if DTYPES[dtype] is None else {"torch_dtype": DTYPES[dtype]}
    return lambda: [
        cls.from_pretrained(folder / name, **options, **({} if name == "text_encoder" else SIDES[side]))
        for name, cls in classes.items()
    ]


def load_xl(side: str, folder: Path) -> Any:
    """Return what loads SDXL, once called."""
    if side == "ours":
        from minidiff import StableDiffusionXLPipeline as Pipeline
    else:
        from diffusers import StableDiffusionXLPipeline as Pipeline

    def load() -> list[Any]:
        pipe = Pipeline.from_pretrained(folder, **XL_OPTIONS)
        return [getattr(pipe, name) for name in XL_NETWORKS]

    return load


def measure(model: str, side: str, dtype: str, folder: Path) -> dict[str, float]:
    """Load the networks once in this process. Only for a fresh process: the peak cannot be measured twice."""
    load = load_xl(side, folder) if model == "sdxl" else load_networks(side, dtype, folder)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = memory()
    start, cpu = time.perf_counter(), time.process_time()
    networks = load()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    after = memory()
    weights = [p for network in networks for p in network.parameters()]
    for p in weights:
        p.detach().flatten()[:: PAGE // p.element_size()].sum()
    files = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_mb": (after["VmHWM"] - before["VmRSS"]) / 1e6,
        "anonymous_mb": (after["RssAnon"] - before["RssAnon"]) / 1e6,
        "touched_mb": (memory()["VmHWM"] - before["VmRSS"]) / 1e6,
        "weights_mb": sum(p.nbytes for p in weights) / 1e6,
        "files_mb": files / 1e6,
    }


def measure_apart(model: str, side: str, kind: str, folder: Path) -> dict[str, float]:
    """Call ``measure`` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.load", "--folder", str(folder), "--model", model]
    command += ["--measure", side, kind]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return json.loads(output.splitlines()[-1])


def fresh_memory(size: int) -> float:
    """Return how many seconds a fresh process needs to write ``size`` bytes of new memory, on all threads.

    A converting load has to do that, whoever loads, so it cannot be faster; on a virtual machine it may take most of
    the time.
    """
    code = f"""
import torch, time
memory = torch.empty({size}, dtype=torch.uint8)
start = time.perf_counter()
memory.fill_(1)
print(time.perf_counter() - start)
"""
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return float(output)


def warm(folder: Path) -> None:
    """Bring the weights into the page cache."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass


def cool(folder: Path) -> None:
    """Ask the system to drop the weights from the page cache."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(model: str, folder: Path, repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return the medians of ``repeats`` alternating measurements: dtype -> side -> figure."""
    warm(folder)
    kinds, sides = (["as stored"], ["ours", "theirs"]) if model == "sdxl" else (DTYPES, SIDES)
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(repeats):
        for kind in kinds:
            for side in sides:
                runs.setdefault((kind, side), []).append(measure_apart(model, side, kind, folder))
    return {
        kind: {
            side: {figure: statistics.median(run[figure] for run in runs[kind, side]) for figure in runs[kind, side][0]}
            for side in sides
        }
        for kind in kinds
    }


def report(result: dict[str, dict[str, dict[str, float]]]) -> str:
    """Format the medians as a table."""
    head = f"{'dtype':<10} {'side':<18} {'seconds':>8} {'CPU s':>6} {'peak MB':>9} {'anonymous':>9} "
    head += f"{'touched':>8} {'files':>6}"
    lines = [
        f"{kind:<10} {side:<18} {m['seconds']:8.2f} {m['cpu_seconds']:6.2f} {m['peak_mb']:9.0f} "
        f"{m['anonymous_mb']:9.0f} {m['touched_mb']:8.0f} {m['files_mb']:6.0f}"
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
    parser.add_argument("--model", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--folder", type=Path, help="the checkpoint, made if absent; default: runs/MODEL")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("runs/load.json"), help="where to write the result")
    parser.add_argument("--measure", nargs=2, metavar=("SIDE", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    folder = options.folder or Path("runs") / options.model
    if options.measure:
        print(json.dumps(measure(options.model, *options.measure, folder)))
        return
    make_xl_checkpoint(folder) if options.model == "sdxl" else make_checkpoint(folder)
    result: dict[str, Any] = compare(options.model, folder, options.repeats)
    print(report(result))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
