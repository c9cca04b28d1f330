"""Attention as published programs see it, and processors: functions that compute it in another way.

    processor(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs) -> hidden_states

``attn`` answers ``to_q``, ``to_k``, ``to_v``, ``to_out``, ``heads``, ``scale``, ``head_to_batch_dim``,
``get_attention_scores``... as the reference's does. A network is given one with ``set_attn_processor``; until then
attention computes in minidiff's own way, which is ``AttnProcessor2_0``'s. Hertz et al. 2022 (prompt-to-prompt,
https://arxiv.org/abs/2208.01626) and Chefer et al. 2023 (attend-and-excite, https://arxiv.org/abs/2301.13826) are
written as processors. Checked against ``diffusers.models.attention_processor``.
"""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.compat.published import Part

logger = logging.getLogger("minidiff")

Processor = Callable[..., Tensor]
_arguments: ContextVar[Mapping[str, Any]] = ContextVar("cross_attention_kwargs", default={})  # noqa: B039 (never written)


@contextmanager
def processor_arguments(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Hand ``arguments``, a call's ``cross_attention_kwargs``, to every processor that names them."""
    before = _arguments.set(arguments)
    try:
        yield
    finally:
        _arguments.reset(before)


class Attention(Part):
    """Attention by its published names; the attributes are those that the reference's processors read."""

    norm_cross = norm_q = norm_k = None
    only_cross_attention = False

    @property
    def residual_connection(self) -> bool:
        """Whether the normalisation before and the sum with the input after are part of it: attention over pixels."""
        return hasattr(self.real, "self_attn")

    upcast_softmax = residual_connection  # whether the reference keeps the softmax in float32

    @property
    def rescale_output_factor(self) -> float:
        """What the result is divided by."""
        return self.real.scale if self.residual_connection else 1.0

    @property
    def heads(self) -> int:
        """The number of heads."""
        return self.real.self_attn.heads if self.residual_connection else self.real.heads

    @property
    def scale(self) -> float:
        """What scores are multiplied with, one over the root of a head's width."""
        return (self.to_q.out_features // self.heads) ** -0.5

    @property
    def cross_attention_dim(self) -> int:
        """Width of the context."""
        return self.to_k.in_features

    @property
    def upcast_attention(self) -> bool:
        """Whether scores are computed in float32, as a configuration may say."""
        return bool(self.config.get("upcast_attention"))

    @property
    def processor(self) -> Processor:
        """What computes it. Where none was set, this is equal to what does."""
        return vars(self.real).get("processor") or self.real._modules.get("processor") or AttnProcessor2_0()

    @processor.setter
    def processor(self, processor: Processor) -> None:
        self.set_processor(processor)

    def get_processor(self) -> Processor:
        """Return what computes it."""
        return self.processor

    def set_processor(self, processor: Processor | None) -> None:
        """Let ``processor`` compute it; None, or a plain ``AttnProcessor2_0``, lets minidiff do so as before."""
        real = self.real
        if hasattr(real, "processor"):
            del real.processor
            del real.forward
            if (before := vars(real).pop("_forward", None)) is not None:
                real.forward = before
        if processor is not None and type(processor) is not AttnProcessor2_0:
            if not callable(processor):
                raise TypeError(f"{self.name}: a processor is called as processor(attn, x, ...), found {processor!r}")
            if "forward" in vars(real):
                vars(real)["_forward"] = real.forward
            real.processor = processor  # one with weights becomes a part of the network
            real.forward = partial(_process, self)  # a partial, which the fast ways respect

    def _with_our_arguments(self, run: Callable, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return run(hidden_states, **_ours(*args, **kwargs))

    def head_to_batch_dim(self, tensor: Tensor, out_dim: int = 3) -> Tensor:
        """Split the heads: (B, L, N K) -> (B N, L, K), or (B, N, L, K) with ``out_dim=4``."""
        B, N = tensor.shape[0], self.heads
        split = tensor.reshape(B, -1, N, tensor.shape[-1] // N).transpose(1, 2)
        return split.reshape(B * N, split.shape[2], -1) if out_dim == 3 else split

    def batch_to_head_dim(self, tensor: Tensor) -> Tensor:
        """Join the heads: (B N, L, K) -> (B, L, N K)."""
        N = self.heads
        _, L, K = tensor.shape
        return tensor.reshape(-1, N, L, K).transpose(1, 2).reshape(-1, L, N * K)

    def get_attention_scores(self, query: Tensor, key: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return softmax(q k^T / sqrt(K) + mask), (B N, L, L_ctx), for q and k (B N, L, K)."""
        dtype = query.dtype
        if self.upcast_attention:
            query, key = query.float(), key.float()
        if attention_mask is None:
            empty = query.new_empty(query.shape[0], query.shape[1], key.shape[1])
            scores = torch.baddbmm(empty, query, key.transpose(-1, -2), beta=0, alpha=self.scale)
        else:
            scores = torch.baddbmm(attention_mask, query, key.transpose(-1, -2), alpha=self.scale)
        return (scores.float() if self.upcast_softmax else scores).softmax(dim=-1).to(dtype)

    def prepare_attention_mask(
        self, attention_mask: Tensor | None, target_length: int, batch_size: int, out_dim: int = 3
    ) -> Tensor | None:
        """Repeat what is added to the scores for every head: (B, 1, L_ctx) -> (B N, 1, L_ctx) or (B, N, 1, L_ctx).

        A mask that is not ``target_length`` long gets that many zeros at its end, in the reference too.
        """
        if attention_mask is None:
            return None
        if attention_mask.shape[-1] != target_length:
            attention_mask = F.pad(attention_mask, (0, target_length))
        if out_dim == 4:
            return attention_mask.unsqueeze(1).repeat_interleave(self.heads, dim=1)
        few = attention_mask.shape[0] < batch_size * self.heads
        return attention_mask.repeat_interleave(self.heads, dim=0) if few else attention_mask


def _ours(
    encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None, temb: None = None, **unknown: Any
) -> dict[str, Any]:
    """Turn the reference's arguments of an attention into ours; what is added to scores can be our mask as it is."""
    if unknown:
        raise TypeError(f"attention does not take {', '.join(unknown)}")
    found = {"ctx": encoder_hidden_states, "mask": attention_mask}
    if attention_mask is not None:
        found["mask"] = attention_mask[:, None] if attention_mask.ndim == 3 else attention_mask
    return {name: value for name, value in found.items() if value is not None}


def _process(attn: Attention, x: Tensor, ctx: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
    """Let the processor of ``attn`` compute it: the ``forward`` of the module while it has one."""
    run, arguments = attn.processor, _arguments.get()
    if arguments:
        plain = isinstance(run, nn.Module) and type(run).__call__ is nn.Module.__call__
        named = inspect.signature(run.forward if plain else run.__call__).parameters
        arguments = {name: value for name, value in arguments.items() if name in named}
    mask = None if mask is None else mask.squeeze(1)  # (B, 1, L_ctx): it is added to the scores
    return run(attn, x, encoder_hidden_states=ctx, attention_mask=mask, **arguments)


class AttnProcessor:
    """Attention with its scores in memory, (B N, L, L_ctx): what a program that changes scores begins with."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attend from ``hidden_states``, (B, L, D) or a map (B, C, H, W), to the text or to themselves."""
        x = hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states
        length = (x if encoder_hidden_states is None else encoder_hidden_states).shape[1]
        mask = attn.prepare_attention_mask(attention_mask, length, len(x))
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        ctx = x if encoder_hidden_states is None else encoder_hidden_states
        y = self.attend(attn, attn.to_q(x), attn.to_k(ctx), attn.to_v(ctx), mask)
        y = attn.to_out[1](attn.to_out[0](y))
        if hidden_states.ndim == 4:
            y = y.transpose(-1, -2).reshape(hidden_states.shape)
        if attn.residual_connection:
            y = y + hidden_states
        return y / attn.rescale_output_factor

    def attend(self, attn: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Return softmax(q k^T / sqrt(K) + mask) v, (B, L, N K); ``mask`` is (B N, 1 or L, L_ctx)."""
        q, k, v = map(attn.head_to_batch_dim, (q, k, v))
        return attn.batch_to_head_dim(torch.bmm(attn.get_attention_scores(q, k, mask), v))


class AttnProcessor2_0(AttnProcessor):
    """Attention with torch's fused kernels, which do not keep the scores: how minidiff computes it anyway."""

    def attend(self, attn: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Return softmax(q k^T / sqrt(K) + mask) v, (B, L, N K); ``mask`` is (B N, 1 or L, L_ctx)."""
        B = len(q)
        q, k, v = (attn.head_to_batch_dim(s, out_dim=4) for s in (q, k, v))
        mask = None if mask is None else mask.view(B, attn.heads, -1, mask.shape[-1])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class ResnetBlock2D(Part):
    """A residual block."""

    def _with_our_arguments(self, run: Callable, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        return run(input_tensor, temb)


class BasicTransformerBlock(Part):
    """A transformer block; the attributes are those that programs read which replace its ``forward``."""

    use_ada_layer_norm = use_ada_layer_norm_zero = use_ada_layer_norm_single = False
    use_layer_norm, norm_type = True, "layer_norm"
    pos_embed = _chunk_size = None

    @property
    def only_cross_attention(self) -> bool:
        """Whether its first attention looks at the text too."""
        return self.real.only_cross

    def _with_our_arguments(self, run: Callable, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return run(hidden_states, **_text_of(*args, **kwargs))

    @staticmethod
    def _with_their_arguments(run: Callable, x: Tensor, ctx: Tensor, mask: Tensor | None = None) -> Tensor:
        return run(x, encoder_hidden_states=ctx, encoder_attention_mask=None if mask is None else mask.squeeze(1))


class Transformer2DModel(Part):
    """A stack of transformer blocks over the pixels of a feature map."""

    def _with_our_arguments(
        self, run: Callable, hidden_states: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any
    ) -> Any:
        x = run(hidden_states, **_text_of(None, *args, **kwargs))
        return SimpleNamespace(sample=x) if return_dict else (x,)

    @staticmethod
    def _with_their_arguments(run: Callable, x: Tensor, ctx: Tensor, mask: Tensor | None = None) -> Tensor:
        return BasicTransformerBlock._with_their_arguments(partial(run, return_dict=False), x, ctx, mask)[0]


def _text_of(
    attention_mask: None = None,
    encoder_hidden_states: Tensor | None = None,
    *,
    encoder_attention_mask: Tensor | None = None,
    **others: Any,
) -> dict[str, Tensor | None]:
    """Return the text and its mask among the arguments of a block, by our names; the others must ask for nothing."""
    if attention_mask is not None or any(value is not None for value in others.values()):
        found = [name for name, value in others.items() if value is not None]
        raise TypeError(f"a block called by its published name takes the text alone, found {', '.join(found)} too")
    mask = encoder_attention_mask
    return {"ctx": encoder_hidden_states, "mask": None if mask is None else mask.unsqueeze(1)}


_PARTS: dict[str, type[Part]] = {  # our class -> the part that stands for it
    "ResBlock": ResnetBlock2D,
    "SpatialTransformer": Transformer2DModel,
    "TransformerBlock": BasicTransformerBlock,
}


def kind_of(children: Iterable[str], real: nn.Module | None) -> type[Part]:
    """Return what stands for a part with these children: attention, whatever computes it, or the part of our class."""
    return Attention if "to_q" in children else _PARTS.get(type(real).__name__, Part)


class Attending:
    """What a network with attention answers about its processors."""

    @property
    def attn_processors(self) -> dict[str, Processor]:
        """Every processor, by its published name, such as ``mid_block.attentions.0...attn1.processor``."""
        return {name: attn.processor for name, attn in self._attentions().items()}

    def set_attn_processor(self, processor: Processor | dict[str, Processor] | None) -> None:
        """Let ``processor`` compute every attention, or each its own: a dict with the keys of ``attn_processors``."""
        attentions = self._attentions()
        if isinstance(processor, Mapping) and processor.keys() != attentions.keys():
            wrong = sorted(processor.keys() ^ attentions.keys())
            raise ValueError(
                f"set_attn_processor: the number of processors, {len(processor)}, or their names do not match the "
                f"{len(attentions)} attentions of {type(self).__name__}; missing or unknown: {', '.join(wrong[:4])}..."
            )
        for name, attn in attentions.items():
            attn.set_processor(processor[name] if isinstance(processor, Mapping) else processor)

    def set_default_attn_processor(self) -> None:
        """Let minidiff compute every attention."""
        self.set_attn_processor(None)

    @property
    def has_processors(self) -> bool:
        """Whether anything but minidiff computes an attention."""
        return any("processor" in vars(module) or "processor" in module._modules for module in self.modules())

    def _attentions(self) -> dict[str, Attention]:
        return {f"{name}.processor": part for name, part in self.named_modules() if isinstance(part, Attention)}

    def set_attention_backend(self, backend: str) -> None:
        """Accept "native", torch's own kernels, which are always in use; raise ``ValueError`` for others."""
        if backend.lower() != "native":
            raise ValueError(f"set_attention_backend: found {backend!r}; minidiff has 'native', torch's own kernels")

    def reset_attention_backend(self) -> None:
        """Do nothing: torch's own kernels are always in use."""

    def fuse_qkv_projections(self) -> None:
        """Do nothing, and say so: the products stay as they are; ``optimize`` is minidiff's way to be faster."""
        logger.info("fuse_qkv_projections changes nothing: q, k and v stay products of their own; use optimize()")

    def unfuse_qkv_projections(self) -> None:
        """Do nothing: nothing was fused."""
