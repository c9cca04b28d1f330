"""The adapters of a network: which of them change which layers, and how much (``minidiff.adapters.forms`` says how).

    y = W x + b + s B (A x)                    LoRA: A (r, I), B (O, r), s = alpha / r for a linear layer (O, I); for a
                                               convolution (O, I, h, w) in its place A (r, I, h, w), B (O, r, 1, 1)
    y = W x + b + (W' - W) x + (b' - b)        every other form

Hu et al. 2021 (https://arxiv.org/abs/2106.09685), section 4.1; convolutions as in kohya's LoCon. Checked against
``peft.tuners.lora`` as diffusers uses it.

The network keeps its modules, its weights and their names. A forward hook on each adapted layer adds the last terms to
the layer's output; it computes W' at every call, ``fuse`` once. The tensors of an adapter are buffers of the layer that
are not saved, so that they follow it to other devices and dtypes.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.adapters.forms import KERNELS, Update, changed
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


class LoraLayer:
    """The updates of one layer by several adapters; as a forward hook, it applies those that are active."""

    def __init__(self, module: nn.Module, hub: str) -> None:
        self.module, self.hub = module, hub
        self.forms: dict[str, Update] = {}  # adapter -> its update, with None for the tensors
        self.active: tuple[tuple[str, float], ...] = ()  # (adapter, its weight); replaced, never changed
        self.originals: dict[str, nn.Parameter] = {}  # W and b, while the module's are others
        module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        scale = _call_scale.get()
        if any(self.forms[adapter].parts.keys() != {"down", "up"} for adapter, _ in self.active):
            (W, b), (W_0, b_0) = self.changed(scale), self.own()
            return output + _computed(module, args[0], W - W_0, None if b is None else b - b_0)
        x = args[0]
        for adapter, weight in self.active:
            A, B = (module._buffers[f"lora_{adapter}_{part}"].to(x.dtype) for part in ("down", "up"))
            h = _computed(module, x, A, None)
            h = F.linear(h, B) if B.ndim == 2 else F.conv2d(h, B)
            output = torch.add(output, h, alpha=self.forms[adapter].scale * weight * scale)
        return output

    def update(self, adapter: str) -> Update:
        """Return what an adapter does here, in the dtype that the layer computes in."""
        form, buffers, dtype = self.forms[adapter], self.module._buffers, compute_dtype(self.module)
        return form._replace(parts={part: buffers[f"lora_{adapter}_{part}"].to(dtype) for part in form.parts})

    def add(self, adapter: str, update: Update) -> None:
        """Take over the tensors of an adapter, in the layer's layout, dtype and device."""
        weight = self.module.weight
        for part, tensor in update.parts.items():
            # What a file writes as a 1x1 convolution may be a linear layer or a matrix here, and the other way round.
            shape = (*tensor.shape, 1, 1)[:4] if weight.ndim == 4 and part in KERNELS else tensor.shape[:2]
            buffer = tensor.detach().reshape(shape).to(weight.device, compute_dtype(self.module))
            self.module.register_buffer(f"lora_{adapter}_{part}", buffer, persistent=False)
        self.forms[adapter] = update._replace(parts=dict.fromkeys(update.parts))

    def remove(self, adapter: str) -> None:
        """Forget an adapter; without any, the layer is what it was."""
        for part in self.forms.pop(adapter).parts:
            del self.module._buffers[f"lora_{adapter}_{part}"]
            self.module._non_persistent_buffers_set.discard(f"lora_{adapter}_{part}")
        if not self.forms:
            for number, hook in list(self.module._forward_hooks.items()):
                if hook is self:
                    del self.module._forward_hooks[number]

    def own(self) -> tuple[Tensor, Tensor | None]:
        """Return W and b, as the layer computes with them."""
        dtype = compute_dtype(self.module)
        return tuple(None if one is None else one.to(dtype) for one in (self.module.weight, self.module.bias))

    def changed(self, factor: float) -> tuple[Tensor, Tensor | None]:
        """Return W' and b', changed by ``factor`` times all adapters that are active, in their order."""
        W, b = W_0, _ = self.own()
        for adapter, weight in self.active:
            W, b = changed(W, b, self.update(adapter), weight * factor, W_0)
        return W, b

    def fuse(self, weight: Tensor, bias: Tensor | None) -> None:
        """Put these in the place of W and b, which are kept: not their values, the very tensors."""
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not (original := getattr(self.module, name)):
                self.originals[name] = original
                setattr(self.module, name, nn.Parameter(tensor.detach(), requires_grad=original.requires_grad))

    def unfuse(self) -> None:
        """Put W and b back, where the layer is now."""
        for name, original in self.originals.items():
            current = getattr(self.module, name)
            if (current.dtype, current.device) != (original.dtype, original.device):  # moved while fused
                original = nn.Parameter(original.detach().to(current), requires_grad=original.requires_grad)
            setattr(self.module, name, original)
        self.originals = {}


