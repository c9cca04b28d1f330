"""Attention in blocks of rows whose scores stay in the cache.

    h[r] = softmax(q[r] k^T / sqrt(K)) v        for a block r of rows at a time

torch's fused CPU kernel spends most of its time outside the matrix products where heads are narrow (K = 40 over 4,096
pixels in Stable Diffusion 1.x). Two products and a softmax per block take 0.3 to 0.7 of its time. Over long sequences
the blocks are of one head at a time, with keys and values packed as if they were weights; in bfloat16 over short ones,
such as texts, they are of all heads at once. In bfloat16 the scores are rounded to bfloat16 before the softmax, which
the fused kernel does not do; the error that this adds is measured in ``benchmarks``.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.fast.memo import copies, repeated, text_keys
from minidiff.fast.packed import can_pack, pack_matrix, product
from minidiff.fast.unchanged import Fast
from minidiff.networks.layers import Attention

ROWS = 256  # rows of a block: its scores over 4,096 pixels take 4 MB
LEAST = 1024  # pixels and keys; for fewer, the fused kernel is faster than one head at a time
MOST = 1024  # keys; for more, one head at a time is faster than all at once
SCORES = 4 * 2**20  # bytes of the scores of a block of all heads


class FastAttention(Fast):
    """The forward of ``Attention``: keys and values of the text from the run's memo, long sequences in blocks."""

    kind = Attention
    values: ClassVar = {"slice_size": None}  # otherwise the caller chose to save memory

    def fast(self, x: Tensor, ctx: Tensor | None = None, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Attend from ``x`` (B, L, D) to ``ctx`` (B, L_ctx, D_ctx)."""
        module, N = self.module, self.module.heads
        if x.ndim != 3 or (ctx is not None and ctx.ndim != 3):
            return NotImplemented
        count = copies(module)
        x = x[: len(x) // count]
        q = module.q(x)
        if ctx is None:
            k, v = module.k(x), module.v(x)
        else:
            k, v = text_keys(module, ctx)
        # Views, and not einops as elsewhere: on a GPU a step takes as long as Python takes to ask for it.
        q, k, v = (s.reshape(*s.shape[:2], N, s.shape[2] // N).transpose(1, 2) for s in (q, k, v))  # (B, N, L, K)
        usual = mask is None and not causal and len(q) == len(k) and k.shape == v.shape and can_pack(q, k, v)
        if usual and q.dtype == torch.bfloat16 and k.shape[-2] <= MOST:
            h = all_heads(q, k, v)
        elif usual and min(q.shape[-2], k.shape[-2]) >= LEAST:
            h = head_by_head(q, k, v)
        else:
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return repeated(module.out(h.transpose(1, 2).flatten(2)), count)


def head_by_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(K)) v for q (B, N, L, K), k and v (B, N, L_ctx, K): (B, N, L, K)."""
    B, N, L, K = q.shape
    q = q * (1 / math.sqrt(K))
    out = torch.empty(B, L, N, K, dtype=q.dtype).transpose(1, 2)  # laid out as the caller reads it
    memory = q.new_empty(ROWS, k.shape[2])  # for all blocks: fresh memory would take longer than the softmax
    for b in range(B):
        for n in range(N):
            keys, values = pack_matrix(k[b, n], ROWS), pack_matrix(v[b, n].T, ROWS)
            for first in range(0, L, ROWS):
                block = slice(first, first + ROWS)
                scores = product(q[b, n, block].contiguous(), keys)  # (ROWS, L_ctx)
                weights = torch.softmax(scores, dim=-1, out=memory[: len(scores)])
                out[b, n, block] = product(weights, values)
    return out


def all_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the same as ``head_by_head``, with products of all heads at once."""
    B, N, L, K = q.shape
    q, k, v = (s.reshape(B * N, -1, K) for s in (q * (1 / math.sqrt(K)), k, v))
    out = torch.empty(B, L, N, K, dtype=q.dtype).transpose(1, 2)
    rows = min(max(SCORES // (B * N * k.shape[1] * q.element_size()), 1), L)
    memory = q.new_empty(2, B * N * rows * k.shape[1])
    for first in range(0, L, rows):
        block = slice(first, first + rows)
        shape = B * N, min(rows, L - first), k.shape[1]
        scores, weights = (part[: math.prod(shape)].view(shape) for part in memory)
        torch.softmax(torch.bmm(q[:, block], k.mT, out=scores), dim=-1, out=weights)
        out[:, :, block] = torch.bmm(weights, v).view(B, N, -1, K)
    return out
