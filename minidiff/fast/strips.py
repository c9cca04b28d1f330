"""The autoencoder's large maps, a strip of rows at a time: what lies between two convolutions stays in the cache.

    h = conv1(silu(norm1(x)));  y = skip(x) + conv2(silu(norm2(h)))

In the autoencoder's last level a map of 512 x 512 pixels and 256 channels takes 268 MB. Computed as a whole, norm
and activation each write one more of them to memory. A norm is only a factor and an offset per channel once mean and
variance are known, so both are applied to a few rows just before the convolution reads them. And the blocks of a level
write over what the blocks before them made: fresh memory costs more time than the norms.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.fast import convolutions, winograd
from minidiff.fast.convolutions import empty, passable, rows_of_a_strip
from minidiff.fast.packed import can_pack, convolve, pack_kernel
from minidiff.fast.unchanged import Fast, unwatched
from minidiff.networks.layers import ResBlock
from minidiff.networks.vae import Level

LARGE = 32 * 2**20  # bytes of a map from which strips pay


class FastLevel(Fast):
    """The forward of a ``Level`` of the autoencoder."""

    kind = Level

    def fast(self, x: Tensor) -> Tensor:
        """Run the residual blocks and the change of resolution: (B, C_in, H, W) -> (B, C, H', W')."""
        level = self.module
        if not unwatched(level.res, nn.ModuleList) or not all(map(passable_block, level.res)):
            return NotImplemented
        C_out, C_in = level.res[0].conv1.weight.shape[:2]
        if x.ndim != 4 or x.shape[1] != C_in or not can_pack(x, *level.res.parameters()):
            return NotImplemented
        if x.numel() // C_in * max(C_in, C_out) * x.element_size() < LARGE:
            return NotImplemented
        x = x.contiguous(memory_format=torch.channels_last)
        h = None
        for k, block in enumerate(level.res):
            h = norm_silu_conv(x, block.norm1, block.conv1, out=h)
            mine = x if k > 0 else None  # the first x is the caller's, the others were made here
            x = norm_silu_conv(h, block.norm2, block.conv2, add=(block.skip, x), out=mine)
        del h  # before the larger map is made
        return level.resample(x) if level.resample is not None else x


def passable_block(block: nn.Module) -> bool:
    """Return whether a residual block is as the autoencoder has them, and nothing watches its parts."""
    return (
        unwatched(block, ResBlock, time=None, scale_shift=False, dropout=0.0, scale=1.0)
        and all(unwatched(norm, nn.GroupNorm, affine=True) for norm in (block.norm1, block.norm2))
        and passable(block.conv1)
        and passable(block.conv2)
        and (unwatched(block.skip, nn.Identity) or passable(block.skip, 1))
    )


def norm_silu_conv(
    x: Tensor,
    norm: nn.GroupNorm,
    conv: nn.Conv2d,
    *,
    add: tuple[nn.Module, Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return conv(silu(norm(x))), a 3x3 convolution, plus ``add[0](add[1])``, both applied to each pixel alone.

    The result is written to ``out`` if it is given, which may be ``add[1]`` and must not be x.
    """
    B, C, H, W = x.shape
    a, b = affine(x, norm)
    y = empty((B, conv.out_channels, H, W), x.dtype) if out is None else out
    few = winograd.pays(conv.weight, x)  # few multiplications
    rows = rows_of_a_strip(x, even=few)
    # One buffer for all strips: memory that was just written is in the cache, and fresh memory is slow to come by.
    buffer = empty((B, C, rows + 2, W + 2), x.dtype)
    buffer[:, :, :, 0] = buffer[:, :, :, -1] = 0  # the map ends in zeros
    if few:
        matrices, strip = winograd.pack(conv.weight, B * rows * W // 4), empty((B, conv.out_channels, rows, W), x.dtype)
    else:
        kernel = pack_kernel(conv.weight, 1, (0, 0), buffer)
    for first in range(0, H, rows):
        last = min(first + rows, H)
        h = buffer[:, :, : last - first + 2]  # the rows first - 1 to last, which the kernel sees
        above, below = max(first - 1, 0), min(last + 1, H)
        inside = h[:, :, above - first + 1 : below - first + 1, 1:-1]
        torch.addcmul(b, x[:, :, above:below], a, out=inside)
        F.silu(inside, inplace=True)
        if first == 0:
            h[:, :, 0] = 0
        if last == H:
            h[:, :, -1] = 0
        here = y[:, :, first:last]
        if few:
            z = here if add is None else strip[:, :, : last - first]
            winograd.conv3x3(h, matrices, conv.bias, z)
        else:
            z = convolve(h, kernel, conv.bias, 1, (0, 0))
        if add is not None:
            skip, inputs = add
            torch.add(z, skip(inputs[:, :, first:last]), out=here)
        elif z is not here:
            here.copy_(z)
    return y


def affine(x: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Return factor and offset (B, C, 1, 1) with norm(x) = a x + b.

    a = w / sqrt(var + eps), b = bias - mean a, with mean and variance over the channels of a group and all pixels.
    """
    B, C, H, W = x.shape
    pixels = winograd.pixels(x).reshape(B, H * W, C)
    count = H * W * C // norm.num_groups
    sums, squares = torch.zeros(2, B, C, dtype=torch.float64)
    for part in pixels.split(max(convolutions.STRIP // (B * C * x.element_size()), 1), dim=1):
        part = part.to(torch.promote_types(x.dtype, torch.float32))
        sums += part.sum(dim=1)
        squares += (part * part).sum(dim=1)
    mean = sums.view(B, norm.num_groups, -1).sum(dim=2, keepdim=True) / count
    var = squares.view(B, norm.num_groups, -1).sum(dim=2, keepdim=True) / count - mean**2
    rstd = (var.clamp(min=0) + norm.eps).rsqrt()
    a = rstd * norm.weight.double().view(norm.num_groups, -1)  # (B, G, C / G)
    b = norm.bias.double().view(norm.num_groups, -1) - mean * a
    return a.reshape(B, C, 1, 1).to(x.dtype), b.reshape(B, C, 1, 1).to(x.dtype)
