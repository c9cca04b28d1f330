"""Attention of a few heads at a time, for devices whose attention holds all scores softmax(q k^T / sqrt(K)) in memory.

The scores of one sample are (N, L, L): 537 MB in float32 for 8 heads over the 64 x 64 latents of a picture of 512
pixels. torch's fused kernels never hold them, on the processor and on NVIDIA GPUs; there, slicing saves nothing and
costs time (docs/memory.md has the numbers). Checked against ``enable_attention_slicing`` of diffusers' pipelines.
"""

import logging
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger("minidiff")


def attend_in_slices(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(K)) v, (B, N, L, K), computed for ``heads`` heads of one sample at a time."""
    y = torch.empty_like(q)
    for b in range(len(q)):
        for n in range(0, q.shape[1], heads):
            part = (slice(b, b + 1), slice(n, n + heads))
            bias = mask if mask is None else mask[part[0]]
            y[part] = F.scaled_dot_product_attention(q[part], k[part], v[part], attn_mask=bias)
    return y


class SlicedAttention:
    """What a UNet can do about the memory of its attention."""

    modules: Callable[[], Iterator[nn.Module]]  # of nn.Module

    def set_attention_slice(self, slice_size: str | int | None = "auto") -> None:
        """Compute attention in slices: "auto" half the heads at a time, "max" one head, a number so many, None all.

        Raises:
            ValueError: if it is none of these, or a number above that of the heads of some layer.
        """
        layers = [module for module in self.modules() if hasattr(module, "slice_size")]
        named = slice_size is None or slice_size in ("auto", "max")
        if not named and (isinstance(slice_size, bool) or not isinstance(slice_size, int) or slice_size < 1):
            raise ValueError(f'slice_size should be "auto", "max", a positive integer or None, found {slice_size!r}')
        fewest = min((layer.heads for layer in layers), default=None)
        if not named and fewest is not None and slice_size > fewest:
            raise ValueError(f"slice_size={slice_size}: this UNet has attention of {fewest} heads; that is the largest")
        for layer in layers:
            sizes = {None: None, "auto": max(layer.heads // 2, 1), "max": 1}
            layer.slice_size = sizes[slice_size] if named else slice_size

    def enable_xformers_memory_efficient_attention(self, attention_op: None = None) -> None:
        """Do nothing, and say so: attention is always computed by torch's fused kernels, without xformers."""
        if attention_op is not None:
            raise ValueError(f"attention_op is not implemented, found {attention_op!r}; pass None")
        logger.warning(
            "enable_xformers_memory_efficient_attention changes nothing: torch's fused attention, which uses as little "
            "memory, is always in use"
        )

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Do nothing: torch's fused attention stays in use."""

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: None = None) -> None:
        """Do nothing, and say so if ``valid``."""
        if valid:
            self.enable_xformers_memory_efficient_attention(attention_op)
