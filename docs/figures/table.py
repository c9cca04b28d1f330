"""A table of small pictures with labels, as the sheets of the documentation have it."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

TILE, GAP, TOP = 64, 4, 18  # pixels: a picture, between two, and above the first where columns have names


def table(rows: Mapping[str, Sequence[Image.Image]], left: int, columns: Sequence[str] = ()) -> Image.Image:
    """Return rows of pictures one below the other, their labels in ``left`` pixels, names of columns on top."""
    top = TOP if columns else GAP
    across = max(len(pictures) for pictures in rows.values())
    sheet = Image.new("RGB", (left + across * (TILE + GAP), top + len(rows) * (TILE + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    places = [left + column * (TILE + GAP) for column in range(across)]
    for x, name in zip(places, columns, strict=bool(columns)):
        pen.text((x + TILE / 2, 4), name, fill="black", anchor="ma")
    for k, (label, pictures) in enumerate(rows.items()):
        y = top + k * (TILE + GAP)
        pen.multiline_text((left - 8, y + TILE / 2), label, fill="black", anchor="rm", align="right")
        for x, picture in zip(places, pictures, strict=True):
            sheet.paste(picture, (x, y))
    return sheet
