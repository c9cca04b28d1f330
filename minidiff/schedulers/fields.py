"""What the fields of a scheduler's configuration may be, read from the types of its constructor's arguments."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from minidiff.errors import ConfigError

LARGEST = 10**6  # of an integer: tables have so many entries, and runs so many steps


class Kind(NamedTuple):
    """A type of values: whether something is of it, and its name for messages."""

    holds: Callable[[Any], bool]
    words: str


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, (bool, np.bool_)) and not math.isnan(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def _are(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def holds(values: Any) -> bool:
        values = values.tolist() if hasattr(values, "tolist") else values
        return isinstance(values, Sequence) and not isinstance(values, str) and all(map(check, values))

    return holds


KINDS: dict[Any, Kind] = {
    bool: Kind(lambda value: isinstance(value, (bool, np.bool_)), "true or false"),
    int: Kind(_is_integer, f"an integer of at most {LARGEST:,}"),
    float: Kind(_is_number, "a number"),
    str: Kind(lambda value: isinstance(value, str), "a string"),
    Sequence[float]: Kind(_are(lambda value: _is_number(value) and math.isfinite(value)), "a list of finite numbers"),
    Sequence[int]: Kind(_are(_is_integer), "a list of integers"),
}
KINDS |= {kind | None: Kind(lambda v, k=k: v is None or k.holds(v), f"{k.words}, or null") for kind, k in KINDS.items()}


def check_fields(name: str, parameters: Mapping[str, inspect.Parameter], fields: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` naming every field whose value is not of the type of the constructor's argument.

    Args:
        name: of the class.
        parameters: the arguments of its constructor; one without a type, or of another, may be anything.
        fields: the configuration.
    """
    wrong = []
    for field, value in fields.items():
        kind = KINDS.get(parameters[field].annotation) if field in parameters else None
        if kind and not kind.holds(value):
            wrong.append(f"{field} should be {kind.words}, found {value!r:.80}")
    if wrong:
        raise ConfigError(f"{name}: {'; '.join(wrong)}")
