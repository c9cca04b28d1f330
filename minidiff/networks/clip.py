"""The CLIP text transformer: token ids (B, L) -> one embedding per token (B, L, D), and one for the whole text (B, D).

A GPT-like stack: learned positions, causal self-attention (each token sees itself and what stands before it), pre-norm,
and a final normalisation. The pooled embedding is the state at the end-of-text token, the first place that has seen the
whole text.

Paper: Radford et al. 2021 (CLIP, https://arxiv.org/abs/2103.00020), section 2.4. SD 1.x uses OpenAI's ViT-L/14 (12
layers, quick_gelu), SD 2.x the first 23 layers of OpenCLIP's ViT-H/14 (gelu), SDXL both ViT-L/14 and ViT-bigG/14 (32
layers, gelu) with its projection of the pooled embedding. Pictures: ``minidiff.networks.clip_vision``.
Checked against ``transformers.CLIPTextModel`` and ``CLIPTextModelWithProjection``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minidiff.adapters.network import AdaptedNetwork
from minidiff.checkpoints.model import Model
from minidiff.checkpoints.names_clip import canonical_clip_name, clip_rows
from minidiff.checkpoints.remap import Row
from minidiff.config import Config
from minidiff.errors import ConfigError
from minidiff.networks.layers import Attention
from minidiff.networks.recompute import GradientCheckpointing, Recomputed
from minidiff.networks.specs import CLIPSpec, CLIPVisionSpec
from minidiff.networks.specs.clip import LEGACY_EOS, clip_config, clip_spec, text_half
from minidiff.networks.vocabulary import Vocabulary
from minidiff.outputs import Output
from minidiff.registry import published


def quick_gelu(x: Tensor) -> Tensor:
    """Return x * sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": nn.functional.gelu}


