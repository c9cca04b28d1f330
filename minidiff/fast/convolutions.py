"""Convolutions with packed weights and, where it can be had, with fewer multiplications."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.fast import winograd
from minidiff.fast.packed import Kept, can_pack, convolve, hooked, pack_kernel, pack_matrix, product
from minidiff.layers import Upsample

STRIP = 4 * 2**20  # bytes of the input that one strip takes, about a core's share of the cache


class FastConv:
    """The forward of an ``nn.Conv2d``."""

    def __init__(self, module: nn.Conv2d, keep: bool) -> None:
        self.module, self._packed, self._matrices = module, Kept(keep), Kept(keep)

    def __call__(self, x: Tensor) -> Tensor:
        """Convolve x (B, C_in, H, W)."""
        W, bias, stride, padding = self.module.weight, self.module.bias, self.module.stride[0], self.module.padding
        if not can_pack(x) or W.dtype != x.dtype:
            return nn.Conv2d.forward(self.module, x)
        if W.shape[2:] == (1, 1) and (stride, padding) == (1, (0, 0)):
            packed = self._packed.get(lambda: pack_matrix(W.flatten(1), x.numel() // x.shape[1]), W)
            return product(winograd.pixels(x).contiguous(), packed, bias).permute(0, 3, 1, 2)
        if (stride, padding) != (1, (1, 1)) or not winograd.pays(W, x):
            packed = self._packed.get(lambda: pack_kernel(W, stride, padding, x), W, shape=x.shape)
            return convolve(x, packed, bias, stride, padding)
        matrices = self._matrices.get(lambda: winograd.pack(W, x.numel() // x.shape[1] // 4), W)
        y = empty((len(x), len(W), *x.shape[2:]), x.dtype)
        for first, last, strip in bordered_strips(x, even=True):
            winograd.conv3x3(strip, matrices, bias, y[:, :, first:last])
        return y


class FastUpsample:
    """The forward of ``Upsample``, which convolves the doubled map without making it.

    In float32 with 9 products for 2x2 pixels (``winograd.conv3x3_doubled``), in bfloat16 with 16: a pixel of the large
    map sees 3x3 pixels of it, which are copies of only 2x2 pixels of the small map: which ones depends on whether its
    row and its column are even or odd. Adding up the weights that meet the same pixel gives one 2x2 kernel for each of
    the four cases. The usual way takes 36.
    """

    def __init__(self, module: Upsample, keep: bool) -> None:
        self.module, self._packed, self._matrices = module, Kept(keep), Kept(keep)

    def __call__(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        """Double height and width of x (B, C, H, W); any other ``size`` is computed in the usual way."""
        B, _, H, W = x.shape
        conv = self.module.conv
        doubled = size is None or tuple(size) == (2 * H, 2 * W)
        if not can_pack(x) or conv.weight.dtype != x.dtype or not doubled or hooked(self.module):
            return Upsample.forward(self.module, x, size)
        y = empty((B, len(conv.weight), 2 * H, 2 * W), x.dtype)
        if winograd.pays_doubled(conv.weight, x):
            matrices = self._matrices.get(
                lambda: winograd.pack(conv.weight, B * H * W, winograd.G_DOUBLED), conv.weight
            )
            for first, last, strip in bordered_strips(x):
                winograd.conv3x3_doubled(strip, matrices, conv.bias, y[:, :, 2 * first : 2 * last])
            return y
        packed = self._packed.get(
            lambda: [pack_kernel(k, 1, (0, 0), x) for k in four_kernels(conv.weight)], conv.weight, shape=x.shape
        )
        for first, last, strip in bordered_strips(x):
            for phase, kernel in enumerate(packed):
                i, j = divmod(phase, 2)  # whether the row and the column are odd
                here = convolve(strip[:, :, i : i + last - first + 1], kernel, conv.bias, 1, (0, 0))
                y[:, :, 2 * first + i : 2 * last : 2, j::2] = here[:, :, :, j : j + W]
        return y


def empty(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Tensor:
    """Return memory for a map (B, C, H, W), the channels last in memory."""
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)


def rows_of_a_strip(x: Tensor, even: bool = False) -> int:
    """Return how many rows of x (B, C, H, W) are taken at a time."""
    rows = max(STRIP // (x.numel() // x.shape[2] * x.element_size()), 1)
    return min(rows + (rows % 2 if even else 0), x.shape[2])


def bordered_strips(x: Tensor, even: bool = False) -> Iterator[tuple[int, int, Tensor]]:
    """Cut x (B, C, H, W) into strips: yield first and last row, and the strip with one more pixel on every side."""
    H, rows = x.shape[2], rows_of_a_strip(x, even)
    for first in range(0, H, rows):
        last = min(first + rows, H)
        above, below = max(first - 1, 0), min(last + 1, H)
        strip = F.pad(x[:, :, above:below], (1, 1, above - first + 1, last + 1 - below))
        yield first, last, strip.contiguous(memory_format=torch.channels_last)


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
