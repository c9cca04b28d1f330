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

from minidiff.layers import Attention, ResBlock
from minidiff.unet import UNet2DConditionModel

_current: "ContextVar[Memo | None]" = ContextVar("memo", default=None)


class Memo:
    """What one run of a UNet remembers.

    Args:
        timesteps: of all steps of the run, (N,).
    """

    def __init__(self, timesteps: Tensor) -> None:
        self.timesteps, self.step = timesteps, 0
        self._texts: dict[nn.Module, tuple[Tensor, int | None, Tensor, Tensor]] = {}
        self._added: tuple[Tensor, ...] | None = None
        self._temb: Tensor | None = None  # (N, 1 or B, E)
        self._times: dict[nn.Module, Tensor] = {}  # (N, 1 or B, C) of every residual block

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Be the current memo, at a step of the run."""
        self.step = step
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def keys(self, module: Attention, ctx: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the text, computed anew if a callback put another text in its place."""
        version = None if ctx.is_inference() else ctx._version
        kept = self._texts.get(module)
        if kept is None or kept[0] is not ctx or kept[1] != version:
            kept = self._texts[module] = (ctx, version, module.k(ctx), module.v(ctx))
        return kept[2], kept[3]

    def temb(self, plain: Callable[..., Tensor], sample: Tensor, added: Mapping[str, Tensor] | None) -> Tensor:
        """Return the time embedding of this step (1 or B, E); ``plain`` computes that of one."""
        sources = tuple(added.values()) if added else ()
        fresh = self._added is None or len(sources) != len(self._added)
        if fresh or any(a is not b for a, b in zip(sources, self._added, strict=True)):
            sample = sample if added else sample[:1]  # without added conditions the time is all there is
            self._temb = torch.stack([plain(sample, t, added) for t in self.timesteps])
            self._added = sources
            self._times.clear()
        return self._temb[self.step]

    def time(self, module: nn.Linear) -> Tensor:
        """Return what a residual block is told at this step, (1 or B, C)."""
        if module not in self._times:
            self._times[module] = module(F.silu(self._temb))
        return self._times[module][self.step]


def text_keys(module: Attention, ctx: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values (B, L, D) of the text, from the current memo if there is one."""
    memo = _current.get()
    return (module.k(ctx), module.v(ctx)) if memo is None else memo.keys(module, ctx)


class FastTime:
    """``UNet2DConditionModel._time_condition`` from the current memo."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet

    def __call__(self, sample: Tensor, timestep: Any, added: Mapping[str, Tensor] | None) -> Tensor:
        """Return the time embedding (1 or B, E)."""
        memo = _current.get()
        plain = UNet2DConditionModel._time_condition
        if memo is None:
            return plain(self.unet, sample, timestep, added)
        return memo.temb(lambda *args: plain(self.unet, *args), sample, added)


class FastTold:
    """``ResBlock._time`` from the current memo: the time (1 or B, C) as this block is told it."""

    def __init__(self, block: ResBlock) -> None:
        self.block = block

    def __call__(self, temb: Tensor) -> Tensor:
        """Return time(silu(temb))."""
        memo = _current.get()
        return ResBlock._time(self.block, temb) if memo is None else memo.time(self.block.time)
