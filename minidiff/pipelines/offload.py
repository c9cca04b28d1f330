"""Offloading: networks stay in main memory, and their weights are on the device only while they compute.

A weight never leaves main memory. What the device gets is a copy that takes its place, and dropping the copy is all
that it takes to free the device: nothing is copied back, and weights that are mapped from a file stay so. There are two
kinds:

- "model": whole networks, one at a time. Each stays until another one computes, as the UNet does through all steps;
- "sequential": single layers, each for the time of its own call. Least memory, and slow.

A hook in every offloaded module onloads it for each call, so ``vae.encode``, ``vae.decode`` and the like bring their
network too. Threads may share networks: one that needs the place of another waits until that has no call under way.
Checked against ``accelerate.cpu_offload_with_hook`` and ``cpu_offload``, as diffusers uses them.
"""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Kind = Literal["model", "sequential"]
METHODS: dict[Kind, str] = {"model": "enable_model_cpu_offload", "sequential": "enable_sequential_cpu_offload"}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the copy that takes the place of a weight.

    In training it requires no gradient, which would be lost: torch refuses a loss that depends on nothing else. In
    inference it says what the weight says, since torch.matmul asks for it and would choose another kernel, of which the
    last bit differs.
    """
    copied = tensor.detach().to(device)
    if not isinstance(tensor, nn.Parameter):
        return copied
    return nn.Parameter(copied, requires_grad=tensor.requires_grad and not torch.is_grad_enabled())


class Swapped(NamedTuple):
    """A weight whose copy is on the device."""

    tensors: dict[str, Tensor | None]  # the parameters or buffers of its module
    name: str
    weight: Tensor
    copy: Tensor


class OnloadPlace:
    """The place on a device where one group of modules at a time is onloaded: a network, or a layer.

    Args:
        device: where it is.
        stay: whether a group keeps the place after its last call, until another one needs it.
    """

    def __init__(self, device: torch.device, stay: bool) -> None:
        self.device, self.stay = device, stay
        self.group: ModuleGroup | None = None  # what is onloaded
        self.changed = threading.Condition()

    @contextmanager
    def of(self, group: "ModuleGroup") -> Iterator[None]:
        """Have a group onloaded for the time of the context, once no other one has a call under way."""
        me = threading.get_ident()
        with self.changed:
            if self.group is not None and self.group is not group and me in self.group.callers:
                raise RuntimeError(
                    "an offloaded network was called inside a call of another one, such as in a hook: only one of them "
                    "can be on the device; call it afterwards, or call remove_all_hooks() first"
                )
            self.changed.wait_for(lambda: self.group is group or self.group is None or not self.group.callers)
            if self.group is not group:
                self._offload()
                group.onload(self.device)
                self.group = group
            group.callers.append(me)
        try:
            yield
        finally:
            with self.changed:
                group.callers.remove(me)
                if not group.callers and not self.stay:
                    self._offload()
                self.changed.notify_all()

    def free(self) -> bool:
        """Offload what is onloaded; return whether that could be done: no call needs it."""
        with self.changed:
            if self.group is not None and self.group.callers:
                return False
            self._offload()
            return True

    def _offload(self) -> None:
        if self.group is not None:
            self.group.offload()
            self.group = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnloadPlace":
        return self  # the copy of a network takes turns with the original


class ModuleGroup:
    """Modules whose weights come to the device together."""

    def __init__(self, modules: list[nn.Module], place: OnloadPlace) -> None:
        self.modules, self.place = modules, place
        self.callers: list[int] = []  # the thread of every call that is under way; one inside another counts too
        self.swapped: list[Swapped] = []

    def onload(self, device: torch.device) -> None:
        """Put copies on the device in the place of the weights."""
        stores = [store for module in self.modules for store in (module._parameters, module._buffers)]
        weights = [(store, name, weight) for store in stores for name, weight in store.items() if weight is not None]
        try:
            for store, name, weight in weights:
                self.swapped.append(Swapped(store, name, weight, to_device(weight, device)))
                store[name] = self.swapped[-1].copy
        except BaseException:  # out of memory, or interrupted
            self.offload()
            raise

    def offload(self) -> None:
        """Put the weights back, except where something else took the place of the copy in the meantime."""
        while self.swapped:
            store, name, weight, copied = self.swapped.pop()
            if store.get(name) is copied:
                store[name] = weight

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModuleGroup":
        return ModuleGroup(copy.deepcopy(self.modules, memo), self.place)


@dataclass
class OnloadHook:
    """Stands in a module's ``_call_impl``: the whole call, with its hooks, which may read weights too (LoRA)."""

    group: ModuleGroup
    module: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.group.place.of(self.group):
            return nn.Module._call_impl(self.module, *args, **kwargs)


