"""Offloading: networks stay in main memory, and their weights are on the device only while they compute.

A weight never leaves main memory. What the device gets is a copy that stands in for it, and dropping the copy is all
that it takes to free the device: nothing is copied back, and weights that are mapped from a file stay so. There are two
kinds:

- "model": whole networks, one at a time. Each stays until another one computes, as the UNet does through all steps;
- "sequential": single layers, each for the time of its own call. Least memory, and slow.

Every call of an offloaded module goes through a ``Visit``, so ``vae.encode``, ``vae.decode`` and the like bring their
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
    """Return the copy that stands in for a weight.

    In training it requires no gradient, which would be lost: torch refuses a loss that depends on nothing else. In
    inference it says what the weight says, since torch.matmul asks for it and would choose another kernel, of which the
    last bit differs.
    """
    stand_in = tensor.detach().to(device)
    if not isinstance(tensor, nn.Parameter):
        return stand_in
    return nn.Parameter(stand_in, requires_grad=tensor.requires_grad and not torch.is_grad_enabled())


class Lent(NamedTuple):
    """A weight whose copy is on the device."""

    tensors: dict[str, Tensor | None]  # the parameters or buffers of its module
    name: str
    home: Tensor
    stand_in: Tensor


class Slot:
    """The place on a device that parts take in turn: whole networks, or one layer that comes and goes.

    Args:
        device: where it is.
        stay: whether a part keeps the place after its last call, until another one needs it.
    """

    def __init__(self, device: torch.device, stay: bool) -> None:
        self.device, self.stay = device, stay
        self.guest: Part | None = None
        self.changed = threading.Condition()

    def enter(self, part: "Part") -> None:
        """Bring the weights of ``part``, once no other part has a call under way."""
        me = threading.get_ident()
        with self.changed:
            if self.guest is not None and self.guest is not part and me in self.guest.callers:
                raise RuntimeError(
                    "an offloaded network was called inside a call of another one, such as in a hook: only one of them "
                    "can be on the device; call it afterwards, or call remove_all_hooks() first"
                )
            self.changed.wait_for(lambda: self.guest is part or self.guest is None or not self.guest.callers)
            if self.guest is not part:
                self._send_home()
                part.fetch(self.device)
                self.guest = part
            part.callers.append(me)

    def leave(self, part: "Part") -> None:
        """Note the end of a call."""
        with self.changed:
            part.callers.remove(threading.get_ident())
            if not part.callers:
                if not self.stay:
                    self._send_home()
                self.changed.notify_all()

    def free(self) -> bool:
        """Drop the weights that are on the device; return whether that could be done: no call needs them."""
        with self.changed:
            if self.guest is not None and self.guest.callers:
                return False
            self._send_home()
            return True

    def _send_home(self) -> None:
        if self.guest is not None:
            self.guest.drop()
            self.guest = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Slot":
        return self  # the copy of a network takes turns with the original


class Part:
    """Modules whose weights come to the device together."""

    def __init__(self, modules: list[nn.Module], slot: Slot) -> None:
        self.modules, self.slot = modules, slot
        self.callers: list[int] = []  # the thread of every call that is under way; one inside another counts too
        self.lent: list[Lent] = []

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Have the weights on the device for the time of the context."""
        self.slot.enter(self)
        try:
            yield
        finally:
            self.slot.leave(self)

    def fetch(self, device: torch.device) -> None:
        """Put copies on the device in the place of the weights."""
        try:
            for module in self.modules:
                for tensors in (module._parameters, module._buffers):
                    for name, home in tensors.items():
                        if home is not None:
                            self.lent.append(Lent(tensors, name, home, to_device(home, device)))
                            tensors[name] = self.lent[-1].stand_in
        except BaseException:  # out of memory, or interrupted
            self.drop()
            raise

    def drop(self) -> None:
        """Put the weights back, except where something else took the place of the copy in the meantime."""
        while self.lent:
            tensors, name, home, stand_in = self.lent.pop()
            if tensors.get(name) is stand_in:
                tensors[name] = home

    def __deepcopy__(self, memo: dict[int, Any]) -> "Part":
        return Part(copy.deepcopy(self.modules, memo), self.slot)


@dataclass
class Visit:
    """Stands in a module's ``_call_impl``: the whole call, with its hooks, which may read weights too (LoRA)."""

    part: Part
    module: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.part.visit():
            return nn.Module._call_impl(self.module, *args, **kwargs)


@dataclass
class Offload:
    """How a network is offloaded; its attribute ``_offload``."""

    kind: Kind
    device: torch.device
    slots: list[Slot]  # the one of the network, or those of its layers


def offload_of(network: nn.Module) -> Offload | None:
    """Return how a network is offloaded, None if it is not."""
    return getattr(network, "_offload", None)


def offload_whole(network: nn.Module, slot: Slot) -> None:
    """Let a network come to the place of ``slot`` whenever it or one of its outermost parts is called."""
    _begin(network, Offload("model", slot.device, [slot]))
    part = Part(list(network.modules()), slot)
    for module in [network, *_outermost(network)]:
        module._call_impl = Visit(part, module)


def offload_layers(network: nn.Module, device: torch.device) -> None:
    """Let every layer of a network that has weights of its own come to ``device`` for the time of its call."""
    offload = Offload("sequential", device, [])
    _begin(network, offload)
    for module in network.modules():
        if module._parameters or module._buffers:
            offload.slots.append(Slot(device, stay=False))
            module._call_impl = Visit(Part([module], offload.slots[-1]), module)


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
    """Drop the weights of an offloaded network from the device, unless another thread computes with them."""
    offload = offload_of(network)
    for slot in offload.slots if offload is not None else ():
        slot.free()


def end_offload(network: nn.Module) -> None:
    """Make an offloaded network one that stays in main memory.

    Raises:
        RuntimeError: if it is computing, in another thread.
    """
    offload = offload_of(network)
    if offload is None:
        return
    _settle(network, offload)
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
    _settle(network, offload)
    if device is None or torch.device(device).type == "cpu":
        return None
    if offload.kind == "sequential" or torch.device(device).type != offload.device.type:
        raise ValueError(
            f"to({str(device)!r}): {METHODS[offload.kind]} was called, and the networks go to {offload.device} by "
            "themselves; leave out the move, or call remove_all_hooks() first"
        )
    return None


def _settle(network: nn.Module, offload: Offload) -> None:
    if not all(slot.free() for slot in offload.slots):
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
