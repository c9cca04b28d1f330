"""The exceptions minidiff raises on bad input, and checks of arguments that raise.

All are ``ValueError``, which code written for diffusers catches; ``TypeError`` where the type is wrong.
"""

import math
from collections.abc import Sequence
from itertools import takewhile
from numbers import Integral, Real
from typing import Any

LONGEST = 20  # lines of a list in a message


def shortened(lines: Sequence[str]) -> list[str]:
    """Return a list for a message: if it is long, its beginning, and how many more there are and how they begin."""
    if len(lines) <= LONGEST:
        return list(lines)
    rest = [line.split(" ")[0].split(".")[:-1] for line in lines[LONGEST:]]
    common = takewhile(lambda parts: len(set(parts)) == 1, zip(*rest, strict=False))
    start = "".join(f"{parts[0]}." for parts in common)
    how = f", which begin with {start!r}" if start else ""
    return [*lines[:LONGEST], f"... and {len(rest)} more{how}"]


def printable(text: str) -> str:
    """Return text from files for a terminal: what is no character there, such as the codes that move it, is escaped."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class ConfigError(ValueError):
    """A configuration field is unknown, missing, or has a value that minidiff does not implement."""


class CheckpointError(ValueError):
    """A checkpoint's files or tensors are not what the model needs; the message names the file and the keys."""


class CheckpointNotFoundError(CheckpointError, OSError):
    """A folder, file or Hub repository that was asked for is not there (an ``OSError``, as in diffusers)."""


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise if ``value`` is not a finite real number in [low, high]; NaN is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} should be a number, found {value!r}")
    if isinstance(value, Integral) and abs(value) > 2**1000:  # more than a float can be
        raise ValueError(f"{name} should be finite, found an integer of {int(value).bit_length():,} bits")
    if not (low <= value <= high) or math.isinf(value):
        limits = "" if math.isinf(low) else f" and in [{low:g}, {high:g}]"
        raise ValueError(f"{name} should be finite{limits}, found {value}")


MOST = 10_000  # pictures of one call
LONGEST_SIDE = 65_536  # of a picture, in pixels
LONGEST_TEXT = 100_000  # characters; no encoder reads a hundredth of it


def check_count(name: str, value: Any, most: int | None = None) -> None:
    """Raise if ``value`` is not a positive integer of at most ``most``, which keeps a slip from filling the memory."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} should be an integer, found {value!r}")
    if value < 1:
        raise ValueError(f"{name} should be at least 1, found {value}")
    if most is not None and value > most:
        raise ValueError(f"{name} should be at most {most:,}, found {value:,}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise if ``value`` is not one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} should be one of {', '.join(choices)}, found {value!r}")
