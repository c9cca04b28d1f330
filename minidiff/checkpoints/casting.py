"""Layerwise casting: a network keeps its weights in a small dtype, and each layer computes with copies in another.

    y = layer(x; W.to(compute_dtype), b.to(compute_dtype))        W, b in storage_dtype

A network in float8 takes half the room of one in bfloat16; a call takes the copies of one layer at a time on top of it.
Linear layers, convolutions and embedding tables are cast; norms, and layers whose published name a pattern finds, are
not. Checked bit for bit against ``enable_layerwise_casting`` of ``diffusers.ModelMixin``, which casts the weights of a
layer in their place before and after each call: here nothing is written, so threads may share a network.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.checkpoints.load import DTYPES
from minidiff.checkpoints.remap import CONV1X1

DEFAULT_SKIP_MODULES_PATTERN = ("pos_embed", "patch_embed", "norm", "^proj_in$", "^proj_out$")
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CAST = (*_CONVS, nn.Linear, nn.Embedding)
Classes = tuple[type[nn.Module], ...]


class CastForward:
    """Stands in the place of a layer's ``forward``, and computes with copies of its weights."""

    def __init__(
        self, layer: nn.Module, storage_dtype: torch.dtype, compute_dtype: torch.dtype, non_blocking: bool
    ) -> None:
        self.layer, self.non_blocking = layer, non_blocking
        self.storage_dtype, self.compute_dtype = storage_dtype, compute_dtype

    def store(self) -> None:
        """Bring the weights into the dtype in which they are stored, and free what they were."""
        for name, weight in self.layer._parameters.items():
            if weight is not None and weight.dtype != self.storage_dtype:
                stored = weight.detach().to(self.storage_dtype, non_blocking=self.non_blocking)
                self.layer._parameters[name] = nn.Parameter(stored, requires_grad=weight.requires_grad)

    def __call__(self, input: Tensor) -> Tensor:
        """Compute what the layer computes."""
        layer, weight = self.layer, self._cast(self.layer.weight)
        if isinstance(layer, nn.Embedding):
            return F.embedding(input, weight, layer.padding_idx)
        bias = None if layer.bias is None else self._cast(layer.bias)
        return (
            F.linear(input, weight, bias) if isinstance(layer, nn.Linear) else layer._conv_forward(input, weight, bias)
        )

    def _cast(self, weight: Tensor) -> Tensor:
        return weight.to(self.compute_dtype, non_blocking=self.non_blocking)


def compute_dtype(layer: nn.Module) -> torch.dtype:
    """Return the dtype that a layer computes in: that of its weights, unless they are cast."""
    forward = vars(layer).get("forward")
    return forward.compute_dtype if isinstance(forward, CastForward) else next(layer.parameters(recurse=False)).dtype


def apply_layerwise_casting(
    module: nn.Module,
    storage_dtype: torch.dtype,
    compute_dtype: torch.dtype,
    skip_modules_pattern: Sequence[str] | str | None = "auto",
    skip_modules_classes: Classes | None = None,
    non_blocking: bool = False,
) -> None:
    """Store the weights of the layers of ``module`` in ``storage_dtype``, and compute in ``compute_dtype``.

    Args:
        module: a network, or any module of torch's layers.
        storage_dtype: such as ``torch.float8_e4m3fn``.
        compute_dtype: the dtype of what the layers are called with.
        skip_modules_pattern: regular expressions; a module in whose name, or that of one around it, one is found is
            left as it is. "auto" are the usual ones, None is none.
        skip_modules_classes: classes whose modules are left as they are.
        non_blocking: whether copies to another device need not be waited for.

    Raises:
        ValueError: naming a layer that is cast already, whose ``forward`` was exchanged, by ``optimize`` or a program,
            or that has values beyond the largest of ``storage_dtype``. Nothing is changed then.
        TypeError: if a dtype is none to store or compute in, or the patterns are no sequence of strings.
    """
    is_floating = isinstance(storage_dtype, torch.dtype) and storage_dtype.is_floating_point
    if not is_floating or storage_dtype == torch.float8_e8m0fnu:  # which has no sign: half of the weights became NaN
        raise TypeError(
            f"storage_dtype should be a floating torch.dtype such as torch.float8_e4m3fn, found {storage_dtype!r}"
        )
    if compute_dtype not in DTYPES.values():
        raise TypeError(f"compute_dtype={compute_dtype!r} is not one of {', '.join(map(str, DTYPES.values()))}")
    usual = isinstance(skip_modules_pattern, str) and skip_modules_pattern == "auto"
    patterns = DEFAULT_SKIP_MODULES_PATTERN if usual else skip_modules_pattern or ()
    if isinstance(patterns, str):
        raise TypeError(f"skip_modules_pattern should be a sequence of patterns, found the string {patterns!r}")
    layers = dict(_layers(module, tuple(patterns), skip_modules_classes or (), _published_convolutions(module)))
    for name, layer in layers.items():
        _check(name, layer, storage_dtype)
    for layer in layers.values():
        layer.forward = CastForward(layer, storage_dtype, compute_dtype, non_blocking)
        layer.forward.store()


