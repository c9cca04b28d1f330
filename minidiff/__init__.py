"""minidiff: the core of diffusers in plain PyTorch, checked against it number for number.

The public names below are imported on first use, so ``import minidiff`` costs next to nothing: networks, schedulers
and the Hub client are loaded only by the code that asks for them.
"""

from importlib import import_module
from typing import Any

from minidiff.compat.paths import NAMES, PATHS
from minidiff.registry import HOME, RENAMED, __version__, public

__all__ = ["__version__", *HOME]


def __getattr__(name: str) -> Any:
    if name in HOME or name in RENAMED:
        value = public(RENAMED.get(name, name))
    elif name in PATHS:
        value = import_module(f"minidiff.{name}")
    elif name in NAMES:
        home, ours = NAMES[name]
        value = getattr(import_module(f"minidiff.{home}"), ours)
    else:
        raise AttributeError(f"minidiff has no {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
