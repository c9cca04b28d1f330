"""What does not change during a run, computed once: keys and values of the text, and the time embeddings of all steps.

A ``Memo`` belongs to one run. While the network is asked, it is the current memo of the thread; the layers that know
about it look there. Nothing is kept on the network, so threads do not meet.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.compat.published import own_modules
from minidiff.fast.packed import version
from minidiff.fast.unchanged import Fast, bystander, calls_are_plain, unwatched
from minidiff.networks.layers import Attention, ResBlock, TimeMLP
from minidiff.networks.unet import UNet2DConditionModel

_current: "ContextVar[Memo | None]" = ContextVar("memo", default=None)


class Memo:
    """What one run of a UNet remembers.

    Args:
        timesteps: of all steps of the run, (N,).
    """

    def __init__(self, timesteps: Tensor) -> None:
        self.timesteps, self.step, self.copies = timesteps, 0, 1
        self.temb: Tensor | None = None  # of all steps, (N, 1 or B, E)
        self._kept: dict[nn.Module, tuple[Any, Any, Any]] = {}

    @contextmanager
    def at(self, step: int, copies: int = 1) -> Iterator[None]:
        """Be the current memo, at a step of the run; the sample of the UNet is made of so many equal copies."""
        self.step, self.copies = step, copies
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def once(self, module: nn.Module, make: Callable[[], Any], *sources: Tensor | None) -> Any:
        """Return what ``make`` computes for a module, again if a source is another tensor or was written to."""
        key = [s if s is None else (id(s), version(s)) for s in sources]
        kept, value, _ = self._kept.get(module, (None, None, ()))
        if kept != key:
            value = make()
            self._kept[module] = (key, value, sources)  # what is held keeps its id
        return value


def current() -> Memo | None:
    """Return the memo of the run that asks; where gradients are recorded, nothing can be kept from step to step."""
    return None if torch.is_grad_enabled() else _current.get()


def weights(*parts: nn.Linear) -> list[Tensor | None]:
    """Return the weights that linear layers compute with."""
    return [tensor for part in parts for tensor in (part.weight, part.bias)]


def text_keys(module: Attention, ctx: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values (B, L, D) of the text, from the current memo if there is one."""
    memo, k, v = current(), module.k, module.v
    if memo is None or not (unwatched(k, nn.Linear) and unwatched(v, nn.Linear)):
        return k(ctx), v(ctx)
    return memo.once(module, lambda: (k(ctx), v(ctx)), ctx, *weights(k, v))


class FastTime(Fast):
    """``UNet2DConditionModel._time_condition`` from the current memo."""

    kind, method = UNet2DConditionModel, "_time_condition"

    def fast(self, sample: Tensor, timestep: Any, added: Mapping[str, Tensor]) -> Tensor:
        """Return the time embedding (B, E)."""
        memo, unet = current(), self.module
        if memo is None:
            return NotImplemented
        memo.temb = None
        asked = isinstance(timestep, Tensor) and version(timestep) == version(memo.timesteps[memo.step])
        mlps = [unet.time_embed] if unet.add_embed is None else [unet.time_embed, unet.add_embed]
        if not asked or not all(unwatched(m, TimeMLP) for m in mlps):
            return NotImplemented
        layers = [layer for mlp in mlps for layer in mlp.children()]
        if not all(unwatched(layer, nn.Linear) for layer in layers):
            return NotImplemented
        sources = *added.values(), memo.timesteps, *weights(*layers)
        x = sample if added else sample[:1]  # without added conditions the time is all there is
        memo.temb = memo.once(
            unet,
            lambda: torch.stack([UNet2DConditionModel._time_condition(unet, x, t, added) for t in memo.timesteps]),
            *sources,
        )
        return memo.temb[memo.step].expand(len(sample), -1)


class FastTold(Fast):
    """``ResBlock._time`` from the current memo: the time (1 or B, C) as this block is told it."""

    kind, method = ResBlock, "_time"

    def fast(self, temb: Tensor) -> Tensor:
        """Return time(silu(temb))."""
        memo, time = current(), self.module.time
        if memo is None or memo.temb is None or temb.data_ptr() != memo.temb[memo.step].data_ptr():
            return NotImplemented
        if not unwatched(time, nn.Linear):
            return NotImplemented
        return memo.once(self.module, lambda: time(F.silu(memo.temb)), memo.temb, *weights(time))[memo.step]


class FastBody(Fast):
    """``UNet2DConditionModel._body`` with one of the equal copies of the sample, until the first look at the text."""

    kind, method = UNet2DConditionModel, "_body"

    def fast(self, x: Tensor, temb: Tensor, ctx: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run the network proper."""
        memo, unet = current(), self.module
        alike = memo is not None and memo.copies > 1 and unet.add_embed is None  # added conditions differ
        if not alike or not calls_are_plain() or not all(map(bystander, before_the_text(unet))):
            return NotImplemented
        return UNet2DConditionModel._body(unet, x[: len(x) // memo.copies], temb, ctx, mask)


def before_the_text(unet: UNet2DConditionModel) -> Iterator[nn.Module]:
    """Yield what computes before the first look at the text, and a little more."""
    for name, module in own_modules(unet):
        if name.endswith(".cross_attn"):
            return
        yield module