def _layers(
    module: nn.Module, patterns: tuple[str, ...], classes: Classes, convs: frozenset[str], name: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers to cast with their published names."""
    kinds = issubclass(nn.Conv2d, classes) if name in convs else isinstance(module, classes)
    if kinds or any(re.search(pattern, name) for pattern in patterns):
        return
    if isinstance(module, _CAST):
        yield name, module
        return
    for last, child in module.named_children():
        yield from _layers(child, patterns, classes, convs, f"{name}.{last}" if name else last)


def _published_convolutions(module: nn.Module) -> frozenset[str]:
    """Return the published names of linear layers that are convolutions in the reference."""
    rows = module.rows() if hasattr(module, "rows") else ()
    return frozenset(name.removesuffix(".weight") for row in rows if row.hub_op is CONV1X1 for name in row.hub)


def _check(name: str, layer: nn.Module, dtype: torch.dtype) -> None:
    """Raise ``ValueError`` for a layer that cannot be cast."""
    forward = vars(layer).get("forward")
    if isinstance(forward, CastForward):
        raise ValueError(f"{name} is cast already: load the network again to store it in another dtype")
    if forward is not None:
        fast = type(forward).__module__.startswith("minidiff.fast.")
        do = "call unoptimize() before enable_layerwise_casting(), and optimize() after it" if fast else "take it out"
        raise ValueError(f"{name} has another forward ({type(forward).__name__}): {do}")
    if type(layer) not in _CAST or (isinstance(layer, nn.Embedding) and layer.max_norm is not None):
        raise ValueError(f"{name} is a {type(layer).__name__}: name it in skip_modules_pattern to leave it as it is")
    limit = torch.finfo(dtype).max
    for weight in layer._parameters.values():
        narrower = weight is not None and limit < torch.finfo(weight.dtype).max and not weight.is_meta
        if narrower and (largest := weight.detach().abs().max().item()) > limit:
            raise ValueError(
                f"{name} has values up to {largest:g} and {dtype} ends at {limit:g}: name it in "
                "skip_modules_pattern, or choose another storage_dtype"
            )


class LayerwiseCasting:
    """Mixin of the networks that can store their weights in another dtype."""

    _skip_layerwise_casting_patterns: ClassVar[Sequence[str] | None] = None  # besides those that the caller names
    _compute_dtype: torch.dtype | None = None  # once layers are cast

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        skip_modules_pattern: Sequence[str] | None = None,
        skip_modules_classes: Classes | None = None,
        non_blocking: bool = False,
    ) -> None:
        """Store the weights in ``storage_dtype`` and compute in ``compute_dtype``, by default the network's own.

        The rounding is for good: to undo it, load the network again. The other arguments are those of
        ``apply_layerwise_casting``; without patterns the usual ones are meant.
        """
        patterns: Any = DEFAULT_SKIP_MODULES_PATTERN if skip_modules_pattern is None else skip_modules_pattern
        if isinstance(patterns, str):
            raise TypeError(f"skip_modules_pattern should be a sequence of patterns, found the string {patterns!r}")
        patterns = (*patterns, *(self._skip_layerwise_casting_patterns or ()))
        dtype = self.dtype if compute_dtype is None else compute_dtype
        apply_layerwise_casting(self, storage_dtype, dtype, patterns, skip_modules_classes, non_blocking)
        self._compute_dtype = dtype

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move and convert, but what is cast keeps its dtype: ``to(dtype)`` is about what is not."""
        super()._apply(*args, **kwargs)
        for module in self.modules():
            forward = vars(module).get("forward")
            if isinstance(forward, CastForward):
                forward.store()
        return self
