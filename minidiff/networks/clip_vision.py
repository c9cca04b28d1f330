"""The CLIP vision transformer: a picture (B, C, H, W) -> one embedding per patch, and one for the whole picture (B, D).

Squares of P x P pixels become tokens by one linear map without a bias, a learned token stands before them, learned
positions are added, and the layers of the text encoder follow, in which every token sees all others. The first token's
state, normalised, is the picture's embedding; its projection lies in the space shared with texts.

    x_0 = norm_in([class; patches W] + positions),  x_i = layer_i(x_(i-1)),  pooled = norm_out(x_n[0])

Paper: Radford et al. 2021 (CLIP, https://arxiv.org/abs/2103.00020), section 2.4; Dosovitskiy et al. 2021 (ViT,
https://arxiv.org/abs/2010.11929), section 3.1. The safety checker of SD 1.x uses OpenAI's ViT-L/14 (24 layers,
quick_gelu), IP-Adapter OpenCLIP's ViT-H/14 (32 layers, gelu) and, for SDXL, ViT-bigG/14 (48 layers, gelu).
Checked against ``transformers.CLIPVisionModel`` and ``CLIPVisionModelWithProjection``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.checkpoints.names_clip import canonical_vision_name, clip_vision_rows
from minidiff.checkpoints.remap import Row
from minidiff.compat.published import Published
from minidiff.config import Config
from minidiff.networks.clip import CLIPTransformer, Layer, through
from minidiff.networks.specs import CLIPVisionSpec
from minidiff.networks.specs.clip_vision import vision_config, vision_half, vision_spec
from minidiff.outputs import Output


@dataclass
class CLIPVisionOutput(Output):
    """What the vision encoder returns.

    ``last_hidden_state`` (B, 1 + patches, D) is not normalised, ``pooler_output`` (B, D) is its first row and is;
    ``hidden_states`` holds what the first layer is shown and the state after each: IP-Adapter Plus reads the last but
    one.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None  # None only while a record is rebuilt from a mapping
    hidden_states: tuple[Tensor, ...] | None = None


class Embeddings(nn.Module):
    """Pictures (B, C, H, W) -> tokens with their positions (B, 1 + patches, D). The parts have published names."""

    def __init__(self, spec: CLIPVisionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.class_embedding = nn.Parameter(torch.randn(spec.D))
        self.patch_embedding = nn.Conv2d(spec.channels, spec.D, spec.patch, stride=spec.patch, bias=False)
        self.position_embedding = nn.Embedding(1 + spec.grid**2, spec.D)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))  # (B, D, h, w)
        tokens = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches.flatten(2).mT], dim=1)
        positions = self.position_embedding(torch.arange(1 + self.spec.grid**2, device=tokens.device)[None])
        return tokens + (self._resized(positions, *patches.shape[-2:]) if interpolate_pos_encoding else positions)

    def _resized(self, positions: Tensor, h: int, w: int) -> Tensor:
        """Stretch the positions (1, 1 + n n, D) of the square grid to h x w patches; that of the first token stays."""
        n = self.spec.grid
        if (h, w) == (n, n):
            return positions
        square = positions[:, 1:].mT.unflatten(2, (n, n))
        stretched = F.interpolate(square, size=(h, w), mode="bicubic", align_corners=False)
        return torch.cat([positions[:, :1], stretched.flatten(2).mT], dim=1)


