"""The UNet that predicts the noise in a latent, given the time and a text; and the body it shares with ``UNet2DModel``.

One loop down through levels of falling resolution, a middle, one loop up; what each step of the way down computed is
concatenated on the way up (the skips, an explicit list). A level is residual blocks, each followed by attention where
the level has some: a transformer that looks at the text (``depth > 0``), or, in unconditional UNets, self-attention
over the pixels.

Papers: Ronneberger et al. 2015 (https://arxiv.org/abs/1505.04597); Ho et al. 2020 (DDPM,
https://arxiv.org/abs/2006.11239), appendix B; Rombach et al. 2022 (LDM, https://arxiv.org/abs/2112.10752), section 3.3.
Checked against ``diffusers.UNet2DConditionModel``.
"""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.adapters.network import AdaptedNetwork
from minidiff.checkpoints.casting import LayerwiseCasting
from minidiff.checkpoints.model import Model
from minidiff.checkpoints.names import unet_rows
from minidiff.checkpoints.original.single_file import SingleFileModel
from minidiff.checkpoints.remap import Row
from minidiff.compat.attention import Attending, processor_arguments
from minidiff.config import Config
from minidiff.networks.classes import Classes
from minidiff.networks.freeu import FreeU
from minidiff.networks.layers import (
    Downsample,
    PixelAttention,
    ResBlock,
    SpatialTransformer,
    TimeMLP,
    Upsample,
    avg_downsample,
    nearest_upsample,
    timestep_embedding,
)
from minidiff.networks.recompute import GradientCheckpointing
from minidiff.networks.slicing import SlicedAttention
from minidiff.networks.specs import LevelSpec, UNetSpec
from minidiff.networks.specs.fields import show_fields
from minidiff.networks.specs.unet import unet_config, unet_spec
from minidiff.outputs import Output


class Block(nn.Module):
    """Residual blocks, each with its attention (or none), then a change of resolution (or none)."""

    def __init__(
        self,
        layers: Iterable[tuple[ResBlock, SpatialTransformer | PixelAttention | None]],
        resample: Downsample | Upsample | ResBlock | None,
    ) -> None:
        super().__init__()
        res, attn = zip(*layers, strict=True)
        self.attn = nn.ModuleList(module for module in attn if module is not None)
        self.res = nn.ModuleList(res)
        self.resample = resample

    def layer(self, j: int, x: Tensor, temb: Tensor, ctx: Tensor | None, mask: Tensor | None) -> Tensor:
        """Run residual block ``j`` and the attention behind it: to the text ``ctx``, or over the pixels if None."""
        x = self.res[j](x, temb)
        if not self.attn:
            return x
        return self.attn[j](x) if ctx is None else self.attn[j](x, ctx, mask)

    def downsample(self, x: Tensor, temb: Tensor) -> Tensor:
        """Halve the resolution."""
        return self.resample(x, temb, avg_downsample) if isinstance(self.resample, ResBlock) else self.resample(x)

    def upsample(self, x: Tensor, temb: Tensor, size: torch.Size) -> Tensor:
        """Change the resolution to ``size``."""
        if isinstance(self.resample, ResBlock):
            return self.resample(x, temb, lambda h: nearest_upsample(h, size))
        return self.resample(x, size)


