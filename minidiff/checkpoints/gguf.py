"""The header of a GGUF file: metadata, and name, type, shape and place of each tensor. Nothing else is read here.

    "GGUF", version, number of tensors, number of metadata entries          4 bytes, u32, u64, u64
    each entry: key, type, value                                            string, u32, ...
    each tensor: name, number of axes, axes (the last first), type, place   string, u32, u64 each, u32, u64
    padding to the alignment, then the tensors; places are counted from here

Numbers are little endian; a string is its length (u64) and so many bytes. Every length is compared with that of the
file before it is used. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from minidiff.atomic import unchanged
from minidiff.checkpoints.gguf_blocks import BLOCKS
from minidiff.checkpoints.load import OpenFile, StoredTensor
from minidiff.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_SCALARS = "B b H h I i f ? - - Q q d".split()  # by the number of the type; 8 is a string, 9 an array
_STRING, _ARRAY, _INT32 = 8, 9, 5
_AXES, _LARGEST_ALIGNMENT = 4, 2**20


class Kind(NamedTuple):
    """A type of tensors: its name, and how many bytes hold how many values."""

    name: str
    values: int
    size: int


_KINDS = {
    number: Kind(name, 1, size)
    for number, name, size in ((0, "F32", 4), (1, "F16", 2), (28, "F64", 8), (30, "BF16", 2))
}
_KINDS |= {block.number: Kind(name, block.values, block.size) for name, block in BLOCKS.items()}


def is_gguf(path: Path) -> bool:
    """Tell whether a file is, or should be, a GGUF file."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC or path.suffix == ".gguf"


def read_gguf(path: Path) -> tuple[list[StoredTensor], dict[str, str]]:
    """List the tensors of a GGUF file without reading them; and its metadata, those that are strings.

    Raises:
        CheckpointError: if it is no GGUF file, cut short, of another version, or has a type that is not unpacked.
    """
    if path.stat().st_size < 24:  # an empty file cannot be mapped
        raise CheckpointError(f"{path} is no GGUF file: it has {path.stat().st_size} bytes")
    with unchanged(path), path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Header(OpenFile(path), data).read()


class _Header:
    def __init__(self, source: OpenFile, data: mmap.mmap) -> None:
        self.source, self.data, self.at = source, data, len(MAGIC)

    def read(self) -> tuple[list[StoredTensor], dict[str, str]]:
        if self.data[: len(MAGIC)] != MAGIC:
            raise self.error(f"it begins with {self.data[: len(MAGIC)]!r} instead of {MAGIC!r}")
        if (version := self.number("I")) not in VERSIONS:
            raise self.error(f"its version is {version}; minidiff reads {' and '.join(map(str, VERSIONS))}")
        tensors, entries = self.count(8 + 4 + 8 + 4 + 8), self.count(8 + 4 + 1)
        metadata = dict(self.entry() for _ in range(entries))
        described = [self.description() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= _LARGEST_ALIGNMENT:
            raise self.error(f"general.alignment should be from 1 to {_LARGEST_ALIGNMENT}, found {alignment!r}")
        start = -(-self.at // alignment) * alignment
        stored = [self.stored(start, metadata, *one) for one in described]
        return stored, {key: value for key, value in metadata.items() if isinstance(value, str)}

    def error(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.source.path} is not a complete GGUF file that minidiff reads: {why}")

    def take(self, size: int) -> bytes:
        """Read so many bytes."""
        if size > len(self.data) - self.at:
            raise self.error(f"{size:,} bytes should follow byte {self.at:,} of {len(self.data):,}; download it again")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def count(self, least: int) -> int:
        """Read how many things follow, of which each takes at least so many bytes."""
        count = self.number("Q")
        if count * least > len(self.data) - self.at:
            raise self.error(
                f"{count:,} things should follow byte {self.at:,} of {len(self.data):,}; download it again"
            )
        return count

    def text(self) -> str:
        return self.take(self.number("Q")).decode(errors="replace")

    def entry(self) -> tuple[str, Any]:
        key = self.text()
        return key, self.value(key, self.number("I"))

    def value(self, key: str, kind: int) -> Any:
        """Read a value of the metadata; of arrays only those of int32, which may be shapes, are kept."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner = self.number("I")
            if inner == _STRING:
                for _ in range(self.count(8)):
                    self.text()
                return None
            values = self.take(self.count(1) * struct.calcsize(self.scalar(key, inner)))
            return [value for (value,) in struct.iter_unpack("<i", values)] if inner == _INT32 else None
        return self.number(self.scalar(key, kind))

    def scalar(self, key: str, kind: int) -> str:
        if kind >= len(_SCALARS) or kind in (_STRING, _ARRAY):
            raise self.error(
                f"{key} in its metadata is of type {kind}, which is none of numbers, strings and lists of them"
            )
        return _SCALARS[kind]

    def description(self) -> tuple[str, tuple[int, ...], int, int]:
        name, axes = self.text(), self.number("I")
        if axes > _AXES:
            raise self.error(f"{name} has {axes} axes, not up to {_AXES}")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        return name, shape, self.number("I"), self.number("Q")

    def stored(
        self, start: int, metadata: dict[str, Any], name: str, shape: tuple[int, ...], number: int, place: int
    ) -> StoredTensor:
        """Return a tensor as everything else knows it, once it is known to lie in the file."""
        if number not in _KINDS:
            known = ", ".join(f"{kind.name} ({number})" for number, kind in _KINDS.items())
            raise self.error(f"{name} is of type {number}; minidiff unpacks {known}")
        kind, count = _KINDS[number], prod(shape)
        if (shape[-1] if shape else 1) % kind.values:
            raise self.error(f"{name} of shape {shape} is not made of blocks of {kind.values} values ({kind.name})")
        first, size = start + place, count // kind.values * kind.size
        if first + size > len(self.data):
            raise self.error(f"{name} should end at byte {first + size:,} of {len(self.data):,}; download it again")
        real = metadata.get(f"comfy.gguf.orig_shape.{name}")  # where the values are laid out in rows of whole blocks
        if isinstance(real, list) and prod(real) == count:
            shape = tuple(real)
        return StoredTensor(name, self.source, kind.name, shape, first, size)
