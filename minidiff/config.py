"""Configurations: Hub JSON in, frozen records out. What minidiff does not implement is refused by name.

Two things live here. ``Config`` is the public ``.config`` of every model, scheduler and pipeline: it answers with the
Hub's own field names. The ``*Spec`` records are what the networks are built from: the Hub's parallel lists
(``block_out_channels``, ``down_block_types``, ``attention_head_dim``...) turned once into one record per level.
"""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from minidiff.checkpoints.sniff import what_is
from minidiff.errors import ConfigError


class Config(dict[str, Any]):
    """A dict that cannot be changed and whose fields are also attributes: ``config.width == config["width"]``.

    ``config.copy()`` and ``config | {...}`` are ordinary dicts, to be changed and made into something else.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self:  # Python asks for dunders while unpickling and copying
            raise AttributeError(f"the configuration has no field {name!r}")
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"configurations are frozen: build a new object with {name}={value!r} instead")

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "configurations are frozen: change a copy, dict(config), and build a new object with from_config"
        )

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return _frozen, (type(self), dict(self))  # pickling and copying would set items otherwise

    def __repr__(self) -> str:
        return f"Config({json.dumps(self, indent=2, default=str)})"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a new plain dict."""
        return dict(self)


def _frozen(kind: type[Config], fields: dict[str, Any]) -> Config:
    made = dict.__new__(kind)
    dict.update(made, fields)
    return made


def show_fields(init: Any, defaults: Config) -> None:
    """Let ``inspect.signature`` of a constructor that takes ``**fields`` list them with their defaults."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in defaults.items()}
    kind = inspect.Parameter
    fields = [kind(name, kind.KEYWORD_ONLY, default=value) for name, value in values.items()]
    init.__signature__ = inspect.Signature([kind("self", kind.POSITIONAL_ONLY), *fields])


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object from ``path``. Raises ``ConfigError`` naming the file if it is not one."""
    if what := what_is(Path(path)):
        raise ConfigError(f"{path} is no configuration: {what}")
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} should hold a JSON object, found {type(fields).__name__}")
    return fields


# Keys that say who wrote a file, or that an EMA wrapper left behind; they do not describe the network.
_ANNOTATIONS = frozenset("decay inv_gamma min_decay optimization_step power update_after_step use_ema_warmup".split())


def complete(
    network: str, given: Mapping[str, Any], defaults: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]]
) -> Config:
    """Return ``given`` with absent fields at the reference's class defaults; refuse what minidiff does not implement.

    Args:
        network: class name for the messages.
        given: fields of a Hub config or keyword arguments. Keys that begin with ``_`` and EMA leftovers are kept as
            annotations but mean nothing.
        defaults: every field that is honoured, with the reference's default.
        only: fields that are accepted with these values alone (the first is the default), because only these values
            leave the network as minidiff builds it.

    Raises:
        ConfigError: naming every field that is unknown or has a value outside ``only``.
    """
    problems = [
        f"{name} = {json.dumps(value, default=str)} (implemented: {', '.join(map(json.dumps, only[name]))})"
        if name in only
        else f"{name} = {json.dumps(value, default=str)} (unknown field)"
        for name, value in given.items()
        if not (name in defaults or name.startswith("_") or name in _ANNOTATIONS)
        and not (name in only and value in only[name])
    ]
    if problems:
        raise ConfigError(f"{network} does not implement: " + "; ".join(problems))
    fields = {**defaults, **{name: values[0] for name, values in only.items()}, **given}
    return Config({name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()})


def check_types(
    network: str, config: Mapping[str, Any], defaults: Mapping[str, Any], lists: tuple[str, ...] = ()
) -> None:
    """Raise ``ConfigError`` naming every field whose value is not of the type of its default.

    Args:
        network: class name for the messages.
        config: the completed fields.
        defaults: the fields to check; a default of None allows anything.
        lists: names of fields that may hold one value per level instead of one value.
    """
    problems = [
        f"{name} = {json.dumps(config[name], default=str)} (expected {_TYPE_NAMES[type(default)]})"
        for name, default in defaults.items()
        if not (
            default is None or _is_like(config[name], default) or (name in lists and isinstance(config[name], list))
        )
    ]
    if problems:
        raise ConfigError(f"{network} has fields of a wrong type: " + "; ".join(problems))


_TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string", list: "a list"}


def _is_like(value: Any, default: Any) -> bool:
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, list):
        return isinstance(value, list) and bool(value) and all(type(item) is type(default[0]) for item in value)
    return type(value) is type(default)  # True is an int to isinstance


def per_level(network: str, name: str, value: Any, levels: int, least: int = 1) -> list[int]:
    """Spread a field that may be one integer or a list of them over the levels.

    Raises:
        ConfigError: on a wrong length, or an entry that is not an integer of at least ``least``.
    """
    values = list(value) if isinstance(value, (list, tuple)) else [value] * levels
    if len(values) != levels:
        raise ConfigError(f"{network}: {name} has {len(values)} entries, but block_out_channels has {levels}: {values}")
    if any(type(item) is not int or item < least for item in values):
        raise ConfigError(f"{network}: {name} should hold integers of at least {least}, found {value}")
    return values
