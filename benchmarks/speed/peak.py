"""The most that the machine multiplies: FLOP/s of the fastest product and convolution, per dtype."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, D = 4096, 1280
CL = torch.channels_last


def measure(dtype: torch.dtype, device: torch.device, repeats: int = 5) -> dict[str, float]:
    """Return GFLOP/s by operation; each is the fastest of ``repeats`` runs."""
    x, W = torch.randn(ROWS, D, device=device, dtype=dtype), torch.randn(D, D, device=device, dtype=dtype)
    pixels = x.T.reshape(1, D, 64, 64).contiguous()
    small = torch.randn(1, 320, 64, 64, device=device, dtype=dtype)
    kernel = torch.randn(320, 320, 3, 3, device=device, dtype=dtype)
    runs: dict[str, tuple[Callable[[], Tensor], float]] = {
        "mm": (lambda: x @ W, 2 * ROWS * D * D),
        "linear": (lambda: F.linear(x, W), 2 * ROWS * D * D),
    }
    for name, layout in (("", torch.contiguous_format), (", channels_last", CL)):
        pixels_there, small_there = pixels.to(memory_format=layout), small.to(memory_format=layout)
        W_there, kernel_there = W[:, :, None, None].to(memory_format=layout), kernel.to(memory_format=layout)
        runs[f"1x1 convolution{name}"] = (lambda p=pixels_there, w=W_there: F.conv2d(p, w), 2 * ROWS * D * D)
        runs[f"3x3 convolution{name}"] = (
            lambda s=small_there, w=kernel_there: F.conv2d(s, w, padding=1),
            2 * 9 * 4096 * 320 * 320,
        )
    return {name: flop / _fastest(run, repeats, device) / 1e9 for name, (run, flop) in runs.items()}


@torch.no_grad()
def _fastest(run: Callable[[], Tensor], repeats: int, device: torch.device) -> float:
    seconds = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
