"""Write a safetensors file tensor by tensor, so that no more than one of them is in memory.

The format: eight bytes with the length of the header (little endian), the header (JSON: dtype, shape and the first and
last byte of each tensor, counted from the end of the header), the tensors without gaps. Everything in the header is
known before any tensor is read, so it is written first. https://github.com/huggingface/safetensors#format
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from minidiff.atomic import write_file
from minidiff.checkpoints.load import STORED_DTYPES

_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


class Group(NamedTuple):
    """Some tensors that are made together: ``specs`` are name, dtype and shape of each.

    ``make`` gives their values in order: whole tensors or pieces of any shape, one after the other.
    """

    specs: list[tuple[str, torch.dtype, tuple[int, ...]]]
    make: Callable[[], Iterable[Tensor]]

    @property
    def size(self) -> int:
        """Number of bytes."""
        return sum(_size(dtype, shape) for _, dtype, shape in self.specs)


def write_stream(
    path: Path,
    groups: Iterable[Group],
    metadata: Mapping[str, str],
    progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Write ``groups`` to ``path`` one after the other; the file appears under its name when it is complete.

    ``progress`` is told the number of bytes after each group. Wider dtypes come first, so that every tensor begins at
    a multiple of its own width, as readers that map the file expect.
    """
    ordered = sorted(groups, key=lambda group: -group.specs[0][1].itemsize)
    write_file(path, lambda made: _write(made, ordered, metadata, progress))


def _write(path: Path, groups: list[Group], metadata: Mapping[str, str], progress: Callable[[int], None]) -> None:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape in (spec for group in groups for spec in group.specs):
        start, end = end, end + _size(dtype, shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for group in groups:
            _write_group(file, group)
            progress(group.size)


def _write_group(file: BinaryIO, group: Group) -> None:
    """Make and write the tensors of one group; they are gone when it returns, before those of the next are made."""
    start = file.tell()
    for values in group.make():
        file.write(memoryview(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    if file.tell() - start != group.size:
        names = ", ".join(name for name, _, _ in group.specs)
        raise AssertionError(f"{names} came to {file.tell() - start} bytes, not {group.size}")


def _size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * torch.Size(shape).numel()