class UNet(Classes, SlicedAttention, GradientCheckpointing, Attending, LayerwiseCasting, Model):
    """The body of every UNet. The public faces below and in ``unet_unconditional`` say what goes in and comes out.

    Layers are made in the order in which the reference makes them, which is the order in which their initial weights
    are drawn: under one seed both are the same network. They are registered in its order too, in which optimizers store
    what belongs to the parameters; hence ``self.up`` before ``self.mid``, and attention before residual blocks.
    """

    _repeated_blocks, _skip_layerwise_casting_patterns = ("TransformerBlock",), ("norm",)
    freeu: FreeU | None = None  # what changes the skips on the way up

    def __init__(self, config: Config, spec: UNetSpec) -> None:
        super().__init__()
        self.config, self.spec = config, spec
        levels, last = spec.levels, len(spec.levels) - 1
        C = levels[0].channels
        self.conv_in = nn.Conv2d(spec.in_channels, C, spec.in_kernel, padding=spec.in_kernel // 2)
        self._make_embeddings()

        skips = [C]  # channels of everything that is kept for the way up
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, lv in enumerate(levels):
            layers = []
            for depth in lv.depths:
                layers.append((self._res(C, lv.channels), self._attention(lv, depth, lv.pixel_attn)))
                C = lv.channels
            resample = None
            if i < last:
                resample = self._res(C, C) if lv.res_down else Downsample(C, padding=spec.downsample_padding)
            self.down.append(Block(layers, resample))
            skips += [C] * (lv.layers + (i < last))

        self.mid = self._middle(levels[-1]) if spec.mid_res else None

        for i, lv in enumerate(reversed(levels)):
            layers = []
            for depth in lv.up_depths:
                res = self._res(C + skips.pop(), lv.channels)
                layers.append((res, self._attention(lv, depth, lv.up_pixel_attn)))
                C = lv.channels
            resample = None
            if i < last:
                resample = self._res(C, C) if lv.res_up else Upsample(C)
            self.up.append(Block(layers, resample))

        self.norm_out = nn.GroupNorm(spec.groups, C, eps=spec.eps)
        self.conv_out = nn.Conv2d(C, spec.out_channels, spec.out_kernel, padding=spec.out_kernel // 2)

    def _make_embeddings(self) -> None:
        """Make what embeds the time, a class and, in the faces, all else that the network is told beside the sample."""
        self.time_embed = TimeMLP(self.spec.time_features, self.spec.E, self.spec.time_cond)
        self.class_embed = self._make_classes()

    def _res(self, C_in: int, C_out: int, scale: float = 1.0) -> ResBlock:
        spec = self.spec
        E = spec.E * (1 + spec.class_concat)
        options = {"E": E, "scale_shift": spec.scale_shift, "dropout": spec.dropout, "scale": scale}
        return ResBlock(C_in, C_out, groups=spec.groups, eps=spec.eps, **options)

    def _attention(self, lv: LevelSpec, depth: int, pixels: bool) -> SpatialTransformer | PixelAttention | None:
        """Make what stands behind a residual block of a level."""
        C, heads, groups = lv.channels, lv.heads, self.spec.groups
        if depth:
            return SpatialTransformer(C, lv.D_ctx, depth=depth, heads=heads, groups=groups, only_cross=lv.only_cross)
        options = {"heads": heads, "groups": groups, "eps": self.spec.eps, "width": lv.attn_width}
        return PixelAttention(C, **options) if pixels else None

    def _middle(self, lv: LevelSpec) -> Block:
        """Make one or two residual blocks with attention (or none) behind the first, at the coarsest level."""
        spec, C = self.spec, lv.channels
        first = self._res(C, C, spec.mid_scale)
        attn = self._attention(lv._replace(only_cross=False), spec.mid_depth, False)
        if spec.mid_pixel_attn:
            options = {"groups": spec.mid_groups, "eps": spec.eps, "scale": spec.mid_scale, "width": lv.attn_width}
            attn = PixelAttention(C, heads=lv.heads, **options)
        others = [(self._res(C, C, spec.mid_scale), None) for _ in range(spec.mid_res - 1)]
        return Block([(first, attn), *others], None)

    def _times(self, sample: Tensor, timestep: Tensor | float | int) -> Tensor:
        """Return one time per sample, (B,), on its device."""
        t = torch.as_tensor(timestep, device=sample.device)
        if t.ndim > 1 or t.numel() not in (1, len(sample)):
            raise ValueError(
                f"timestep should be one time or one per sample: found shape {tuple(t.shape)} for a batch of "
                f"{len(sample)}"
            )
        return t.expand(len(sample))

    def _encode_times(self, t: Tensor) -> Tensor:
        """Encode times (B,) as sines and cosines (B, time_features)."""
        config = self.config
        return timestep_embedding(
            t, self.spec.time_features, flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        )

    def _body(self, x: Tensor, temb: Tensor, ctx: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Run the network proper: down, middle, up. ``mask`` is added to the scores of the text, see ``Attention``."""
        if self.config.center_input_sample:
            x = 2 * x - 1
        x = self.conv_in(x)
        skips = [x]
        for block in self.down:
            for j in range(len(block.res)):
                x = block.layer(j, x, temb, ctx, mask)
                skips.append(x)
            if block.resample is not None:
                x = block.downsample(x, temb)
                skips.append(x)

        if self.mid is not None:
            x = self.mid.layer(0, x, temb, ctx, mask)
            for res in self.mid.res[1:]:
                x = res(x, temb)

        for i, block in enumerate(self.up):
            for j in range(len(block.res)):
                x, skip = (x, skips.pop()) if self.freeu is None else self.freeu(i, x, skips.pop())
                x = block.layer(j, torch.cat([x, skip], dim=1), temb, ctx, mask)
            if block.resample is not None:
                x = block.upsample(x, temb, skips[-1].shape[-2:])  # the skip's size: odd sizes do not halve evenly

        return self.conv_out(F.silu(self.norm_out(x)))

    def _check_sample(self, sample: Tensor) -> None:
        """Raise if the input does not fit the network."""
        C = self.conv_in.weight.shape[1]  # of the layer, which a program may have exchanged
        if sample.ndim != 4 or sample.shape[1] != C:
            raise ValueError(f"sample should be (B, {C}, H, W), found {tuple(sample.shape)}")


@dataclass
class UNet2DConditionOutput(Output):
    """What the UNet returns: its prediction (B, out_channels, H, W)."""

    sample: Tensor


class UNet2DConditionModel(AdaptedNetwork, SingleFileModel, UNet):
    """Predict noise (or v, or x0, as the checkpoint was trained) from a noisy latent, the time and a text.

    Keyword arguments are the fields of the Hub's ``unet/config.json``, with the reference's defaults.

    Raises:
        ConfigError: naming each field that is unknown or has a value that is not implemented.
    """

    single_file_parts, lora_component = ("unet",), "unet"

    def __init__(self, **fields: Any) -> None:
        config = unet_config(fields)
        super().__init__(config, unet_spec(config))

    def _make_embeddings(self) -> None:
        super()._make_embeddings()
        self.add_embed = TimeMLP(self.spec.added, self.spec.E) if self.spec.added is not None else None

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        down_block_additional_residuals: None = None,
        mid_block_additional_residual: None = None,
        down_intrablock_additional_residuals: None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict from a noisy latent.

        Args:
            sample: noisy latents, (B, in_channels, H, W), any H and W.
            timestep: one time for all, or (B,) times; 0 is nearly clean, 999 nearly pure noise.
            encoder_hidden_states: text embeddings, (B, L, D).
            class_labels: for networks with ``num_class_embeds`` or ``class_embed_type`` alone, which need it: see
                ``Classes``. Stable Diffusion x4 upscaler: how noisy the small picture is, (B,) integers from 0 to 999.
            timestep_cond: for networks with ``time_cond_proj_dim`` (LCM) alone: the encoded guidance scale, (B, width),
                see ``guidance_embedding``.
            added_cond_kwargs: for networks with ``addition_embed_type="text_time"`` (SDXL) alone: "text_embeds", the
                pooled text embeddings (B, P), and "time_ids", the sizes that the picture is conditioned on (B, n), with
                P + n * addition_time_embed_dim = projection_class_embeddings_input_dim.
            cross_attention_kwargs: what the attention processors are called with, if there are any.
            encoder_attention_mask: which tokens of the text may be looked at, (B, L): 1 or True = may; of any dtype.
            return_dict: whether to return a record or a tuple.

        Returns:
            The prediction, (B, out_channels, H, W).

        The other arguments of the reference belong to features that are not implemented and must be None.

        Raises:
            ValueError: naming an argument that is not implemented or a shape that does not fit.
        """
        self._refuse(
            timestep_cond=None if self.spec.time_cond is not None else timestep_cond,
            attention_mask=attention_mask,
            cross_attention_kwargs=None if cross_attention_kwargs and self.has_processors else cross_attention_kwargs,
            added_cond_kwargs=None if self.add_embed is not None else added_cond_kwargs or None,
            down_block_additional_residuals=down_block_additional_residuals,
            mid_block_additional_residual=mid_block_additional_residual,
            down_intrablock_additional_residuals=down_intrablock_additional_residuals,
        )
        self._check_sample(sample)
        self._check_text(sample, encoder_hidden_states)
        mask = self._check_mask(encoder_attention_mask, encoder_hidden_states)
        told = {"class_labels": class_labels, "timestep_cond": self._check_cond(sample, timestep_cond)}
        told = {name: value for name, value in told.items() if value is not None}
        temb = self._embed_time(sample, timestep, {**(added_cond_kwargs or {}), **told})
        with processor_arguments(cross_attention_kwargs) if cross_attention_kwargs else nullcontext():
            x = self._body(sample, temb, encoder_hidden_states, mask)
        return UNet2DConditionOutput(x) if return_dict else (x,)

    def _embed_time(self, sample: Tensor, timestep: Tensor | float | int, told: Mapping[str, Tensor]) -> Tensor:
        """Return the embedding (B, E) of the time and what else the network is told: guidance, a class, sizes (XL)."""
        added = dict(told)
        t = self._encode_times(self._times(sample, timestep)).to(sample.dtype)
        temb = self.time_embed(t, added.pop("timestep_cond", None))
        temb = self._tell_class(temb, added.pop("class_labels", None))
        return temb if self.add_embed is None else temb + self.add_embed(self._encode_added(sample, added))

    def _encode_added(self, sample: Tensor, added: Mapping[str, Tensor]) -> Tensor:
        """Return the added condition (B, P + n * features): pooled text and sizes, each encoded as a time is.

        Podell et al. 2023 (SDXL, https://arxiv.org/abs/2307.01952), section 2.2.
        """
        B, spec, config = len(sample), self.spec, self.config
        if set(added) != {"text_embeds", "time_ids"}:
            raise ValueError(
                "this UNet is conditioned on sizes too: added_cond_kwargs should hold text_embeds (B, P) and "
                f"time_ids (B, n), found {', '.join(added) or 'nothing'}"
            )
        pooled, ids = added["text_embeds"], added["time_ids"]
        fits = pooled.ndim == ids.ndim == 2 and len(pooled) == len(ids) == B
        if not fits or pooled.shape[1] + ids.shape[1] * spec.added_features != spec.added:
            raise ValueError(
                f"text_embeds should be ({B}, P) and time_ids ({B}, n) with P + {spec.added_features} n = {spec.added}"
                f", found {tuple(pooled.shape)} and {tuple(ids.shape)}; SDXL base takes n = 6 sizes, the refiner n = 5"
            )
        options = {"flip_sin_to_cos": config.flip_sin_to_cos, "freq_shift": config.freq_shift}
        sizes = timestep_embedding(ids.flatten(), spec.added_features, **options).reshape(B, -1)
        return torch.cat([pooled.to(sample), sizes.to(sample)], dim=1)

    def _refuse(self, **arguments: Any) -> None:
        """Raise on arguments of the reference whose feature is not implemented."""
        found = [name for name, value in arguments.items() if value is not None]
        if found:
            raise ValueError(f"UNet2DConditionModel does not implement the argument(s) {', '.join(found)}; pass None")

    def _check_text(self, sample: Tensor, ctx: Tensor) -> None:
        """Raise if the text embeddings do not fit the network and the batch."""
        D = self.spec.levels[-1].D_ctx
        if ctx.ndim != 3 or ctx.shape[-1] != D or not len(ctx) == len(sample) > 0:
            raise ValueError(
                f"encoder_hidden_states should be ({len(sample)}, L, {D}), a text for each sample, found "
                f"{tuple(ctx.shape)}; a width other than {D} comes from the text encoder of another model family"
            )

    def _check_cond(self, sample: Tensor, cond: Tensor | None) -> Tensor | None:
        """Return the encoded guidance scale in the dtype of the sample."""
        width = self.spec.time_cond
        if cond is None:
            return None
        if cond.shape not in ((1, width), (len(sample), width)):
            raise ValueError(f"timestep_cond should be ({len(sample)} or 1, {width}), found {tuple(cond.shape)}")
        return cond.to(sample.dtype)

    def _check_mask(self, mask: Tensor | None, ctx: Tensor) -> Tensor | None:
        """Return what a mask of the text (B, L) adds to the scores, (B, 1, 1, L): 0 or, where it is 0, -10000."""
        if mask is None:
            return None
        if mask.shape != ctx.shape[:2]:
            raise ValueError(
                f"encoder_attention_mask should be {tuple(ctx.shape[:2])}, one entry per token of "
                f"encoder_hidden_states, found {tuple(mask.shape)}"
            )
        return ((1 - mask.to(ctx.dtype)) * -10_000.0)[:, None, None, :]

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Attenuate the skips by s and amplify what comes from below by b, at the two coarsest levels; see ``freeu``.

        Raises:
            ValueError: if a number is 0, with which the reference does nothing.
        """
        if not all((s1, s2, b1, b2)):
            raise ValueError(f"FreeU takes numbers other than 0, found s1={s1}, s2={s2}, b1={b1}, b2={b2}")
        self.freeu = FreeU(s1, s2, b1, b2)

    def disable_freeu(self) -> None:
        """Leave the way up as it was trained."""
        self.freeu = None

    def rows(self) -> list[Row]:
        """Return the name table of this configuration: ours, Hub, original single file."""
        return list(unet_rows(self.spec))


show_fields(UNet2DConditionModel.__init__, unet_config({}))
