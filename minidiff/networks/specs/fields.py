"""Fields of a network's ``config.json``: absent ones get the reference's default, wrong ones are refused by name."""

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from minidiff.config import Config
from minidiff.errors import ConfigError

Kind = TypeVar("Kind")


def show_fields(init: Any, defaults: Mapping[str, Any]) -> None:
    """Let ``inspect.signature`` of a constructor that takes ``**fields`` list them with their defaults."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in defaults.items()}
    kind = inspect.Parameter
    fields = [kind(name, kind.KEYWORD_ONLY, default=value) for name, value in values.items()]
    init.__signature__ = inspect.Signature([kind("self", kind.POSITIONAL_ONLY), *fields])


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
    return Config({name: list(value) if isinstance(value, list | tuple) else value for name, value in fields.items()})


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


def block_kinds(network: str, config: Config, field: str, known: Mapping[str, Kind]) -> list[Kind]:
    """Look up the block types in ``field``, one per level.

    Raises:
        ConfigError: if one is unknown, or there are more or fewer than levels.
    """
    types, count = config[field], len(config.block_out_channels)
    if len(types) != count or any(block not in known for block in types):
        raise ConfigError(
            f"{network}: {field} should be {count} of {', '.join(known)}, one per entry of block_out_channels; found "
            f"{types}"
        )
    return [known[block] for block in types]


def check_counts(network: str, config: Config, names: Sequence[str]) -> None:
    """Raise if one of these fields is neither a positive integer nor null."""
    for name in names:
        value = config[name]
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f"{network}: {name} should be a positive integer or null, found {value!r}")


def check_known(network: str, name: str, value: Any, known: Iterable[str | None]) -> None:
    """Raise if a field has none of the values that are known."""
    if value not in tuple(known):  # a list is no key
        names = ", ".join("null" if kind is None else kind for kind in known)
        raise ConfigError(f"{network}: {name} should be one of {names}, found {value!r}")


def class_fields(config: Config) -> dict[str, Any]:
    """Return how a UNet is told a class, as fields of ``UNetSpec``."""
    kind = config.class_embed_type or ("table" if config.num_class_embeds is not None else None)
    width = config.num_class_embeds if kind == "table" else config.get("projection_class_embeddings_input_dim")
    return {"class_embed": kind, "class_width": 0 if kind in (None, "timestep", "identity") else width}


def check_groups(network: str, config: Config) -> None:
    """Raise if a number of channels is not positive, or that of a level not divisible by the groups of its norm."""
    check_counts(network, config, ("in_channels", "out_channels"))
    channels, groups = config.block_out_channels, config.norm_num_groups
    if groups < 1 or any(C < 1 or C % groups for C in channels):
        raise ConfigError(
            f"{network}: block_out_channels {channels} should be divisible by norm_num_groups {groups}, and positive"
        )


def check_layers(network: str, config: Config) -> None:
    """Raise if a UNet has groups, a padding or a dropout that its layers cannot have."""
    check_groups(network, config)
    if config.downsample_padding not in (0, 1):
        raise ConfigError(f"{network}: downsample_padding should be 0 or 1, found {config.downsample_padding}")
    if not 0 <= config.dropout <= 1:
        raise ConfigError(f"{network}: dropout should be from 0 to 1, found {config.dropout}")
