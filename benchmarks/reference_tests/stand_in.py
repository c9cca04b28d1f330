"""A pytest plugin: what a test imports from diffusers or transformers is minidiff's, where minidiff has it.

Only import statements change, as in a migrated program: ``from diffusers.a.b import C`` means ``minidiff.a.b.C`` if
there is such a name, else ``minidiff.C`` if that is public, else the reference's own ``C``. The reference's modules
import each other as before. Pipelines that a test writes as pickles (safe_serialization=False) are written as
safetensors, so that the rest of the test counts. Loaded with ``-p benchmarks.reference_tests.stand_in`` it migrates the
modules of the package ``tests``; ``migrate`` adds others, for benchmarks that run other code.
"""

import builtins
import functools
import importlib
from types import ModuleType
from typing import Any

import minidiff

REFERENCE = ("diffusers", "transformers")
_import = builtins.__import__
_absent = object()
_proxies: dict[str, "StandIn"] = {}
_migrated = {"tests"}


class StandIn(ModuleType):
    """A module of the reference whose names are minidiff's where minidiff has them."""

    def __init__(self, theirs: ModuleType) -> None:
        super().__init__(theirs.__name__)
        self.__dict__["_theirs"] = theirs

    def __getattr__(self, name: str) -> Any:
        theirs = self.__dict__["_theirs"]
        value = ours(theirs.__name__, name)
        if value is not _absent:
            return value
        value = getattr(theirs, name)
        return stand_in(value) if is_reference(value) else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_theirs"], name, value)
        if name != "__spec__" and isinstance(value, type):
            setattr(minidiff, name, value)  # a class that a test hangs into the package, to be found by its name


def ours(module: str, name: str) -> Any:
    """Return what minidiff has for a name of a module of the reference."""
    package, _, rest = module.partition(".")
    if package == "diffusers" and not name.startswith("__"):
        home = f"minidiff.{rest}" if rest else "minidiff"
        try:
            found = getattr(importlib.import_module(home), name, _absent)
        except ModuleNotFoundError:
            found = _absent
        if found is not _absent and not isinstance(found, ModuleType):
            return found
        if isinstance(found, ModuleType) and found.__name__ == "minidiff.utils.logging":
            return found
    return getattr(minidiff, name) if name in minidiff.__all__ and name != "__version__" else _absent


def is_reference(value: Any) -> bool:
    """Say whether a value is a module of the reference."""
    return isinstance(value, ModuleType) and value.__name__.partition(".")[0] in REFERENCE


def stand_in(module: ModuleType) -> StandIn:
    """Return the stand-in of a module of the reference, one for each."""
    if module.__name__ not in _proxies:
        _proxies[module.__name__] = StandIn(module)
    return _proxies[module.__name__]


def migrated_import(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    """Import as Python does, and hand tests the stand-in of a module of the reference."""
    module = _import(name, globals, locals, fromlist, level)
    caller = (globals or {}).get("__name__", "")
    return stand_in(module) if caller.partition(".")[0] in _migrated and is_reference(module) else module


def migrate(name: str) -> None:
    """Migrate the imports of the module or package ``name`` too."""
    _migrated.add(name)


@functools.wraps(minidiff.DiffusionPipeline.save_pretrained)
def save(
    pipe: Any,
    folder: Any,
    safe_serialization: bool = True,
    _original: Any = minidiff.DiffusionPipeline.save_pretrained,
    **how: Any,
) -> None:
    """Save a pipeline without pickles."""
    _original(pipe, folder, **how)


minidiff.DiffusionPipeline.save_pretrained = save
builtins.__import__ = migrated_import
