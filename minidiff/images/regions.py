"""Rectangles of PIL pictures: making one fit a size, the part around a mask, and pasting that part back.

Repainting a small part of a large picture goes better on an enlarged view of it: cut out the rectangle around the mask,
repaint that at full size, make it small again and paste it where it was::

    region = crop_region(mask, width, height, pad)
    view   = resized(picture.crop(region), width, height, mode="fill")
    result = overlay(mask, picture, repainted_view, region)

Checked against ``diffusers.image_processor.VaeImageProcessor``: ``get_crop_region``, ``resize`` and ``apply_overlay``.
"""

import numpy as np
from PIL import Image, ImageOps

from minidiff.errors import check_choice

Region = tuple[int, int, int, int]  # left, top, right, bottom, in pixels
RESIZE_MODES = ("default", "fill", "crop")


def resized(
    picture: Image.Image,
    width: int,
    height: int,
    mode: str = "default",
    resample: Image.Resampling = Image.Resampling.LANCZOS,
    reducing_gap: float | None = None,
) -> Image.Image:
    """Bring a picture to ``width`` x ``height`` pixels.

    Args:
        mode: "default" stretches it; "fill" keeps its proportions, fits it inside and smears its edges over the bands
            that are left; "crop" keeps its proportions, covers the size and cuts off what is too much. The last two
            give RGB, "default" keeps the picture's mode.
        resample: how pixels are mixed; PIL takes the nearest one in palette pictures and those of 1 bit.
        reducing_gap: PIL's short cut for much smaller sizes, of "default" only.

    Raises:
        ValueError: for another mode.
    """
    check_choice("resize_mode", mode, RESIZE_MODES)
    if mode == "default":
        return picture.resize((width, height), resample, reducing_gap=reducing_gap)
    ratio, own_ratio = width / height, picture.width / picture.height
    if ratio < own_ratio if mode == "fill" else ratio > own_ratio:
        w, h = width, picture.height * width // picture.width
    else:
        w, h = picture.width * height // picture.height, height
    scaled = picture.resize((w, h), resample)
    left, top = width // 2 - w // 2, height // 2 - h // 2
    sheet = Image.new("RGB", (width, height))
    sheet.paste(scaled, (left, top))
    if mode == "fill" and top > 0 and ratio < own_ratio:
        sheet.paste(scaled.resize((width, top), box=(0, 0, width, 0)), (0, 0))
        sheet.paste(scaled.resize((width, top), box=(0, h, width, h)), (0, top + h))
    if mode == "fill" and left > 0 and ratio > own_ratio:
        sheet.paste(scaled.resize((left, height), box=(0, 0, 0, height)), (0, 0))
        sheet.paste(scaled.resize((left, height), box=(w, 0, w, height)), (left + w, 0))
    return sheet


def crop_region(mask_image: Image.Image, width: int, height: int, pad: int = 0) -> Region:
    """Return the rectangle that holds all of a mask that is not black, in the proportions of ``width`` x ``height``.

    Args:
        mask_image: a picture; what is not black in grey counts.
        width, height: the size that the rectangle is going to be worked on at.
        pad: pixels to add on each side, as far as the picture goes.

    Raises:
        ValueError: if the mask is black all over.
    """
    marked = np.asarray(mask_image.convert("L")) != 0  # (H, W)
    if not marked.any():
        raise ValueError("mask_image is black all over: there is nothing to repaint and no region to crop to")
    H, W = marked.shape
    columns, rows = marked.any(0).nonzero()[0].tolist(), marked.any(1).nonzero()[0].tolist()
    x1, x2 = max(columns[0] - pad, 0), min(columns[-1] + 1 + pad, W)
    y1, y2 = max(rows[0] - pad, 0), min(rows[-1] + 1 + pad, H)
    ratio = width / height
    if (x2 - x1) / (y2 - y1) > ratio:
        y1, y2 = _grown(y1, y2, int((x2 - x1) / ratio - (y2 - y1)), H)
    else:
        x1, x2 = _grown(x1, x2, int((y2 - y1) * ratio - (x2 - x1)), W)
    return x1, y1, x2, y2


def overlay(
    mask: Image.Image, init_image: Image.Image, image: Image.Image, crop_coords: Region | None = None
) -> Image.Image:
    """Return ``init_image`` with ``image`` where ``mask`` is white, mixed where it is grey; RGB.

    Args:
        mask, init_image: pictures of one size.
        image: a picture of that size, or one of any size that belongs into the rectangle ``crop_coords``.

    Raises:
        ValueError: if sizes that should be equal are not.
    """
    sizes = [mask.size, init_image.size] + ([image.size] if crop_coords is None else [])
    if len(set(sizes)) > 1:
        raise ValueError(f"mask and pictures to lay over each other should have one size, found {sizes}")
    kept = Image.new("RGBa", init_image.size)  # premultiplied: what is transparent must not bleed into the result
    kept.paste(init_image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask.convert("L")))
    if crop_coords is not None:
        left, top, right, bottom = crop_coords
        sheet = Image.new("RGBA", init_image.size)
        sheet.paste(resized(image, right - left, bottom - top, "crop"), (left, top))
        image = sheet.convert("RGB")
    result = image.convert("RGBA")
    result.alpha_composite(kept.convert("RGBA"))
    return result.convert("RGB")


def _grown(low: int, high: int, more: int, side: int) -> tuple[int, int]:
    """Widen the interval by ``more`` on both ends together; move it into [0, side], as far as it fits."""
    low, high = low - more // 2, high + more - more // 2
    if high >= side:
        low, high = low - (high - side), side
    if low < 0:
        low, high = 0, high - low
    return low, min(high, side)
