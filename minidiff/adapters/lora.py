"""Low-rank adaptation (LoRA): a layer's weight W becomes W + s B A, with A and B of a rank far below that of W.

    y = W x + s B (A x)        A: (r, I), B: (O, r), s = alpha / r        linear layer (O, I)
                               A: (r, I, h, w), B: (O, r, 1, 1)           convolution (O, I, h, w), in the place of W

Hu et al. 2021 (https://arxiv.org/abs/2106.09685), section 4.1; convolutions as in kohya's LoCon. Checked against
``peft.tuners.lora`` as diffusers uses it.

The network keeps its modules, its weights and their names. A forward hook on each adapted layer adds s B (A x) to the
layer's output; A and B are buffers of the layer that are not saved, so that they follow it to other devices and dtypes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.checkpoints.casting import compute_dtype
from minidiff.errors import check_number

# What all adapters are multiplied with in the call that is under way. Each thread has its own.
_call_scale: ContextVar[float] = ContextVar("lora_scale", default=1.0)


@contextmanager
def lora_scaled(scale: float | None) -> Iterator[None]:
    """Multiply all adapters that are not fused with ``scale``, in this thread and as long as the context lasts.

    None leaves everything as it is.
    """
    before = _call_scale.set(_call_scale.get() if scale is None else scale)
    try:
        yield
    finally:
        _call_scale.reset(before)


class LowRank(NamedTuple):
    """The update s B A of one layer."""

    down: Tensor  # A
    up: Tensor  # B
    scale: float  # s


class LoraLayer:
    """The updates of one layer by several adapters; as a forward hook, it adds those that are active."""

    def __init__(self, module: nn.Linear | nn.Conv2d, hub: str) -> None:
        self.module, self.hub = module, hub
        self.scales: dict[str, float] = {}  # adapter -> s
        self.active: tuple[tuple[str, float], ...] = ()  # (adapter, s times its weight); replaced, never changed
        self.original: nn.Parameter | None = None  # W, while the module's weight is W + s B A
        module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        scale = _call_scale.get()
        for adapter, factor in self.active:
            down, up = self.matrices(adapter)
            output = torch.add(output, self._low_rank(args[0], down, up), alpha=factor * scale)
        return output

    def _low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """Return B (A x)."""
        if isinstance(self.module, nn.Conv2d):
            return F.conv2d(F.conv2d(x, down, None, self.module.stride, self.module.padding), up)
        return F.linear(F.linear(x, down), up)

    def matrices(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return A and B of an adapter."""
        buffers = self.module._buffers
        return buffers[f"lora_{adapter}_A"], buffers[f"lora_{adapter}_B"]

    def add(self, adapter: str, update: LowRank) -> None:
        """Take over the matrices of an adapter, in the layer's layout, dtype and device."""
        weight = self.module.weight
        for letter, matrix in (("A", update.down), ("B", update.up)):
            shape = matrix.shape if weight.ndim == 4 else matrix.shape[:2]  # a 1x1 convolution is a linear layer
            buffer = matrix.detach().reshape(shape).to(weight.device, compute_dtype(self.module))
            self.module.register_buffer(f"lora_{adapter}_{letter}", buffer, persistent=False)
        self.scales[adapter] = update.scale

    def remove(self, adapter: str) -> None:
        """Forget an adapter; without any, the layer is what it was."""
        del self.scales[adapter]
        for letter in "AB":
            del self.module._buffers[f"lora_{adapter}_{letter}"]
            self.module._non_persistent_buffers_set.discard(f"lora_{adapter}_{letter}")
        if not self.scales:
            for number, hook in list(self.module._forward_hooks.items()):
                if hook is self:
                    del self.module._forward_hooks[number]

    def fused(self, factor: float) -> Tensor:
        """Return W + factor s B A of all adapters that are active.

        Products of half precision are computed in float32, as in the reference.
        """
        weight = self.module.weight.detach()
        if weight.dtype != compute_dtype(self.module):
            raise ValueError(f"{self.hub} is stored in {weight.dtype}: fuse before enable_layerwise_casting()")
        for adapter, scale in self.active:
            down, up = self.matrices(adapter)
            if down.dtype in (torch.float16, torch.bfloat16):
                down, up = down.float(), up.float()
            delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * (scale * factor)
            weight = weight + delta.to(weight.dtype)
        return weight

    def fuse(self, weight: Tensor) -> None:
        """Put ``weight`` in the place of W, which is kept: not its values, the very tensor."""
        self.original = self.module.weight
        self.module.weight = nn.Parameter(weight, requires_grad=self.original.requires_grad)

    def unfuse(self) -> None:
        """Put W back, where the layer is now."""
        current, original = self.module.weight, self.original
        if (current.dtype, current.device) != (original.dtype, original.device):  # moved while fused
            original = nn.Parameter(original.detach().to(current), requires_grad=original.requires_grad)
        self.module.weight, self.original = original, None


Weight = float | Mapping[str, float]  # of an adapter; or of each part of a network, by the beginning of its Hub names