@dataclass
class Offload:
    """How a network is offloaded; its attribute ``_offload``."""

    kind: Kind
    device: torch.device
    places: list[OnloadPlace]  # the one of the network, or those of its layers


def offload_of(network: nn.Module) -> Offload | None:
    """Return how a network is offloaded, None if it is not."""
    return getattr(network, "_offload", None)


def offload_whole(network: nn.Module, place: OnloadPlace) -> None:
    """Onload a network whenever it or one of its outermost parts is called."""
    _begin(network, Offload("model", place.device, [place]))
    group = ModuleGroup(list(network.modules()), place)
    for module in [network, *_outermost(network)]:
        module._call_impl = OnloadHook(group, module)


def offload_layers(network: nn.Module, device: torch.device) -> None:
    """Onload every layer of a network that has weights of its own for the time of its call."""
    layers = [module for module in network.modules() if module._parameters or module._buffers]
    groups = [ModuleGroup([layer], OnloadPlace(device, stay=False)) for layer in layers]
    _begin(network, Offload("sequential", device, [group.place for group in groups]))
    for group, layer in zip(groups, layers, strict=True):
        layer._call_impl = OnloadHook(group, layer)


def _begin(network: nn.Module, offload: Offload) -> None:
    end_offload(network)
    network.to("cpu")
    network._offload = offload


def _outermost(network: nn.Module) -> list[nn.Module]:
    """Return the outermost modules that can be called: methods such as ``vae.decode`` call these, not the network."""
    found = []
    for child in network.children():
        callable_ = type(child).forward is not nn.Module.forward  # a ModuleList is not
        found += [child] if callable_ else _outermost(child)
    return found


def free(network: nn.Module) -> None:
    """Offload a network that is onloaded, unless another thread computes with them."""
    offload = offload_of(network)
    for place in offload.places if offload is not None else ():
        place.free()


def end_offload(network: nn.Module) -> None:
    """Make an offloaded network one that stays in main memory.

    Raises:
        RuntimeError: if it is computing, in another thread.
    """
    offload = offload_of(network)
    if offload is None:
        return
    _free_or_raise(network, offload)
    for module in network.modules():
        module.__dict__.pop("_call_impl", None)
    del network._offload


def destination(network: nn.Module, device: torch.device | str | int | None) -> torch.device | str | int | None:
    """Return where ``pipe.to(device)`` is to move a network: an offloaded one stays where it is, None.

    Its weights can be converted then.

    Raises:
        ValueError: if that would undo what offloading is for.
        RuntimeError: if the network is computing, in another thread.
    """
    offload = offload_of(network)
    if offload is None:
        return device
    _free_or_raise(network, offload)
    if device is None or torch.device(device).type == "cpu":
        return None
    if offload.kind == "sequential" or torch.device(device).type != offload.device.type:
        raise ValueError(
            f"to({str(device)!r}): {METHODS[offload.kind]} was called, and the networks go to {offload.device} by "
            "themselves; leave out the move, or call remove_all_hooks() first"
        )
    return None


def _free_or_raise(network: nn.Module, offload: Offload) -> None:
    if not all(place.free() for place in offload.places):
        raise RuntimeError(
            f"{type(network).__name__}, or a network that it takes turns with, is computing in another thread; wait "
            "for the end of that call"
        )


def accelerator() -> str | None:
    """Return the kind of accelerator that torch can use here, in the reference's order; None if there is none."""
    available = {"cuda": torch.cuda, "xpu": torch.xpu, "mps": torch.backends.mps}
    return next((kind for kind, module in available.items() if module.is_available()), None)


def execution_device(method: str, gpu_id: int | None, device: torch.device | str | None) -> torch.device:
    """Return the device that offloaded networks compute on, by default the first accelerator.

    Raises:
        ValueError: if both ``gpu_id`` and the index of a device are given.
        RuntimeError: if there is no such device.
    """
    device = accelerator() if device is None else device
    if device is None:
        raise RuntimeError(f"{method} needs an accelerator, and torch finds none; leave the call out")
    wanted = torch.device(device)
    if gpu_id is not None and wanted.index is not None:
        raise ValueError(f"{method}: give gpu_id={gpu_id} or the index in device={str(device)!r}, not both")
    if wanted.type not in ("cpu", "meta") and wanted.index is None:
        wanted = torch.device(wanted.type, gpu_id or 0)
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        raise RuntimeError(f"{method}: {wanted} cannot be used here: {error}") from error