class Layer(Recomputed):
    """Self-attention and a feed-forward network, each pre-normed and residual.

    ``causal``: a token sees itself and what stands before it (texts), or all see all (patches of a picture).
    """

    def __init__(self, spec: CLIPSpec | CLIPVisionSpec, *, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.norm1 = nn.LayerNorm(spec.D, eps=spec.eps)
        self.attn = Attention(spec.D, spec.D, heads=spec.heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(spec.D, eps=spec.eps)
        self.fc1 = nn.Linear(spec.D, spec.mlp)
        self.fc2 = nn.Linear(spec.mlp, spec.D)
        self.activation = _ACTIVATIONS[spec.activation]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask=mask, causal=self.causal and mask is None)
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


def through(
    layers: nn.ModuleList, x: Tensor, mask: Tensor | None, keep: bool
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Return what the layers make of x (B, L, D) and, if they are kept, x and the state after each layer."""
    states = (x,) if keep else None
    for layer in layers:
        x = layer(x, mask)
        states = (*states, x) if keep else None
    return x, states


class CLIPTransformer(GradientCheckpointing, Model):
    """What the text encoder and the vision encoder are alike in: how they start, how they train, and their files."""

    weights_stem = "model"
    model_type: ClassVar[str]  # in ``config.json``

    @torch.no_grad()
    def _draw(self, *modules: nn.Linear | nn.Conv2d | nn.Embedding | nn.Parameter, stds: tuple[float, ...]) -> None:
        """Draw initial weights N(0, std²), times ``initializer_factor``; biases are 0.

        The reference draws twice, first with one width for all, and the random numbers of whatever is drawn next depend
        on it. (torch's own initial weights, N(0, 1) in tables, would drown the position in the token.)
        """
        weights = [getattr(module, "weight", module) for module in modules]
        if weights[0].is_meta:
            return
        factor, width = self.config.get("initializer_factor") or 1.0, self.config.get("initializer_range") or 0.02
        for module in [module for module in modules if isinstance(module, nn.Module)]:
            nn.init.normal_(module.weight, std=width)
        for module, weight, std in zip(modules, weights, stds, strict=True):
            nn.init.normal_(weight, std=std * factor)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def _draw_layers(self, layers: nn.ModuleList) -> None:
        out_std, mlp_std = self.spec.D**-0.5, (2 * self.spec.D) ** -0.5
        in_std = out_std * (2 * self.spec.layers) ** -0.5
        for layer in layers:
            attn = layer.attn
            self._draw(attn.q, attn.k, attn.v, attn.out, stds=(in_std, in_std, in_std, out_std))
            self._draw(layer.fc1, layer.fc2, stds=(mlp_std, in_std))

    def _projection(self) -> nn.Linear:
        """Make what maps the pooled embedding to the space that texts and pictures share."""
        P = self.config.projection_dim
        if type(P) is not int or P < 1:
            raise ConfigError(f"{type(self).__name__}: projection_dim should be a positive integer, found {P!r}")
        projection = nn.Linear(self.spec.D, P, bias=False)
        self._draw(projection, stds=(self.spec.D**-0.5,))
        return projection

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """Enable gradient checkpointing; the arguments go to ``torch.utils.checkpoint.checkpoint``."""
        self._recompute(partial(checkpoint, **{"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}))

    def gradient_checkpointing_disable(self) -> None:
        """Disable gradient checkpointing."""
        self._recompute(None)

    def config_to_save(self) -> dict[str, Any]:
        """Return the fields of ``config.json`` in the manner of transformers, which takes its dtype from there."""
        stale = ("dtype", "transformers_version")
        fields = {name: value for name, value in self.config.items() if name not in stale and not name.startswith("_")}
        dtype = str(self.dtype).removeprefix("torch.")
        kind = published(type(self)) or type(self)
        return {**fields, "architectures": [kind.__name__], "model_type": self.model_type, "torch_dtype": dtype}


@dataclass
class CLIPTextOutput(Output):
    """What the text encoder returns.

    ``last_hidden_state`` (B, L, D) is normalised, ``pooler_output`` (B, D) is its row at the end of the text;
    ``hidden_states`` holds the embeddings and the state after each layer, not normalised: ``hidden_states[-2]`` is
    what clip-skip 1 conditions on.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None  # None only while a record is rebuilt from a mapping
    hidden_states: tuple[Tensor, ...] | None = None


class CLIPTextConfig(Config):
    """The fields of a text encoder's ``config.json``, with the reference's defaults.

    Raises:
        ConfigError: naming each field that is unknown or has a value that is not implemented.
    """

    def __init__(self, **fields: Any) -> None:
        super().__init__(clip_config(fields))


class CLIPTextModel(AdaptedNetwork, Vocabulary, CLIPTransformer):
    """Encode token ids to text embeddings.

    Args:
        config: a ``CLIPTextConfig`` or any mapping of its fields.
    """

    model_type = "clip_text_model"
    lora_component = "text_encoder"
    single_file_parts = ("text_encoder", "text_encoder_2")
    canonical_hub_name = staticmethod(canonical_clip_name)

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = config if isinstance(config, CLIPTextConfig) else CLIPTextConfig(**config)
        self.spec = spec = clip_spec(self.config)
        self.token_embed = nn.Embedding(spec.vocabulary, spec.D)
        self.position_embed = nn.Embedding(spec.positions, spec.D)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.layers))
        self.norm_out = nn.LayerNorm(spec.D, eps=spec.eps)
        self._draw(self.token_embed, self.position_embed, stds=(0.02, 0.02))
        self._draw_layers(self.layers)

    @classmethod
    def _of_fields(cls, fields: Mapping[str, Any], **overrides: Any) -> "CLIPTextModel":
        return cls({**text_half(fields), **overrides})

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> CLIPTextOutput | tuple[Any, ...]:
        """Encode texts.

        Args:
            input_ids: token ids, (B, L) integers below ``vocab_size``, L at most ``max_position_embeddings``.
            attention_mask: (B, L), 1 where a token may be looked at; default: everywhere.
            position_ids: (B, L) or (1, L); default 0, 1, 2...
            output_hidden_states: whether to return the state after every layer too.
            return_dict: whether to return a record or a tuple.

        Raises:
            ValueError: if the text is longer than the positions the network has, the ids are not integers, or mask or
                positions have another shape.
        """
        self._check(input_ids, attention_mask, position_ids)
        L = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(L, device=input_ids.device)[None]
        mask = None
        if attention_mask is not None:
            causal = torch.ones(L, L, dtype=torch.bool, device=input_ids.device).tril()
            mask = causal & attention_mask.bool()[:, None, None, :]  # (B, 1, L, L)

        x = self.token_embed(input_ids) + self.position_embed(position_ids)
        x, states = through(self.layers, x, mask, output_hidden_states)
        x = self.norm_out(x)
        pooled = x[torch.arange(len(x), device=x.device), self._end_of_text(input_ids)]
        out = self._output(x, pooled, states)
        return out if return_dict else out.to_tuple()

    def _output(self, x: Tensor, pooled: Tensor, states: tuple[Tensor, ...] | None) -> Output:
        return CLIPTextOutput(x, pooled, states)

    def _check(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
        """Raise if ids, mask or positions do not fit the network or each other."""
        if input_ids.ndim != 2 or input_ids.shape[1] > self.spec.positions:
            raise ValueError(
                f"input_ids should be (B, L) with L at most {self.spec.positions}, found {tuple(input_ids.shape)}; "
                "tokenize with truncation=True"
            )
        if input_ids.is_floating_point():
            raise ValueError(f"input_ids should be integers, found {input_ids.dtype}")
        B, L = input_ids.shape
        if attention_mask is not None and attention_mask.shape != (B, L):
            raise ValueError(
                f"attention_mask should have the shape of input_ids, {(B, L)}, found {tuple(attention_mask.shape)}"
            )
        if position_ids is not None and position_ids.shape not in ((B, L), (1, L)):
            raise ValueError(f"position_ids should be {(B, L)} or {(1, L)}, found {tuple(position_ids.shape)}")

    def _end_of_text(self, input_ids: Tensor) -> Tensor:
        """Return the position of the end-of-text token in each text, (B,).

        With the legacy ``eos_token_id`` 2 it is where the largest id stands, which is wrong as soon as a token with a
        larger id has been added; with the true id it is its first occurrence.
        """
        if self.config.eos_token_id == LEGACY_EOS:
            return input_ids.argmax(dim=-1)
        return (input_ids == self.config.eos_token_id).int().argmax(dim=-1)

    def rows(self) -> list[Row]:
        """Return the name table of this configuration: ours, Hub, original single file."""
        return list(clip_rows(self.spec))


@dataclass
class CLIPTextProjectionOutput(Output):
    """What the text encoder with projection returns.

    ``text_embeds`` (B, P) is the pooled embedding in the space shared with pictures; the rest as ``CLIPTextOutput``.
    """

    text_embeds: Tensor
    last_hidden_state: Tensor | None = None  # None only while a record is rebuilt from a mapping
    hidden_states: tuple[Tensor, ...] | None = None


class CLIPTextModelWithProjection(CLIPTextModel):
    """Encode token ids to text embeddings, and the pooled one to the space that CLIP shares with pictures.

    text_embeds = pooled W^T, with W (P, D). The second text encoder of SDXL.

    Args:
        config: a ``CLIPTextConfig`` or any mapping of its fields; ``projection_dim`` is P.
    """

    canonical_hub_name = staticmethod(partial(canonical_clip_name, projection=True))

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.text_projection = self._projection()

    def _output(self, x: Tensor, pooled: Tensor, states: tuple[Tensor, ...] | None) -> CLIPTextProjectionOutput:
        return CLIPTextProjectionOutput(self.text_projection(pooled), x, states)

    def rows(self) -> list[Row]:
        """Return the name table of this configuration: ours, Hub, original single file."""
        return list(clip_rows(self.spec, projection=True))
