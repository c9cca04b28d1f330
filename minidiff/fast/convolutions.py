"""Convolutions with packed weights and, where it can be had, with fewer multiplications."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.fast import winograd
from minidiff.fast.packed import Packing, can_pack, convolve, pack_kernel, pack_matrix, product
from minidiff.fast.unchanged import unwatched
from minidiff.networks.layers import Upsample

STRIP = 4 * 2**20  # bytes of the input that one strip takes, about a core's share of the cache
PLAIN_CONV = {"padding_mode": "zeros", "dilation": (1, 1), "groups": 1}  # what is computed here


class FastConv(Packing):
    """The forward of an ``nn.Conv2d``."""

    kind, values = nn.Conv2d, PLAIN_CONV

    def fast(self, input: Tensor) -> Tensor:
        """Convolve x (B, C_in, H, W)."""
        x, W, bias, padding = input, self.module.weight, self.module.bias, self.module.padding
        usual = self.module.stride in ((1, 1), (2, 2)) and padding in ((0, 0), (1, 1))
        if not usual or not can_pack(x, W, bias) or x.ndim != 4 or x.shape[1] != W.shape[1]:
            return NotImplemented
        stride = self.module.stride[0]
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


class FastUpsample(Packing):
    """The forward of ``Upsample``, which convolves the doubled map without making it.

    In float32 with 9 products for 2x2 pixels (``winograd.conv3x3_doubled``), in bfloat16 with 16: a pixel of the large
    map sees 3x3 pixels of it, which are copies of only 2x2 pixels of the small map: which ones depends on whether its
    row and its column are even or odd. Adding up the weights that meet the same pixel gives one 2x2 kernel for each of
    the four cases. The usual way takes 36.
    """

    kind = Upsample

    def fast(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        """Double height and width of x (B, C, H, W)."""
        conv = self.module.conv
        if not passable(conv) or x.ndim != 4 or not can_pack(x, conv.weight, conv.bias):
            return NotImplemented
        B, C, H, W = x.shape
        if conv.weight.shape[1] != C or (size is not None and tuple(size) != (2 * H, 2 * W)):
            return NotImplemented
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


def passable(conv: nn.Module, size: int = 3) -> bool:
    """Return whether a convolution need not be called: one of ``size`` x ``size`` that keeps the size of the map."""
    sizes = {"stride": (1, 1), "padding": (size // 2, size // 2)}
    return unwatched(conv, nn.Conv2d, **PLAIN_CONV, **sizes) and conv.weight.shape[2:] == (size, size)


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
