"""Two layers with less work: a feed-forward layer that stays in the cache, an upsampling that sees no pixel twice."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.fast.packed import Kept, can_pack, convolve, hooked, pack_kernel
from minidiff.fast.strips import STRIP, empty
from minidiff.layers import GEGLU, Upsample

ROWS = 1024  # of the feed-forward layer at a time: 10 MB of hidden units in float32 where D = 320


class FastGEGLU:
    """The forward of ``GEGLU`` over blocks of rows: the hidden units, 8 times as wide as x, never leave the cache."""

    def __init__(self, module: GEGLU, keep: bool) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        """Compute fc2(a * gelu(b)) with (a, b) = fc1(x) for x (B, L, D)."""
        if not can_pack(x):
            return GEGLU.forward(self.module, x)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows, filled = x.reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1])
        for first in range(0, len(rows), ROWS):
            block = slice(first, first + ROWS)
            a, b = self.module.fc1(rows[block]).chunk(2, dim=-1)
            filled[block] = self.module.fc2(F.gelu(b).mul_(a))
        return out


class FastUpsample:
    """The forward of ``Upsample``: four 2x2 convolutions of the small map instead of one 3x3 of the large.

    A pixel of the large map sees 3x3 pixels of it, which are copies of only 2x2 pixels of the small map: which ones
    depends on whether its row and its column are even or odd. Adding up the weights that meet the same pixel gives one
    2x2 kernel for each of the four cases, and 4/9 of the work. The kernels are 16/9 the size of the original.
    """

    def __init__(self, module: Upsample, keep: bool) -> None:
        self.module, self._packed = module, Kept(keep)

    def __call__(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        """Double height and width of x (B, C, H, W); any other ``size`` is computed in the usual way."""
        B, C, H, W = x.shape
        conv = self.module.conv
        doubled = size is None or tuple(size) == (2 * H, 2 * W)
        if not can_pack(x) or conv.weight.dtype != x.dtype or not doubled or hooked(self.module):
            return Upsample.forward(self.module, x, size)
        packed = self._packed.get(
            lambda: [pack_kernel(k, 1, (0, 0), x) for k in four_kernels(conv.weight)], conv.weight
        )
        y = empty((B, len(conv.weight), 2 * H, 2 * W), x.dtype)
        rows = min(max(STRIP // (B * C * W * x.element_size()), 1), H)
        for first in range(0, H, rows):
            last = min(first + rows, H)
            above, below = max(first - 1, 0), min(last + 1, H)
            strip = F.pad(x[:, :, above:below], (1, 1, above - first + 1, last + 1 - below))
            strip = strip.contiguous(memory_format=torch.channels_last)
            for phase, kernel in enumerate(packed):
                i, j = divmod(phase, 2)  # whether the row and the column are odd
                here = convolve(strip[:, :, i : i + last - first + 1], kernel, conv.bias, 1, (0, 0))
                y[:, :, 2 * first + i : 2 * last : 2, j::2] = here[:, :, :, j : j + W]
        return y


def four_kernels(W: Tensor) -> list[Tensor]:
    """Add up the weights (C_out, C_in, 3, 3) that meet the same small pixel: four of (C_out, C_in, 2, 2).

    In one dimension: an even pixel 2i sees 2i-1, 2i, 2i+1, which are copies of i-1, i, i: weights w0 and w1 + w2. An
    odd one sees 2i, 2i+1, 2i+2, copies of i, i, i+1: weights w0 + w1 and w2.
    """

    def halves(w: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        w0, w1, w2 = w.unbind(axis)
        return torch.stack([w0, w1 + w2], axis), torch.stack([w0 + w1, w2], axis)

    precise = W.double() if W.dtype == torch.float64 else W.float()
    return [kernel.to(W.dtype) for rows in halves(precise, 2) for kernel in halves(rows, 3)]