def _computed(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return what a layer makes of x with this weight and bias."""
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(module, nn.Conv2d):
        return module._conv_forward(x, weight, bias)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, weight, bias, module.eps)
    return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)


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

    def add(self, adapter: str, updates: Mapping[str, tuple[str, Update]]) -> None:
        """Add an adapter, {our layer: (Hub name, update)}, and make it the only active one, as the reference does."""
        self._attach(adapter, updates)
        self.names.append(adapter)
        self.activate({adapter: 1.0})

    def swap(self, adapter: str, updates: Mapping[str, tuple[str, Update]]) -> None:
        """Give an adapter other matrices. It stays active or not; its weight becomes 1, as in the reference."""
        self._detach(adapter)
        self._attach(adapter, updates)
        self.weights[adapter] = 1.0
        self._apply()

    def _attach(self, adapter: str, updates: Mapping[str, tuple[str, Update]]) -> None:
        for name, (hub, update) in updates.items():
            if name not in self.layers:
                self.layers[name] = LoraLayer(self.network.get_submodule(name), hub)
            self.layers[name].add(adapter, update)

    def _detach(self, adapter: str) -> None:
        for layer in self.layers.values():
            if adapter in layer.forms:
                layer.remove(adapter)
        self.layers = {name: layer for name, layer in self.layers.items() if layer.forms}

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
        active = {name: layer for name, layer in self.layers.items() if layer.active}
        for layer in active.values():
            if (stored := layer.module.weight.dtype) != compute_dtype(layer.module):
                raise ValueError(f"{layer.hub} is stored in {stored}: fuse before enable_layerwise_casting()")
        with torch.no_grad():
            new = {name: layer.changed(factor) for name, layer in active.items()}
        if safe and (wrong := [name for name, both in new.items() if not all(map(_is_finite, both))]):
            raise ValueError(f"fusing makes weights that are not finite, in {', '.join(wrong)}; nothing was changed")
        for name, (weight, bias) in new.items():
            self.layers[name].fuse(weight, bias)
        self.fused = self.active
        self._apply()

    def unfuse(self) -> None:
        """Put the original weights back."""
        for layer in self.layers.values():
            layer.unfuse()
        self.fused = ()
        self._apply()

    def _apply(self) -> None:
        """Tell each layer which adapters it is to add."""
        active = self.active if self.enabled and not self.fused else ()
        for layer in self.layers.values():
            names = [name for name in active if name in layer.forms]
            layer.active = tuple((name, _of_layer(self.weights[name], layer.hub)) for name in names)


def _is_finite(tensor: Tensor | None) -> bool:
    return tensor is None or bool(tensor.isfinite().all())


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
    for name in adapters_of(network).names:
        adapters_of(network)._detach(name)
    del network._lora


def alpha_of(key: str, alpha: Tensor) -> float:
    """Return alpha. Raise ``ValueError`` if alpha is not one finite number."""
    if alpha.numel() != 1 or not math.isfinite(alpha.item()):
        raise ValueError(f"{key} should be one finite number, found {alpha.tolist()}")
    return alpha.item()


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
