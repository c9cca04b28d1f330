"""A fast forward is taken only while the module is what it was made for; otherwise the module computes as it says.

People change networks by changing modules: they set attributes (``conv.padding_mode = "circular"``), put functions in
the place of methods, of an object or of its class, exchange parts, add hooks, and parametrize weights. A fast forward
reads the weights of a module, and often those of its parts, and would see nothing of this. So every one asks here, at
every call, about all that it passes over. Asking takes about two microseconds.
"""

import functools
import inspect
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.modules import module as torch_module

_LIBRARIES = ("minidiff.", "torch.nn.modules.")


class Fast:
    """Stands in the place of a method of one module, and gives way to the one of its class wherever it cannot serve."""

    kind: ClassVar[type[nn.Module]]  # the class whose method this is
    method: ClassVar[str] = "forward"
    values: ClassVar[dict[str, Any]] = {}  # attributes that must have the value with which this agrees

    def __init__(self, module: nn.Module, keep: bool = True) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the method computes."""
        module, found = self.module, NotImplemented
        if not torch.compiler.is_compiling() and unchanged(module, self.kind, **self.values):
            found = self.fast(*args, **kwargs)
        return getattr(type(module), self.method)(module, *args, **kwargs) if found is NotImplemented else found

    def fast(self, *args: Any, **kwargs: Any) -> Any:
        """Compute it faster, or return ``NotImplemented``; the arguments are those of the method."""
        raise NotImplementedError


def unchanged(module: nn.Module, kind: type[nn.Module], **values: Any) -> bool:
    """Return whether ``module`` is a ``kind`` that computes as the library says, and has attributes of these values."""
    if type(module) is not kind:
        return False
    own, (names, run) = vars(module), _methods(kind)
    if not names.isdisjoint(own) and not all(_ours(own[name]) for name in names.intersection(own)):
        return False
    for name in run:  # loops, for speed
        if not _written(kind, name, getattr(kind, name)):
            return False
    return all(getattr(module, name) == value for name, value in values.items())


def unwatched(module: nn.Module, kind: type[nn.Module], **values: Any) -> bool:
    """Return whether besides nobody would notice that ``module`` was not called: it has no hooks, as adapters are."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not hooks and unchanged(module, kind, **values) and calls_are_plain()


def bystander(module: nn.Module) -> bool:
    """Return whether ``module`` is as the library says, and called by it on whatever rows there are: hooks are ours."""
    hooks = *module._forward_hooks.values(), *module._forward_pre_hooks.values()
    return unchanged(module, type(module)) and all(map(_ours, hooks))


def calls_are_plain() -> bool:
    """Return whether calling a module does what torch says, without hooks on all modules."""
    written = all(_written(nn.Module, name, getattr(nn.Module, name)) for name in ("__call__", "_call_impl"))
    return written and not torch_module._has_any_global_hook()


def _ours(thing: Any) -> bool:
    """Return whether this library put ``thing`` on a module: fast forwards, offloading, adapters."""
    return type(thing).__module__.startswith("minidiff.")


@functools.cache
def _methods(kind: type[nn.Module]) -> tuple[frozenset[str], list[str]]:
    """Return the names that an attribute of a module must not hide, and those of the methods that its calls run."""
    names = {name for name in dir(kind) if callable(getattr(kind, name))}
    run = [name for name in names - set(dir(nn.Module)) if name[0] == "_" and inspect.isfunction(getattr(kind, name))]
    return frozenset(names | {"_compiled_call_impl"}), ["forward", *run]


@functools.lru_cache(maxsize=1024)
def _written(kind: type, name: str, function: Any) -> bool:
    """Return whether this method of ``kind`` stands in the file of its class, in a library: nobody put it there."""
    owner = next(owner for owner in kind.__mro__ if name in vars(owner))
    known = f"{owner.__module__}.".startswith(_LIBRARIES) and inspect.isfunction(function)
    return known and function.__code__.co_filename == inspect.getfile(owner)
