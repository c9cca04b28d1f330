"""Training in less memory: what a block computes inside is thrown away and computed a second time where it is needed.

The backward pass needs the inputs of every layer. Kept are those of whole blocks alone; the backward pass runs each
block again before it goes through it. The gradients are the same; a step takes about a third longer.

Paper: Chen et al. 2016 (https://arxiv.org/abs/1604.06174). Checked against ``enable_gradient_checkpointing`` of
diffusers and ``gradient_checkpointing_enable`` of transformers.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Recompute = Callable[..., Any]  # (run, *arguments) -> what run(*arguments) returns, computed again in the backward pass


class Recomputed(nn.Module):
    """A part of a network that is computed again as a whole."""

    recompute: Recompute | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``forward`` as any module does, through ``recompute`` where there is one and gradients are wanted."""
        if self.recompute is None or not torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)
        return self.recompute(super().__call__, *args, **kwargs)


class GradientCheckpointing:
    """What a network can do about the memory of its training."""

    _supports_gradient_checkpointing: ClassVar[bool] = True
    modules: Callable[[], Iterator[nn.Module]]  # of nn.Module

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Recompute | None = None) -> None:
        """Compute the inside of every block a second time in the backward pass instead of keeping it.

        ``gradient_checkpointing_func(block, *arguments)`` runs a block; default: torch's ``checkpoint``.
        """
        self._recompute(gradient_checkpointing_func or partial(checkpoint, use_reentrant=False))

    def disable_gradient_checkpointing(self) -> None:
        """Keep what the backward pass needs."""
        self._recompute(None)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether blocks are computed a second time in the backward pass."""
        return any(block.recompute is not None for block in self.modules() if isinstance(block, Recomputed))

    def _recompute(self, how: Recompute | None) -> None:
        for block in self.modules():
            if isinstance(block, Recomputed):
                block.recompute = how
