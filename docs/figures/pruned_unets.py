"""Draw docs/pruned_unets.svg: ``python -m docs.figures.pruned_unets``.

What pruned UNets keep of the one that they were cut from: residual blocks and transformer blocks of each level, on the
way down, in the middle and on the way up, and how many parameters. All is read from networks without weights.
"""

import argparse
from functools import cache
from pathlib import Path
from typing import NamedTuple

from torch import nn

from minidiff import UNet2DConditionModel
from minidiff.checkpoints.load import OnMeta
from minidiff.checkpoints.original.configs import PackagedConfigs

ROWS = (  # packaged configuration -> title; the first of each row is the one that the others are held against
    {
        "stable-diffusion-v1-5": "SD 1.5",
        "small-sd": "small-sd",
        "tiny-sd": "tiny-sd",
        "sdxs-512-0.9": "SDXS-512-0.9",
        "sdxs-512-dreamshaper": "SDXS-512-dreamshaper",
    },
    {
        "stable-diffusion-xl-base-1.0": "SDXL",
        "SSD-1B": "SSD-1B",
        "Segmind-Vega": "Segmind Vega",
        "koala-1b": "KOALA-1B",
        "koala-700m": "KOALA-700M",
    },
)
LEFT, PANEL, COLUMN, LINE, RES, BAR, HEAD = 66, 166, 82, 13, 10, 4, 84  # pixels
BLUE, ORANGE, LIGHT, GHOST = "#3b6ea5", "#b5651d", "#e8b98a", 'fill="none" stroke="#bbb" stroke-dasharray="2 1.5"'


class Cell(NamedTuple):
    """One way through one level, or the middle."""

    depths: tuple[int, ...]  # transformer blocks behind each residual block
    parameters: int
    only_cross: bool = False


class Drawn(NamedTuple):
    """A network as it is drawn; levels run from the finest to the coarsest."""

    channels: tuple[int, ...]
    down: tuple[Cell, ...]
    up: tuple[Cell, ...]  # the last residual block of each level first
    middle: Cell
    parameters: int


def count(module: nn.Module | None) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0


@cache
def read(name: str) -> Drawn:
    """Return a packaged UNet as it is drawn."""
    with OnMeta():
        unet = UNet2DConditionModel.from_config(PackagedConfigs(name).read("unet/config.json"))
    spec, levels = unet.spec, unet.spec.levels
    down = [Cell(lv.depths, count(block), lv.only_cross) for lv, block in zip(levels, unet.down, strict=True)]
    up = [Cell(lv.up_depths[::-1], count(b), lv.only_cross) for lv, b in zip(levels, reversed(unet.up), strict=True)]
    middle = Cell((spec.mid_depth, 0)[: spec.mid_res], count(unet.mid))
    return Drawn(tuple(lv.channels for lv in levels), tuple(down), tuple(up), middle, count(unet))


def millions(parameters: int) -> str:
    """Write a number of parameters."""
    return f"{parameters / 1e6:.0f} M" if parameters >= 1e7 else f"{parameters / 1e6:.1f} M"


def text(x: float, y: float, words: str, more: str = "") -> str:
    """Return an element of text."""
    return f'<text x="{x:g}" y="{y:g}" {more}>{words}</text>'


def blocks(x: float, y: float, depth: int | None, full: int | None, light: bool = False) -> list[str]:
    """Draw a residual block and the transformers behind it, and in outline what the full network has more.

    ``depth`` None: there is no residual block here; ``full`` None: neither in the full network.
    """
    style = f'fill="{BLUE}"' if depth is not None else GHOST
    parts = [f'<rect x="{x:g}" y="{y:g}" width="{RES}" height="{RES}" {style}/>']
    for k in range(max(depth or 0, full or 0)):
        style = f'fill="{LIGHT if light else ORANGE}"' if k < (depth or 0) else GHOST
        place = f'x="{x + RES + 3 + k * (BAR + 2):g}" y="{y:g}" width="{BAR}" height="{RES}"'
        parts.append(f"<rect {place} {style}/>")
    return parts


def cell(x: float, y: float, own: Cell | None, full: Cell) -> list[str]:
    """Draw the lines of a cell, and the number of parameters below it."""
    own = own or Cell((), 0)
    parts: list[str] = []
    for j in range(max(len(own.depths), len(full.depths))):
        depths = (c.depths[j] if j < len(c.depths) else None for c in (own, full))
        parts += blocks(x, y + j * LINE, *depths, light=own.only_cross)
    words = millions(own.parameters) if own.depths else "none"
    return [*parts, text(x, y + len(full.depths) * LINE + 9, words, 'fill="#555" font-size="11"')]


def panel(x: float, y: float, title: str, own: Drawn, full: Drawn) -> list[str]:
    """Draw one network, its top left corner at (x, y)."""
    share = "" if own is full else f", {own.parameters / full.parameters:.0%}"
    parts = [text(x, y, title, 'font-weight="bold"'), text(x, y + 15, millions(own.parameters) + share)]
    y += 28
    for i in range(len(full.down)):
        for k, (mine, whole) in enumerate(((own.down, full.down), (own.up, full.up))):
            parts += cell(x + k * COLUMN, y, mine[i] if i < len(mine) else None, whole[i])
        y += height(full, i)
    return parts + cell(x + COLUMN / 2, y, own.middle, full.middle)


def height(full: Drawn, level: int) -> int:
    """Return how high a level is drawn."""
    return len(full.up[level].depths) * LINE + 22


def legend() -> list[str]:
    """Explain the signs."""
    grey = 'fill="#555"'
    lines = [
        (f'fill="{BLUE}"', RES, "a residual block"),
        (f'fill="{ORANGE}"', BAR, "a transformer block: attention to the pixels, to the text, MLP"),
        (f'fill="{LIGHT}"', BAR, "the same with both attentions to the text"),
        (GHOST, RES, "what the first of the row has more"),
    ]
    places = ((0, 12), (0, 32), (480, 32), (480, 12))
    parts = []
    for (style, width, words), (x, y) in zip(lines, places, strict=True):
        parts.append(f'<rect x="{LEFT + x}" y="{y}" width="{width}" height="{RES}" {style}/>')
        parts.append(text(LEFT + x + 18, y + 9, words, grey))
    words = "left the way down, right the way up (from bottom to top), between them the middle; parameters below each"
    return [*parts, text(LEFT, 61, words, grey)]


def svg() -> str:
    """Return the picture."""
    parts, y = legend(), HEAD
    for names in ROWS:
        networks = [read(name) for name in names]
        full = networks[0]
        for k, (title, network) in enumerate(zip(names.values(), networks, strict=True)):
            parts += panel(LEFT + k * PANEL, y, title, network, full)
        y += 28
        for i, channels in enumerate(full.channels):
            parts.append(text(8, y + 9, str(channels), 'fill="#555"'))
            parts.append(text(8, y + 22, "channels", 'fill="#555" font-size="10"'))
            y += height(full, i)
        parts.append(text(8, y + 9, "middle", 'fill="#555"'))
        y += len(full.middle.depths) * LINE + 42
    width = LEFT + len(ROWS[0]) * PANEL + 8
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y - 20}" viewBox="0 0 {width} {y - 20}" '
    head += 'font-family="sans-serif" font-size="12">'
    return "\n".join([head, f'<rect width="{width}" height="{y}" fill="white"/>', *parts, "</svg>", ""])


def main(arguments: list[str] | None = None) -> None:
    """Draw the picture from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("docs/pruned_unets.svg"))
    parser.parse_args(arguments).to.write_text(svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