class Adapters:
    """The adapters of one network."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.layers: dict[str, LoraLayer] = {}  # our name of the layer -> its updates
        self.names: list[str] = []
        self.active: tuple[str, ...] = ()
        self.weights: dict[str, Weight] = {}
        self.enabled = True
        self.fused: tuple[str, ...] = ()  # the adapters that are part of the weights now

    def add(self, adapter: str, updates: Mapping[str, tuple[str, LowRank]]) -> None:
        """Add an adapter, {our layer: (Hub name, update)}, and make it the only active one, as the reference does."""
        self._attach(adapter, updates)
        self.names.append(adapter)
        self.activate({adapter: 1.0})

    def swap(self, adapter: str, updates: Mapping[str, tuple[str, LowRank]]) -> None:
        """Give an adapter other matrices. It stays active or not; its weight becomes 1, as in the reference."""
        self._detach(adapter)
        self._attach(adapter, updates)
        self.weights[adapter] = 1.0
        self._apply()

    def _attach(self, adapter: str, updates: Mapping[str, tuple[str, LowRank]]) -> None:
        for name, (hub, update) in updates.items():
            if name not in self.layers:
                self.layers[name] = LoraLayer(self.network.get_submodule(name), hub)
            self.layers[name].add(adapter, update)

    def _detach(self, adapter: str) -> None:
        for layer in self.layers.values():
            if adapter in layer.scales:
                layer.remove(adapter)
        self.layers = {name: layer for name, layer in self.layers.items() if layer.scales}

    def activate(self, weights: Mapping[str, Weight]) -> None:
        """Make these adapters the active ones; names that the network does not have are left out."""
        self.weights |= {name: weight for name, weight in weights.items() if name in self.names}
        self.active = tuple(name for name in weights if name in self.names)
        self._apply()

    def enable(self, enabled: bool) -> None:
        """Let the active adapters work, or not."""
        self.enabled = enabled
        self._apply()

    def delete(self, adapter: str) -> None:
        """Remove an adapter; if no active one is left, the oldest becomes active, as in the reference."""
        if adapter in self.names:
            self.names.remove(adapter)
            del self.weights[adapter]
            self._detach(adapter)
        self.active = tuple(name for name in self.active if name != adapter) or tuple(self.names[:1])
        self._apply()

    def fuse(self, factor: float, safe: bool) -> None:
        """Make the active adapters part of the weights. ``safe``: raise and change nothing if one is not finite."""
        weights = {name: layer.fused(factor) for name, layer in self.layers.items() if layer.active}
        if safe and (wrong := [name for name, weight in weights.items() if not weight.isfinite().all()]):
            raise ValueError(f"fusing makes weights that are not finite, in {', '.join(wrong)}; nothing was changed")
        for name, weight in weights.items():
            self.layers[name].fuse(weight)
        self.fused = self.active
        self._apply()

    def unfuse(self) -> None:
        """Put the original weights back."""
        for layer in self.layers.values():
            if layer.original is not None:
                layer.unfuse()
        self.fused = ()
        self._apply()

    def _apply(self) -> None:
        """Tell each layer which adapters it is to add."""
        active = self.active if self.enabled and not self.fused else ()
        for layer in self.layers.values():
            names = [name for name in active if name in layer.scales]
            layer.active = tuple(
                (name, _of_layer(self.weights[name], layer.hub) * layer.scales[name]) for name in names
            )


def _of_layer(weight: Weight, hub: str) -> float:
    """Return the weight of an adapter in one layer, 1 where a mapping does not mention it."""
    if isinstance(weight, Mapping):
        return next((value for prefix, value in weight.items() if hub.startswith(f"{prefix}.")), 1.0)
    return weight


def adapters_of(network: Any) -> Adapters | None:
    """Return the adapters of a network, None if it has none."""
    return getattr(network, "_lora", None)


def remove_adapters(network: nn.Module) -> None:
    """Remove all adapters of a network. Weights that they are fused into stay as they are, as in the reference."""
    adapters = adapters_of(network)
    for name in list(adapters.names):
        adapters._detach(name)
    del network._lora


def check_updates(network: nn.Module, updates: Iterable[tuple[str, str, Tensor, str, Tensor]]) -> list[str]:
    """Return a line for each matrix that does not fit its layer: (our layer, key, down, key, up)."""
    problems = []
    for layer, down_key, down, up_key, up in updates:
        weight = network.get_submodule(layer).weight
        C_out, C_in, *kernel = weight.shape
        r = down.shape[0] if down.ndim else 0
        ones = (1,) * len(kernel)
        for key, matrix, expected in ((down_key, down, (r, C_in, *kernel)), (up_key, up, (C_out, r, *ones))):
            also = expected if kernel else (*expected, 1, 1)  # a linear layer may be stored as a 1x1 convolution
            if tuple(matrix.shape) not in (expected, also) or r == 0:
                wanted = ("r", *expected[1:]) if matrix is down else (expected[0], "r", *expected[2:])
                problems.append(
                    f"{key} is {tuple(matrix.shape)}, expected ({', '.join(map(str, wanted))})"
                    + (f" with the rank r = {r} of {down_key}" if matrix is up else "")
                )
            elif weight.dtype == torch.float16 and not matrix.to(weight.dtype).isfinite().all():
                problems.append(f"{key} is not finite in {weight.dtype}, the dtype of its layer: load in another")
    return problems


def scale_from(key: str, alpha: Tensor, rank: int) -> float:
    """Return s = alpha / r. Raise ``ValueError`` if alpha is not one finite number."""
    if alpha.numel() != 1 or not math.isfinite(alpha.item()):
        raise ValueError(f"{key} should be one finite number, found {alpha.tolist()}")
    return alpha.item() / rank


def scale_argument(arguments: Mapping[str, Any] | None) -> float:
    """Return what a call's ``cross_attention_kwargs`` ask for: ``{"scale": s}`` is all that there is.

    Raises:
        TypeError, ValueError: for anything else.
    """
    if arguments is None:
        return 1.0
    if not isinstance(arguments, Mapping):
        raise TypeError(f"cross_attention_kwargs should be a dict such as {{'scale': 0.5}}, found {arguments!r}")
    if unknown := [name for name in arguments if name != "scale"]:
        raise TypeError(f"cross_attention_kwargs: {', '.join(map(str, unknown))} is not implemented, only scale")
    scale = arguments.get("scale", 1.0)
    check_number("cross_attention_kwargs['scale']", scale)
    return float(scale)
