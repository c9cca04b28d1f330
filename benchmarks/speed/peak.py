"""The most that the machine multiplies: FLOP/s of the fastest product and convolution, per dtype."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.timing import wait

ROWS, D = 4096, 1280
GPU_ROWS, GPU_D = 16384, 5120  # a GPU is not filled by less
CALLS = 20  # in a row on a GPU, where waiting for one would take as long as it does
CL = torch.channels_last


def measure(dtype: torch.dtype, device: torch.device, repeats: int = 5) -> dict[str, float]:
    """Return GFLOP/s by operation; each is the fastest of ``repeats`` runs."""
    rows, width = (GPU_ROWS, GPU_D) if device.type == "cuda" else (ROWS, D)
    batch = rows // 4096
    x = torch.randn(rows, width, device=device, dtype=dtype)
    W = torch.randn(width, width, device=device, dtype=dtype)
    pixels = torch.randn(batch, width, 64, 64, device=device, dtype=dtype)
    small = torch.randn(batch, 320, 64, 64, device=device, dtype=dtype)
    kernel = torch.randn(320, 320, 3, 3, device=device, dtype=dtype)
    runs: dict[str, tuple[Callable[[], Tensor], float]] = {
        "mm": (lambda: x @ W, 2 * rows * width * width),
        "linear": (lambda: F.linear(x, W), 2 * rows * width * width),
    }
    for name, layout in (("", torch.contiguous_format), (", channels_last", CL)):
        pixels_there, small_there = pixels.to(memory_format=layout), small.to(memory_format=layout)
        W_there, kernel_there = W[:, :, None, None].to(memory_format=layout), kernel.to(memory_format=layout)
        runs[f"1x1 convolution{name}"] = (lambda p=pixels_there, w=W_there: F.conv2d(p, w), 2 * rows * width * width)
        runs[f"3x3 convolution{name}"] = (
            lambda s=small_there, w=kernel_there: F.conv2d(s, w, padding=1),
            2 * 9 * rows * 320 * 320,
        )
    return {name: flop / _fastest(run, repeats, device) / 1e9 for name, (run, flop) in runs.items()}


@torch.no_grad()
def _fastest(run: Callable[[], Tensor], repeats: int, device: torch.device) -> float:
    calls = CALLS if device.type == "cuda" else 1
    seconds = []
    for _ in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            run()
        wait(device)
        seconds.append((time.perf_counter() - start) / calls)
    return min(seconds[1:])
