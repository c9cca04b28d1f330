"""Measure what each memory switch saves, and what it costs: ours and diffusers, with the switch and without.

    python -m benchmarks.memory                    # pictures of 512 and 1,024 pixels; minutes on a CPU
    python -m benchmarks.memory --pixels 256       # half the sides
    python -m benchmarks.memory --fake             # nothing is computed, the tensors that would be alive are counted
    python -m benchmarks.memory vae_slicing        # one of the switches

Each figure comes from a fresh process, ours and theirs alternate. What a figure is:

- on a GPU, the peak of allocated memory, weights included;
- on the CPU, the largest resident memory since the call began, less that at its beginning, weights not included;
- with --fake, the largest sum of tensors alive at one time, weights not included: what an allocator has to provide at
  least, for kernels without a workspace of their own. It needs neither time nor memory.

Seconds are those of the processor on the CPU, which other programs that are running do not change, else of the clock.

Offloading is reported as the largest sum of weights on the device at one time, as recorded by it in a run of Stable
Diffusion 1.5 on torch's meta device; on a GPU as the peak there. Prints a Markdown table and writes JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.load import CONFIGS, memory

ROOT = Path(__file__).parents[1]
VAE = json.loads((CONFIGS / "vae" / "config.json").read_text())
# switch -> its settings; the first one is off
SETTINGS = {
    "vae_slicing": ("off", "on"),
    "vae_tiling": ("off", "on"),
    "vae_tiling_encode": ("off", "on"),
    "attention_fused": ("off", "auto", "max"),
    "attention_unfused": ("off", "auto", "max"),
    "offload": ("off", "model", "sequential"),
}
WHAT = {
    "vae_slicing": "decode 4 pictures of {p} pixels, `enable_vae_slicing()`",
    "vae_tiling": "decode 1 picture of {q} pixels in tiles of {p}, `enable_vae_tiling()`",
    "vae_tiling_encode": "encode 1 picture of {q} pixels in tiles of {p}, `enable_vae_tiling()`",
    "attention_fused": "self-attention of SD 1.5 at {p} pixels, 2 x 8 heads, fused; `enable_attention_slicing()`",
    "attention_unfused": "the same where torch has no fused kernel",
    "offload": "weights of SD 1.5 in float16 on the device, `enable_..._cpu_offload()`",
}


def live_tensors() -> Any:
    """Return a context that counts the bytes of the tensors made in it that are alive; ``.peak`` is the most."""
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Live(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.alive: dict[int, tuple[Any, int]] = {}
            self.peak = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            known = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if _is_tensor(tensor)}
            for storage in (tensor.untyped_storage() for tensor in tree_leaves(out) if _is_tensor(tensor)):
                if storage._cdata not in known:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
            self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
            return out

    return Live()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def vae(side: str, switch: str, setting: str, pixels: int) -> Callable[[], Any]:
    """Return the decoding or encoding to measure."""
    if side == "ours":
        from minidiff import AutoencoderKL
    else:
        from diffusers import AutoencoderKL
    model = AutoencoderKL.from_config(VAE).eval()
    model.tile_sample_min_size, model.tile_latent_min_size = pixels, pixels // 8
    if setting == "on":
        model.enable_slicing() if switch == "vae_slicing" else model.enable_tiling()
    if switch == "vae_slicing":
        z = torch.randn(4, 4, pixels // 8, pixels // 8)
        return lambda: model.decode(z).sample
    if switch == "vae_tiling":
        z = torch.randn(1, 4, pixels // 4, pixels // 4)
        return lambda: model.decode(z).sample
    x = torch.rand(1, 3, 2 * pixels, 2 * pixels)
    return lambda: model.encode(x).latent_dist.parameters


def attention(side: str, switch: str, setting: str, pixels: int) -> Callable[[], Any]:
    """Return the self-attention to measure: 320 wide, 8 heads, the widest map of SD 1.5, under guidance."""
    heads = {"off": None, "auto": 4, "max": 1}[setting]
    if side == "ours":
        from minidiff.networks.layers import Attention

        layer: nn.Module = Attention(320, 320, heads=8)
        layer.slice_size = heads
    else:
        from diffusers.models.attention_processor import Attention, AttnProcessor2_0, SlicedAttnProcessor

        layer = Attention(320, heads=8, dim_head=40)
        layer.set_processor(AttnProcessor2_0() if heads is None else SlicedAttnProcessor(heads))
    x = torch.randn(2, (pixels // 8) ** 2, 320)
    return lambda: layer(x)


def run(side: str, switch: str, setting: str, pixels: int, how: str) -> dict[str, float]:
    """Measure once in this process. Only for a fresh process: the peak cannot be measured twice."""
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if how == "fake":
            from torch._subclasses.fake_tensor import FakeTensorMode

            stack.enter_context(FakeTensorMode())
        if switch == "attention_unfused":
            backend = torch.nn.attention.SDPBackend.MATH
            stack.enter_context(torch.nn.attention.sdpa_kernel(backend))
        if how == "cuda":
            torch.set_default_device("cuda")
        work = (attention if switch.startswith("attention") else vae)(side, switch, setting, pixels)
        if how == "fake":
            live = stack.enter_context(live_tensors())
            work()
            return {"peak_mb": live.peak / 1e6, "seconds": float("nan")}
        if how == "rss":
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
        clock = time.perf_counter if how == "cuda" else time.process_time
        before, start = memory()["VmRSS"], clock()
        work()
        if how == "cuda":
            torch.cuda.synchronize()
        seconds = clock() - start
        peak = torch.cuda.max_memory_allocated() if how == "cuda" else memory()["VmHWM"] - before
        return {"peak_mb": peak / 1e6, "seconds": seconds}


def offload(side: str, setting: str, how: str) -> dict[str, float]:
    """Run Stable Diffusion 1.5 with random weights for 2 steps; theirs only on a GPU, where it runs."""
    import minidiff
    from minidiff.pipelines import offload as mechanism

    parts: dict[str, Any] = {}
    for name, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL"), ("text_encoder", "CLIPTextModel")):
        fields = json.loads((CONFIGS / name / "config.json").read_text())
        if side == "ours":
            with torch.device("meta"):
                parts[name] = getattr(minidiff, kind).from_config(fields)
        else:
            import diffusers
            import transformers

            theirs = transformers.CLIPTextConfig(**fields) if name == "text_encoder" else fields
            cls = getattr(transformers if name == "text_encoder" else diffusers, kind)
            parts[name] = cls(theirs) if name == "text_encoder" else cls.from_config(theirs)
        parts[name] = parts[name].half().to_empty(device="cpu") if side == "ours" else parts[name].half()
    if how == "cuda":
        for network in parts.values():
            for parameter in network.parameters():
                parameter.data.uniform_(-0.02, 0.02)
    library = minidiff
    if side == "theirs":
        import diffusers as library
    pipe = library.StableDiffusionPipeline(
        **parts,
        tokenizer=None,
        scheduler=library.DDIMScheduler(beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
    )
    pipe.set_progress_bar_config(disable=True)
    device = "cuda" if how == "cuda" else "meta"
    weights = sum(p.nbytes for network in parts.values() for p in network.parameters())
    if setting == "off":
        pipe.to(device)
    else:
        getattr(pipe, mechanism.METHODS[setting])(device=device)
    here = peak = 0
    to_device, drop = mechanism.to_device, mechanism.ModuleGroup.offload

    def onloaded(tensor: torch.Tensor, where: torch.device) -> torch.Tensor:
        nonlocal here, peak
        here += tensor.nbytes
        peak = max(peak, here)
        return to_device(tensor, where)

    def offloaded(group: mechanism.ModuleGroup) -> None:
        nonlocal here
        here -= sum(one.weight.nbytes for one in group.swapped)
        drop(group)

    mechanism.to_device, mechanism.ModuleGroup.offload = onloaded, offloaded
    embeds = torch.zeros(1, 77, 768, dtype=torch.float16, device=device)
    options = {"num_inference_steps": 2, "prompt_embeds": embeds, "negative_prompt_embeds": embeds}
    with torch.no_grad():
        pipe.text_encoder(torch.zeros(1, 77, dtype=torch.long, device=device))
        if how == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        latents = pipe(**options, output_type="latent").images
        pipe.vae.decode(latents)
    if how == "cuda":
        torch.cuda.synchronize()
        return {"peak_mb": torch.cuda.max_memory_allocated() / 1e6, "seconds": time.perf_counter() - start}
    return {"peak_mb": (weights if setting == "off" else peak) / 1e6, "seconds": float("nan")}


def measure_apart(side: str, switch: str, setting: str, pixels: int, how: str) -> dict[str, float]:
    """Measure once in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--pixels", str(pixels)]
    command += ["--measure", side, switch, setting, how]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return json.loads(output.splitlines()[-1])


