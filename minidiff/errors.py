"""The exceptions minidiff raises on bad input: all ``ValueError``, which code written for diffusers catches."""

from collections.abc import Sequence
from itertools import takewhile

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


class ConfigError(ValueError):
    """A configuration field is unknown, missing, or has a value that minidiff does not implement."""


class CheckpointError(ValueError):
    """A checkpoint's files or tensors are not what the model needs; the message names the file and the keys."""


class CheckpointNotFoundError(CheckpointError, OSError):
    """A folder, file or Hub repository that was asked for is not there (an ``OSError``, as in diffusers)."""
