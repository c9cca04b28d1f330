"""The building blocks shared by the UNet and the autoencoder.

Axis letters, here and in every einops pattern of the library::

    B  batch            C  channels          H W  height, width of the feature map
    L  sequence length  D  feature width     N  attention heads   K  width of one head
    E  width of the time embedding

Papers: residual block and timestep embedding, Ho et al. 2020 (DDPM, https://arxiv.org/abs/2006.11239, appendix B);
transformer inside a UNet, Rombach et al. 2022 (LDM, https://arxiv.org/abs/2112.10752, appendix E.2.1);
GEGLU, Shazeer 2020 (https://arxiv.org/abs/2002.05202).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minidiff.networks.recompute import Recomputed
from minidiff.networks.slicing import attend_in_slices


def timestep_embedding(
    t: Tensor, width: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0, max_period: float = 10_000.0
) -> Tensor:
    """Encode timesteps as sines and cosines of geometrically spaced frequencies.

    f_i = max_period^(-i / (width/2 - freq_shift)),  emb = [sin(t f), cos(t f)]

    Args:
        t: timesteps, (B,), integer or fractional.
        width: size of the result; an odd width ends in a zero.
        flip_sin_to_cos: put the cosines first (Stable Diffusion) instead of the sines (DDPM).
        freq_shift: 0 in Stable Diffusion, 1 in DDPM.

    Returns:
        (B, width), float32 whatever the model's dtype: the frequencies are computed in float32 and in this order in
        the reference also for float64 models. Computed in float64 it would differ by up to 7e-5 (t = 0 to 999, widths
        128 to 384; at t = 999 by 3e-5 to 7e-5).
    """
    half = width // 2
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t[:, None].float() * torch.exp(exponent / (half - freq_shift))[None, :]  # (B, half)
    waves = [angle.cos(), angle.sin()] if flip_sin_to_cos else [angle.sin(), angle.cos()]
    return F.pad(torch.cat(waves, dim=-1), (0, width % 2))


def guidance_embedding(w: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Encode guidance scales w (B,), 0 = no guidance, for networks conditioned on them: (B, width), sines first.

    f_i = 10000^(-i / (width/2 - 1)),  emb = [sin(1000 w f), cos(1000 w f)]

    Meng et al. 2022 (https://arxiv.org/abs/2210.03142). ``timestep_embedding`` rounds in another order: at w = 7 the
    two differ by 1e-3.
    """
    half = width // 2
    f = torch.exp(torch.arange(half, dtype=dtype) * -(torch.log(torch.tensor(10_000.0)) / (half - 1)))
    angle = (1000.0 * w).to(dtype)[:, None] * f.to(w.device)[None, :]  # (B, half)
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, width % 2))


class TimeMLP(nn.Module):
    """Two linear layers that turn the sinusoidal embedding (B, width) into ``temb`` (B, E).

    With ``cond``, a further condition (B, cond) is added to the embedding: the guidance scale in LCM.
    """

    def __init__(self, width: int, E: int, cond: int | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, E)
        self.cond = nn.Linear(cond, width, bias=False) if cond is not None else None
        self.fc2 = nn.Linear(E, E)

    def forward(self, emb: Tensor, cond: Tensor | None = None) -> Tensor:
        emb = emb if cond is None else emb + self.cond(cond)
        return self.fc2(F.silu(self.fc1(emb)))