def compare(switch: str, pixels: int, how: str, repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return the medians of alternating measurements: setting -> side -> figure."""
    sides = ("ours",) if switch == "offload" and how != "cuda" else ("ours", "theirs")
    repeats = 1 if how == "fake" or switch == "offload" else repeats
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(repeats):
        for setting in SETTINGS[switch]:
            for side in sides:
                runs.setdefault((setting, side), []).append(measure_apart(side, switch, setting, pixels, how))
    return {
        setting: {
            side: {
                figure: statistics.median(one[figure] for one in runs[setting, side])
                for figure in ("peak_mb", "seconds")
            }
            for side in sides
        }
        for setting in SETTINGS[switch]
    }


def rows(switch: str, pixels: int, result: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Return the rows of the Markdown table."""
    what = WHAT[switch].format(p=pixels, q=2 * pixels)
    lines = []
    for setting, sides in result.items():
        cells = [
            f"{sides[s][figure]:.{digits}f}" if s in sides else ""
            for figure, digits in (("peak_mb", 0), ("seconds", 1))
            for s in ("ours", "theirs")
        ]
        lines.append(f"| {what} | {setting} | {' | '.join(cells)} |".replace("nan", ""))
    return lines


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("switch", nargs="*", help=f"of {', '.join(SETTINGS)}; default: all")
    parser.add_argument("--pixels", type=int, default=512, help="side of a picture, or of a tile of one twice as large")
    parser.add_argument("--fake", action="store_true", help="count tensors instead of computing")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "memory.json", help="where to write JSON")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        side, switch, setting, how = options.measure
        one = offload(side, setting, how) if switch == "offload" else run(side, switch, setting, options.pixels, how)
        print(json.dumps(one))
        return
    if unknown := set(options.switch) - set(SETTINGS):
        parser.error(f"unknown switch {', '.join(sorted(unknown))}; there are {', '.join(SETTINGS)}")
    how = "fake" if options.fake else "cuda" if torch.cuda.is_available() else "rss"
    print("| what | setting | peak MB | theirs MB | s | theirs s |\n|---|---|---:|---:|---:|---:|", flush=True)
    results = {}
    for switch in options.switch or SETTINGS:
        results[switch] = compare(switch, options.pixels, how, options.repeats)
        print("\n".join(rows(switch, options.pixels, results[switch])), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "measure": how, "pixels": options.pixels}
    options.out.write_text(json.dumps({**machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
