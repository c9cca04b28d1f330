"""``model_index.json``: which class each of its entries means, and what is written there for a component.

Library and class only choose among minidiff's own classes and those that the program has derived from them, in modules
that it has imported itself: no code is ever taken from a checkpoint.
"""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from minidiff.checkpoints.hub import Repo
from minidiff.checkpoints.load import as_dtype
from minidiff.checkpoints.model import Pretrained
from minidiff.configured import ConfigMixin
from minidiff.errors import CheckpointNotFoundError, ConfigError
from minidiff.registry import RENAMED, public, published
from minidiff.schedulers.mixin import CONFIG_NAME, SchedulerMixin

logger = logging.getLogger("minidiff")

INDEX = "model_index.json"
LIBRARIES = {  # where the reference has the classes of our modules, if not in diffusers itself
    "minidiff.images.clip_processor": "transformers",
    "minidiff.networks.clip": "transformers",
    "minidiff.networks.clip_vision": "transformers",
    "minidiff.networks.safety_checker": "stable_diffusion",
    "minidiff.text.tokenizer": "transformers",
}
_said: set[str] = set()  # what this process has already been told


def public_class(name: object) -> type | None:
    """Return minidiff's public class of this name, or None."""
    name = RENAMED.get(name, name) if isinstance(name, str) else None
    return public(name)


def is_component(entry: Any) -> bool:
    """Say whether an entry of ``model_index.json`` names a class, or that a component is absent."""
    return isinstance(entry, list) and len(entry) == 2 and all(part is None or isinstance(part, str) for part in entry)


def component_class(name: str, entry: Any, optional: bool, path: Path) -> type | None:
    """Return the class that an entry such as ``["diffusers", "AutoencoderKL"]`` means, None for an absent component."""
    if entry is None or entry == [None, None]:
        return None
    if not is_component(entry):
        raise ConfigError(f"{path}: {name} should be [library, class], found {entry!r}")
    library, class_name = entry
    ours = library in ("diffusers", *LIBRARIES.values())
    found = public_class(class_name) if ours else getattr(sys.modules.get(library), class_name, None)
    if isinstance(found, type) and (ours or issubclass(found, (Pretrained, ConfigMixin))):
        return found
    if optional:
        _say_once(f"{name} ({class_name}) of the checkpoint is not loaded: minidiff does not implement it")
        return None
    raise ConfigError(
        f"{path}: {name} is {library}.{class_name}, which minidiff does not implement; pass {name}=... with one that "
        "it does; or, if it is a class of your own that is derived from minidiff's, import its module first"
    )


def dtypes_of(torch_dtype: Any, dtype: Any, parts: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """Return the dtype of each component, from one for all or from those by name, and a "default" for the rest."""
    asked = dtype if torch_dtype is None else torch_dtype
    if not isinstance(asked, Mapping):
        return dict.fromkeys(parts, as_dtype(torch_dtype, dtype))
    if torch_dtype is not None and dtype is not None and torch_dtype != dtype:
        raise ValueError("dtype and torch_dtype are two names of one argument; give one of them")
    if unknown := [name for name in asked if name not in (*parts, "default")]:
        raise ValueError(f"torch_dtype names {', '.join(unknown)}; the components are {', '.join(parts)}")
    return {name: as_dtype(asked.get(name, asked.get("default"))) for name in parts}


def compiled_from(component: Any) -> Any:
    """Return the network that ``torch.compile`` has wrapped; anything else as it is."""
    return getattr(component, "_orig_mod", component)


def load_component(
    kind: type, repo: Repo, name: str, dtype: torch.dtype, variant: str | None, optional: bool = False
) -> Any:
    """Load a component of a pipeline from the subfolder of its name; the error says if the pipeline can do without."""
    options = {"torch_dtype": dtype, "variant": variant} if issubclass(kind, Pretrained) else {}
    where = {**repo.where, "subfolder": _subfolder(kind, repo, name)}
    try:
        return kind.from_pretrained(repo.source, **where, **options)
    except CheckpointNotFoundError as error:
        if not optional:
            raise
        raise type(error)(f"{error}; or pass {name}=None to load the pipeline without it") from error


def _subfolder(kind: type, repo: Repo, name: str) -> str | None:
    """Return the folder of a component; in the oldest repositories (google/ddpm-...) all lie beside the index: None."""
    if not issubclass(kind, (Pretrained, SchedulerMixin)):
        return name
    filename = "config.json" if issubclass(kind, Pretrained) else CONFIG_NAME
    flat = repo.at(name).optional_file(filename) is None and repo.optional_file(filename) is not None
    return None if flat else name


def library_and_class(name: str, component: Any, optional: bool) -> tuple[str | None, str | None]:
    """Return the entry of ``model_index.json``: where the reference has the class that is ours of the same name."""
    if component is None:
        return None, None
    if kind := published(type(component)):  # a class derived from ours elsewhere is saved as ours
        return LIBRARIES.get(kind.__module__, "diffusers"), kind.__name__
    if hasattr(component, "save_pretrained") and hasattr(component, "from_pretrained"):
        return type(component).__module__, type(component).__name__
    if optional:
        return None, None
    raise TypeError(
        f"{name} is a {type(component).__name__}, which is not one of minidiff's classes and has no save_pretrained"
    )


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.warning(message)
