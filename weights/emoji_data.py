"""The training data of the emoji checkpoints: Noto Emoji pictures, 64x64, each with the texts that describe it.

The npm package ``emoji-datasource-google`` carries them: ``npm pack emoji-datasource-google@16.0.0``, unpack, and give
the folder ``package``. Flags and the five skin tones are left out; every picture is put on a white background.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PACKAGE = "emoji-datasource-google 16.0.0 (npm)"
_LEFT_OUT = {"Flags", "Component"}


@dataclass(frozen=True)
class Emoji:
    """One picture's file and texts."""

    file: str
    name: str  # the Unicode name in lower case: "sparkling heart"
    captions: tuple[str, ...]  # other texts for it: short names, "kind, name"
    category: str = ""  # "Food & Drink"


def read_emoji(folder: str | Path) -> list[Emoji]:
    """Return the emoji of an unpacked package, in the order of Unicode's code points.

    Raises FileNotFoundError naming the file that is missing and the command that gets it.
    """
    index = Path(folder) / "emoji.json"
    if not index.is_file():
        raise FileNotFoundError(
            f"{index} is missing: `npm pack emoji-datasource-google@16.0.0`, unpack it, and give it"
        )
    entries = [e for e in json.loads(index.read_text(encoding="utf-8")) if e["category"] not in _LEFT_OUT]
    entries = sorted((e for e in entries if e["has_img_google"]), key=lambda e: e["unified"])
    return [Emoji(e["image"], e["name"].lower(), _captions(e), e["category"]) for e in entries]


def _captions(entry: dict) -> tuple[str, ...]:
    """Return what else a picture may be called: its short names, and its name with the kind of thing it is."""
    words = [short.replace("_", " ").replace("-", " ") for short in entry["short_names"]]
    kind = entry["subcategory"].replace("-", " ")
    return (*words, f"{entry['name'].lower()}, {kind}", f"{words[0]}, {kind}")


def read_pictures(folder: str | Path, emoji: list[Emoji]) -> Tensor:
    """Return the pictures of ``emoji`` on white, (N, 3, 64, 64) uint8."""
    return torch.stack([_on_white(Path(folder) / "img" / "google" / "64" / e.file) for e in emoji])


def _on_white(path: Path) -> Tensor:
    with Image.open(path) as picture:
        rgba = picture.convert("RGBA")
    canvas = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return torch.from_numpy(np.asarray(canvas.convert("RGB")).copy()).permute(2, 0, 1)


def to_float(pictures: Tensor) -> Tensor:
    """Turn uint8 pictures into float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1