class VisionTransformer(Published):
    """The network itself, without the projection."""

    def __init__(self, spec: CLIPVisionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embeddings = Embeddings(spec)
        self.norm_in = nn.LayerNorm(spec.D, eps=spec.eps)
        self.layers = nn.ModuleList(Layer(spec, causal=False) for _ in range(spec.layers))
        self.norm_out = nn.LayerNorm(spec.D, eps=spec.eps)

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> CLIPVisionOutput | tuple[Any, ...]:
        """Encode pictures; arguments and errors are those of ``CLIPVisionModel``."""
        self._check(pixel_values, interpolate_pos_encoding)
        x = self.norm_in(self.embeddings(pixel_values, interpolate_pos_encoding))
        x, states = through(self.layers, x, None, output_hidden_states)
        out = CLIPVisionOutput(x, self.norm_out(x[:, 0]), states)
        return out if return_dict else out.to_tuple()

    def _check(self, pixel_values: Tensor, any_size: bool) -> None:
        """Raise ``ValueError`` if these are not pictures that the network can read."""
        C, side = self.spec.channels, self.spec.image
        found = tuple(pixel_values.shape) if isinstance(pixel_values, Tensor) else pixel_values
        sized = isinstance(found, tuple) and len(found) == 4 and found[1] == C
        if not sized or not (min(found[2:]) >= self.spec.patch if any_size else found[2:] == (side, side)):
            size = f"H, W), at least {self.spec.patch} pixels high and wide" if any_size else f"{side}, {side})"
            raise ValueError(
                f"pixel_values should be (B, {C}, {size}, found {found}; prepare them with CLIPImageProcessor"
            )


class CLIPVisionConfig(Config):
    """The fields of a vision encoder's ``config.json``, with the reference's defaults.

    Raises:
        ConfigError: naming each field that is unknown or has a value that is not implemented.
    """

    def __init__(self, **fields: Any) -> None:
        super().__init__(vision_config(fields))


class CLIPVisionModel(CLIPTransformer):
    """Encode pictures.

    Args:
        config: a ``CLIPVisionConfig`` or any mapping of its fields.
    """

    model_type = "clip_vision_model"
    canonical_hub_name = staticmethod(canonical_vision_name)

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = self._completed(config)
        self._build(self.config.get("vision_config", self.config))

    @staticmethod
    def _completed(config: Mapping[str, Any]) -> Config:
        return config if isinstance(config, CLIPVisionConfig) else CLIPVisionConfig(**config)

    def _build(self, config: Config) -> None:
        """Make the transformer that the fields of a vision encoder describe."""
        self.spec = spec = vision_spec(config)
        self.vision_model = VisionTransformer(spec)
        parts, width = self.vision_model.embeddings, config.get("initializer_range") or 0.02
        modules = parts.class_embedding, parts.patch_embedding, parts.position_embedding
        self._draw(*modules, stds=(spec.D**-0.5, width, width))
        self._draw_layers(self.vision_model.layers)

    @classmethod
    def _of_fields(cls, fields: Mapping[str, Any], **overrides: Any) -> "CLIPVisionModel":
        return cls({**vision_half(fields), **overrides})

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> Output | tuple[Any, ...]:
        """Encode pictures.

        Args:
            pixel_values: what ``CLIPImageProcessor`` makes of them, (B, num_channels, image_size, image_size).
            interpolate_pos_encoding: whether to take pictures of any size and to stretch the positions to it.
            output_hidden_states: whether to return the state before and after every layer too.
            return_dict: whether to return a record or a tuple.

        Raises:
            ValueError: if the pictures have another shape.
        """
        out = self._output(self.vision_model(pixel_values, interpolate_pos_encoding, output_hidden_states))
        return out if return_dict else out.to_tuple()

    def _output(self, out: CLIPVisionOutput) -> Output:
        return out

    def rows(self) -> list[Row]:
        """Return the name table of this configuration: ours, Hub, OpenCLIP."""
        return list(clip_vision_rows(self.spec))


@dataclass
class CLIPVisionProjectionOutput(Output):
    """What the vision encoder with projection returns.

    ``image_embeds`` (B, P) is the pooled embedding in the space shared with texts; the rest as ``CLIPVisionOutput``.
    """

    image_embeds: Tensor
    last_hidden_state: Tensor | None = None  # None only while a record is rebuilt from a mapping
    hidden_states: tuple[Tensor, ...] | None = None


class CLIPVisionModelWithProjection(CLIPVisionModel):
    """Encode pictures, and the pooled embedding to the space that CLIP shares with texts.

    image_embeds = pooled W^T, with W (P, D).

    Args:
        config: a ``CLIPVisionConfig`` or any mapping of its fields; ``projection_dim`` is P.
    """

    canonical_hub_name = staticmethod(partial(canonical_vision_name, projection=True))

    def _build(self, config: Config) -> None:
        super()._build(config)
        self.visual_projection = self._projection()

    def _output(self, out: CLIPVisionOutput) -> CLIPVisionProjectionOutput:
        return CLIPVisionProjectionOutput(
            self.visual_projection(out.pooler_output), out.last_hidden_state, out.hidden_states
        )

    def rows(self) -> list[Row]:
        """Return the name table of this configuration: ours, Hub, OpenCLIP."""
        return list(clip_vision_rows(self.spec, projection=True))