class FourierFeatures(nn.Module):
    """Encode times as sines and cosines of random frequencies: [sin(2 pi f log t), cos(2 pi f log t)], f ~ N(0, 16^2).

    The frequencies are drawn once, saved with the network and never trained. Song et al. 2021 (score SDE,
    https://arxiv.org/abs/2011.13456), appendix H; there t is the noise level sigma.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.randn(count)  # the reference draws twice and keeps the second
        self.weight = nn.Parameter(16 * torch.randn(count), requires_grad=False)

    def forward(self, t: Tensor) -> Tensor:
        """Turn times above 0 (B,) into features (B, 2 count)."""
        angle = torch.log(t)[:, None] * self.weight * 2 * math.pi
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class ResBlock(Recomputed):
    """Two 3x3 convolutions with a residual connection; the time embedding is added between them.

    h = norm2(conv1(silu(norm1(x))) + time(silu(temb)));  y = (skip(x) + conv2(silu(h))) / scale

    Args:
        E: width of the time embedding; None leaves the time out (autoencoder).
        scale_shift: let the time scale and shift instead of being added (Dhariwal & Nichol 2021,
            https://arxiv.org/abs/2105.05233): h = norm2(conv1(silu(norm1(x)))) (1 + a) + b, (a, b) = time(silu(temb)).
        dropout: probability of zeroing a value of silu(h) in training.
        scale: what the result is divided by.

    ``skip`` is a 1x1 convolution where the channels change.
    """

    def __init__(
        self,
        C_in: int,
        C_out: int,
        *,
        groups: int,
        eps: float,
        E: int | None = None,
        scale_shift: bool = False,
        dropout: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale_shift, self.dropout, self.scale = scale_shift, dropout, scale
        self.norm1 = nn.GroupNorm(groups, C_in, eps=eps)
        self.conv1 = nn.Conv2d(C_in, C_out, 3, padding=1)
        self.time = nn.Linear(E, 2 * C_out if scale_shift else C_out) if E is not None else None
        self.norm2 = nn.GroupNorm(groups, C_out, eps=eps)
        self.conv2 = nn.Conv2d(C_out, C_out, 3, padding=1)
        self.skip = nn.Conv2d(C_in, C_out, 1) if C_in != C_out else nn.Identity()

    def forward(
        self, x: Tensor, temb: Tensor | None = None, resize: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Compute y; ``resize`` changes the resolution of both branches, x and silu(norm1(x))."""
        h = silu(self.norm1(x), self.norm1)
        if resize is not None:
            x, h = resize(x), resize(h)
        h = self.conv1(h)  # (B, C_out, H, W)
        h = self.norm2(h) if self.time is None else self._condition_on_time(h, temb)
        y = self.skip(x) + self.conv2(F.dropout(silu(h, self.norm2), self.dropout, self.training))
        return y if self.scale == 1 else y / self.scale

    def _condition_on_time(self, h: Tensor, temb: Tensor) -> Tensor:
        """Return norm2(h + time(silu(temb))), or norm2(h) scaled and shifted."""
        time = self.time(F.silu(temb))[:, :, None, None]
        if not self.scale_shift:
            return self.norm2(h + time)
        a, b = time.chunk(2, dim=1)
        return self.norm2(h) * (1 + a) + b


def silu(x: Tensor, norm: nn.Module) -> Tensor:
    """Return silu(x) for what ``norm`` returned, in the same memory unless a hook on it may have kept that."""
    return F.silu(x, inplace=not norm._forward_hooks)


def avg_downsample(x: Tensor) -> Tensor:
    """Average squares of four pixels: (B, C, H, W) -> (B, C, floor(H / 2), floor(W / 2))."""
    return F.avg_pool2d(x, 2)


def nearest_upsample(x: Tensor, size: torch.Size | None = None) -> Tensor:
    """Repeat each pixel to ``size`` (H, W), by default twice the height and width."""
    H, W = size if size is not None else (2 * x.shape[-2], 2 * x.shape[-1])
    return F.interpolate(x, size=(H, W), mode="nearest")


class Downsample(nn.Module):
    """Halve height and width with a strided 3x3 convolution.

    ``padding=1`` pads all four sides (Stable Diffusion UNet); ``padding=0`` pads one row below and one column at the
    right only (autoencoder, DDPM UNets). Both give ceil(H / 2) resp. floor(H / 2) rows.
    """

    def __init__(self, C: int, *, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Upsample(nn.Module):
    """Repeat each pixel to ``size`` (default: twice the height and width), then smooth with a 3x3 convolution."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size | None = None) -> Tensor:
        return self.conv(nearest_upsample(x, size))


class Attention(nn.Module):
    """Multi-head attention: softmax(q k^T / sqrt(K)) v, over the sequence itself or over a condition ``ctx``.

    Args:
        D: width of the queries' sequence x.
        D_ctx: width of the context, from which keys and values come (D for self-attention).
        heads: N.
        qkv_bias: whether q, k and v have a bias (autoencoder: yes, transformer: no).
        width: N K, of all heads together; default D, which must then be divisible by N.
    """

    def __init__(self, D: int, D_ctx: int, *, heads: int, qkv_bias: bool = False, width: int | None = None) -> None:
        super().__init__()
        width = width or D
        self.heads = heads
        self.slice_size: int | None = None  # heads at a time, see SlicedAttention.set_attention_slice; None = all
        self.q = nn.Linear(D, width, bias=qkv_bias)
        self.k = nn.Linear(D_ctx, width, bias=qkv_bias)
        self.v = nn.Linear(D_ctx, width, bias=qkv_bias)
        self.out = nn.Linear(width, D)

    def forward(
        self, x: Tensor, ctx: Tensor | None = None, *, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Attend from ``x`` (B, L, D) to ``ctx`` (B, L_ctx, D_ctx), by default itself.

        ``mask``, (B, 1, 1 or L, L_ctx): True = may look; or numbers that are added to the scores.
        """
        ctx = x if ctx is None else ctx
        q, k, v = (rearrange(s, "B L (N K) -> B N L K", N=self.heads) for s in (self.q(x), self.k(ctx), self.v(ctx)))
        # The fused kernels keep scores and softmax in float32, so `upcast_attention` (SD 2.1) has nothing left to do.
        if self.slice_size is None:
            h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        else:  # in UNets alone
            h = attend_in_slices(q, k, v, self.slice_size, mask)
        return self.out(rearrange(h, "B N L K -> B L (N K)"))


class FeedForward(nn.Module):
    """Two linear layers around GEGLU, a gated activation: fc2(a * gelu(b)) with (a, b) = fc1(x), hidden width 4 D."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(D, 8 * D)
        self.fc2 = nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(a * F.gelu(b))


class TransformerBlock(Recomputed):
    """Self-attention, cross-attention to the condition, feed-forward; each pre-normed and residual.

    With ``only_cross`` the first attention looks at the condition too, all of it: a mask concerns the second alone.
    """

    def __init__(self, D: int, D_ctx: int, *, heads: int, only_cross: bool = False) -> None:
        super().__init__()
        self.only_cross = only_cross
        self.norm1 = nn.LayerNorm(D)
        self.self_attn = Attention(D, D_ctx if only_cross else D, heads=heads)
        self.norm2 = nn.LayerNorm(D)
        self.cross_attn = Attention(D, D_ctx, heads=heads)
        self.norm3 = nn.LayerNorm(D)
        self.mlp = FeedForward(D)

    def forward(self, x: Tensor, ctx: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.norm1(x), ctx if self.only_cross else None)
        x = x + self.cross_attn(self.norm2(x), ctx, mask=mask)
        return x + self.mlp(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A stack of transformer blocks over the pixels of a feature map, with one residual connection around it.

    ``proj_in`` and ``proj_out`` act on each pixel alone. Stable Diffusion 1.x stores them as 1x1 convolutions and 2.x
    as linear layers; they are the same product, so here they are always linear and the name table reshapes.
    """

    def __init__(self, C: int, D_ctx: int, *, depth: int, heads: int, groups: int, only_cross: bool = False) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, C, eps=1e-6)  # 1e-6 here even where the residual blocks use 1e-5
        self.proj_in = nn.Linear(C, C)
        options = {"heads": heads, "only_cross": only_cross}
        self.blocks = nn.ModuleList(TransformerBlock(C, D_ctx, **options) for _ in range(depth))
        self.proj_out = nn.Linear(C, C)

    def forward(self, x: Tensor, ctx: Tensor, mask: Tensor | None = None) -> Tensor:
        H, W = x.shape[-2:]
        h = self.proj_in(rearrange(self.norm(x), "B C H W -> B (H W) C"))
        for block in self.blocks:
            h = block(h, ctx, mask)
        return x + rearrange(self.proj_out(h), "B (H W) C -> B C H W", H=H, W=W)


class PixelAttention(Recomputed):
    """Self-attention over the pixels of a feature map with a residual connection: y = (x + attn(norm(x))) / scale.

    In the autoencoder and in unconditional UNets. ``groups=None`` leaves the norm out; ``width`` as in ``Attention``.
    """

    def __init__(
        self, C: int, *, heads: int, groups: int | None, eps: float, scale: float = 1.0, width: int | None = None
    ) -> None:
        super().__init__()
        self.scale = scale
        self.norm = nn.GroupNorm(groups, C, eps=eps) if groups is not None else nn.Identity()
        self.self_attn = Attention(C, C, heads=heads, qkv_bias=True, width=width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.self_attn(rearrange(self.norm(x), "B C H W -> B (H W) C"))
        y = h.transpose(1, 2).reshape(x.shape) + x  # in memory laid out as in the reference, which decides later bits
        return y if self.scale == 1 else y / self.scale
