"""The training pictures of emoji64 in one file, to compare generated pictures with.

``emoji_reference.webp`` is a sheet of 64x64 tiles, 40 in a row; ``emoji_reference.json`` names each tile and says which
other tiles are the same picture, pixel for pixel, in the data. The sheet is compressed (WebP, quality 90), which moves
a pixel by about 1 %. Made from the unpacked npm package by ``python -m weights.emoji_reference --data package``.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

HERE = Path(__file__).resolve().parent
SHEET, INDEX = HERE / "emoji_reference.webp", HERE / "emoji_reference.json"
SIZE, COLUMNS = 64, 40


class Reference(NamedTuple):
    """The training pictures (N, 3, 64, 64) in [0, 1], their names, and a number that equal pictures share."""

    pictures: Tensor
    names: list[str]
    groups: list[int]


def read_reference() -> Reference:
    """Return the training pictures."""
    index = json.loads(INDEX.read_text(encoding="utf-8"))
    with Image.open(SHEET) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    rows, columns = pixels.shape[0] // SIZE, pixels.shape[1] // SIZE
    tiles = pixels.reshape(rows, SIZE, columns, SIZE, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, SIZE, SIZE)
    pictures = torch.from_numpy(tiles[: len(index["names"])].copy()).float() / 255
    return Reference(pictures, index["names"], index["groups"])


def groups_of(pictures: Tensor, names: list[str]) -> list[int]:
    """Number the pictures so that those with equal pixels or equal names have the same number."""
    first: dict[bytes | str, int] = {}
    numbers = []
    for i, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        pixels = picture.numpy().tobytes()
        number = first.get(pixels, first.get(name, i))
        first[pixels] = first[name] = number
        numbers.append(number)
    return numbers


def main() -> None:
    """Write the sheet and its index."""
    from weights.emoji_data import read_emoji, read_pictures

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the unpacked npm package emoji-datasource-google")
    data = parser.parse_args().data
    emoji = read_emoji(data)
    pictures, names = read_pictures(data, emoji), [e.name for e in emoji]
    rows = -(-len(names) // COLUMNS)
    sheet = torch.full((rows * COLUMNS, 3, SIZE, SIZE), 255, dtype=torch.uint8)
    sheet[: len(names)] = pictures
    pixels = sheet.view(rows, COLUMNS, 3, SIZE, SIZE).permute(0, 3, 1, 4, 2).reshape(rows * SIZE, COLUMNS * SIZE, 3)
    Image.fromarray(pixels.numpy()).save(SHEET, quality=90, method=6)
    index = {"names": names, "groups": groups_of(pictures, names)}
    INDEX.write_text(json.dumps(index, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
