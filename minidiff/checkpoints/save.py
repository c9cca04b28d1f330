"""Write checkpoints in Hub layout: safetensors under the Hub's modern names, in one file or in indexed shards.

Every file is whole or not there (``minidiff/atomic.py``), and a network may be saved into the very folder its weights
are mapped from.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minidiff.atomic import write_file, write_text
from minidiff.checkpoints.hub import variant_of

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(size: int | str) -> int:
    """Return a number of bytes from an int or a string such as "500MB" (decimal units, as on the Hub)."""
    if isinstance(size, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", size.strip(), re.IGNORECASE)
        if match is None:
            raise ValueError(
                f"max_shard_size={size!r} should be a number of bytes, or a string such as '10GB' or '500MB'"
            )
        size = int(float(match.group(1)) * UNITS[match.group(2).upper()])
    if size <= 0:
        raise ValueError(f"max_shard_size should be positive, not {size}")
    return size


def split(tensors: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    """Group names, in order, into shards of at most ``max_bytes``; a larger tensor gets a shard of its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def save_weights(
    tensors: Mapping[str, Tensor], folder: Path, stem: str, variant: str | None, max_shard_size: int | str
) -> None:
    """Write ``tensors`` to ``folder``, in one file or in shards with an index, and remove what it replaces.

    The names are those that diffusers and transformers write: ``{stem}.{variant}.safetensors``, or
    ``{stem}.{variant}-00001-of-00002.safetensors`` and ``{stem}.safetensors.index.{variant}.json``.
    """
    dotted = f".{variant}" if variant else ""
    shards = split(tensors, parse_size(max_shard_size))
    written: set[str] = set()
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        filename = f"{stem}{dotted}{part}.safetensors"
        save_tensors({name: tensors[name] for name in names}, folder / filename, {"format": "pt"})
        written.add(filename)
        index.update(dict.fromkeys(names, filename))
    if len(shards) > 1:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        filename = f"{stem}.safetensors.index{dotted}.json"
        save_json({"metadata": {"total_size": size}, "weight_map": index}, folder / filename)
        written.add(filename)
    _remove_older(folder, stem, variant, written)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; its folder is made if need be."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    separate = _separate(tensors)
    write_file(path, lambda made: save_file(separate, made, metadata=dict(metadata)))


def save_json(fields: Mapping[str, Any], path: Path) -> None:
    """Write a JSON object as the Hub's libraries do: two spaces, sorted keys, a newline at the end."""
    write_text(path, json.dumps(fields, indent=2, sort_keys=True) + "\n")


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors of which no two share memory: safetensors refuses to store tied weights."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        separate[name] = plain.clone() if plain.data_ptr() in seen else plain
        seen.add(plain.data_ptr())
    return separate


def _remove_older(folder: Path, stem: str, variant: str | None, written: set[str]) -> None:
    """Delete weights of the same variant from an earlier save in another number of files, which would be read first."""
    for path in folder.iterdir():
        if path.name not in written and variant_of(path.name, stem) == (variant or ""):
            path.unlink()
