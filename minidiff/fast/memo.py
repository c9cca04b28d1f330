"""What does not change during a run, computed once: keys and values of the text, and the time embeddings of all steps.

And what under guidance does not change from text to text, computed once per step: the first residual block and the
first self-attention.

A ``Memo`` belongs to the run that this thread computes a step of (``minidiff.threads.RUN``). It lies on the run, which
lets go of it in the end; nothing is kept on the network, so threads do not meet.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.fast.packed import version
from minidiff.fast.unchanged import Fast, bystander, calls_are_plain, unwatched
from minidiff.networks.layers import Attention, ResBlock, TimeMLP
from minidiff.networks.unet import UNet2DConditionModel
from minidiff.threads import RUN


class Memo:
    """What one run of a UNet remembers."""

    def __init__(self) -> None:
        self.temb: Tensor | None = None  # of all steps, (N, 1 or B, E); None = this step's is not from here
        self.step = 0
        self.copies, self.alike = 1, ()  # the modules whose input is made of so many equal copies in this step
        self._kept: dict[nn.Module, tuple[Any, Any, Any]] = {}

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
    run = RUN.get()
    if run is None or torch.is_grad_enabled():
        return None
    if vars(run).get("memo") is None:
        run.memo = Memo()
    return run.memo


def copies(module: nn.Module) -> int:
    """Return how many equal copies the input of ``module`` is made of, as far as is known."""
    memo = current()
    known = memo is not None and memo.step == RUN.get().step and module in memo.alike
    return memo.copies if known else 1


def repeated(x: Tensor, count: int) -> Tensor:
    """Return so many copies of a batch."""
    return x if count == 1 else torch.cat([x] * count)  # x.repeat would lose the memory format


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
    """``UNet2DConditionModel._embed_time`` from the current memo, which learns here what this step is asked."""

    kind, method = UNet2DConditionModel, "_embed_time"

    def fast(self, sample: Tensor, timestep: Any, added: Mapping[str, Tensor]) -> Tensor:
        """Return the time embedding (B, E)."""
        memo, run, unet = current(), RUN.get(), self.module
        if memo is None:
            return NotImplemented
        memo.temb, memo.step, memo.copies, memo.alike = None, run.step, run.passes, ()
        times = run.plan.timesteps
        asked = isinstance(timestep, Tensor) and timestep.ndim == 0 and version(timestep) == version(times[run.step])
        mlps = [unet.time_embed] if unet.add_embed is None else [unet.time_embed, unet.add_embed]
        layers = [layer for mlp in mlps for layer in mlp.children()]
        known = all(unwatched(m, TimeMLP) for m in mlps) and all(unwatched(layer, nn.Linear) for layer in layers)
        known = known and unet.class_embed is None
        if not (asked and known):
            return NotImplemented
        sources = *added.values(), times, *weights(*layers)
        x = sample if added else sample[:1]  # without added conditions the time is all there is
        memo.temb = memo.once(
            unet, lambda: torch.stack([UNet2DConditionModel._embed_time(unet, x, t, added) for t in times]), *sources
        )
        (B, C), first = run.latents.shape[:2], unet.down[0]
        only_latents = not added and sample.shape[:2] == (run.passes * B, C)  # and nothing that may differ
        if only_latents and first.attn and calls_are_plain() and all(map(bystander, before_the_text(unet))):
            block = first.attn[0].blocks[0]
            memo.alike = (first.res[0],) if block.only_cross else (first.res[0], block.self_attn)
        return memo.temb[memo.step].expand(len(sample), -1)


class FastResTime(Fast):
    """``ResBlock._condition_on_time`` with what the block makes of the time, (1 or B, C), from the current memo."""

    kind, method, values = ResBlock, "_condition_on_time", {"scale_shift": False}

    def fast(self, h: Tensor, temb: Tensor) -> Tensor:
        """Return norm2(h + time(silu(temb)))."""
        memo, time = current(), self.module.time
        if memo is None or memo.temb is None or temb.data_ptr() != memo.temb[memo.step].data_ptr():
            return NotImplemented
        if not unwatched(time, nn.Linear):
            return NotImplemented
        shifts = memo.once(self.module, lambda: time(F.silu(memo.temb)), memo.temb, *weights(time))
        return self.module.norm2(h + shifts[memo.step][:, :, None, None])


class FastRes(Fast):
    """The forward of ``ResBlock``, with one of the equal copies of its input."""

    kind = ResBlock

    def fast(self, x: Tensor, temb: Tensor, resize: None = None) -> Tensor:
        """Return y (B, C_out, H, W)."""
        count = copies(self.module)
        if count == 1:
            return NotImplemented
        return repeated(ResBlock.forward(self.module, x[: len(x) // count], temb[:1]), count)


def before_the_text(unet: UNet2DConditionModel) -> Iterator[nn.Module]:
    """Yield what computes before the first look at the text."""
    block = unet.down[0]
    yield from (unet, unet.conv_in, block, *block.res[0].modules(), block.attn[0])
    attn, first = block.attn[0], block.attn[0].blocks[0]
    yield from (attn.norm, attn.proj_in, first, first.norm1, *first.self_attn.modules())
