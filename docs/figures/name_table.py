"""Draw docs/checkpoints.svg: ``python -m docs.figures.name_table``.

Three columns of names, ours, the Hub's and the original's, and a line for each pair of groups that hold the same
weights. Everything is read from the name table; only where a name is cut off, to make groups, is chosen here.
"""

import argparse
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from minidiff.checkpoints.load import OnMeta
from minidiff.checkpoints.original.configs import PackagedConfigs
from minidiff.checkpoints.remap import SAME, Row
from minidiff.checkpoints.tools.checkpoint import model_class

WIDTH, LINE, TITLE, COLUMNS = 900, 19, 34, (20, 335, 650)  # pixels; where the columns begin
LETTER = 7.3  # width of a letter
COLOURS = ("#3b6ea5", "#b5651d", "#4d8f4d", "#8e4585", "#a03c3c", "#2f7f86", "#7a6a2f", "#5a5a9c")


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=Path("docs/checkpoints.svg"))
    unet = table("stable-diffusion-v1-5", "unet")
    vae = table("stable-diffusion-v1-5", "vae")
    text = table("stable-diffusion-xl-base-1.0", "text_encoder_2")
    decoder = [row for row in vae if row.ours[0].startswith(("decoder.mid", "decoder.up"))]
    attention = [row for row in text if "layers.0.attn" in row.ours[0] or "projection" in row.ours[0]]
    panels = [
        ("UNet of Stable Diffusion 1.x: one level is several blocks of the original", unet, unet_group),
        ("decoder of the autoencoder: the original counts its levels from the finest", decoder, decoder_group),
        ("attention of OpenCLIP: q, k and v in one matrix, the projection transposed", attention, tensor_name),
    ]
    parser.parse_args().to.write_text(svg(panels), encoding="utf-8")


def table(name: str, component: str) -> list[Row]:
    """Return the rows of a component of a published model."""
    configs = PackagedConfigs(name)
    with OnMeta():
        model = model_class(configs.read("model_index.json")[component][1], name).from_config(
            configs.read(f"{component}/config.json")
        )
    return model.rows()


def unet_group(name: str) -> str:
    """Cut a name of the UNet after its level or block."""
    return re.match(r"(down|up|(down|up)_blocks|(input|output)_blocks)\.\d+|\w+", name)[0]


def decoder_group(name: str) -> str:
    """Cut a name of the decoder after its level."""
    return re.match(r"decoder\.(up(_blocks)?\.\d+|mid(_block)?)", name)[0]


def tensor_name(name: str) -> str:
    """Leave a name whole but for what stands before all of them."""
    return name.removeprefix("text_model.encoder.").removeprefix("transformer.")


def svg(panels: Iterable[tuple[str, list[Row], Callable[[str], str]]]) -> str:
    """Return the picture."""
    parts, y = [], 30
    titles = ("minidiff", "Hub (diffusers, transformers)", "original (CompVis, Stability)")
    for x, title in zip(COLUMNS, titles, strict=True):
        parts.append(f'<text x="{x}" y="{y - 8}" font-weight="bold">{title}</text>')
    for title, rows, group in panels:
        panel, height = draw_panel(rows, group, y + TITLE)
        parts += [f'<text x="{COLUMNS[0]}" y="{y + 20}" fill="#555" font-style="italic">{title}</text>', *panel]
        y += TITLE + height
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" '
        'font-family="monospace" font-size="12">'
    )
    return "\n".join([head, f'<rect width="{WIDTH}" height="{y}" fill="white"/>', *parts, "</svg>", ""])


def draw_panel(rows: list[Row], group: Callable[[str], str], top: int) -> tuple[list[str], int]:
    """Return the elements of one panel and its height: columns of equal height, and lines between the groups."""
    columns = [list(dict.fromkeys(group(name) for row in rows for name in row[k])) for k in range(3)]
    if group is decoder_group:
        columns[2].sort()  # in the order of its own numbers
    height = max(map(len, columns)) * LINE
    middle = [
        {name: top + height * (2 * i + 1) / (2 * len(column)) for i, name in enumerate(column)} for column in columns
    ]
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(columns[0])}
    lines: dict[tuple[float, ...], tuple[str, str]] = {}
    for row in rows:
        names = [[group(name) for name in row[k]] for k in range(3)]
        for side, op in ((0, row.hub_op), (1, row.ldm_op)):
            for i, start in enumerate(names[side]):
                end = names[side + 1][min(i, len(names[side + 1]) - 1)]
                left = COLUMNS[side] + LETTER * len(start) + 6
                key = (left, middle[side][start], COLUMNS[side + 1] - 6, middle[side + 1][end])
                dash = "4 3" if group is tensor_name and op is not SAME else "none"  # the layout changes
                lines[key] = (colour[names[0][min(i, len(names[0]) - 1)]], dash)
    parts = []
    for (x, y, u, v), (hue, dash) in lines.items():
        bend = u - min(75, (u - x) / 2)
        curve = f"M{x:.0f} {y:.1f} C{bend:.0f} {y:.1f} {bend:.0f} {v:.1f} {u:.0f} {v:.1f}"
        parts.append(f'<path d="{curve}" fill="none" stroke="{hue}" stroke-width="1.5" stroke-dasharray="{dash}"/>')
    for x, places in zip(COLUMNS, middle, strict=True):
        parts += [f'<text x="{x}" y="{y + 4:.1f}" fill="#111">{name}</text>' for name, y in places.items()]
    return parts, height


if __name__ == "__main__":
    main()
