"""Pictures that a caller begins with, as the tensor that the autoencoder encodes.

    x = 2 · pixel - 1,  with pixels in [0, 1], on a grid that the autoencoder divides evenly

Checked against ``diffusers.image_processor.VaeImageProcessor.preprocess``.
"""

import logging
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

logger = logging.getLogger("minidiff")


def to_tensor(image: Any, f: int, latent_channels: int) -> Tensor:
    """Turn pictures into pixels (B, 3, H, W) in [-1, 1]; latents (B, C, h, w) pass through.

    Args:
        image: an RGB picture of PIL; a tensor (B, 3, H, W) or (3, H, W) in [0, 1], or in [-1, 1] if it has values
            below 0; latents (B, ``latent_channels``, h, w); or a list of pictures or of tensors. A list of pictures
            takes the size of its first.
        f: pixels per latent; sides that it does not divide are made smaller.

    Raises:
        TypeError, ValueError: for anything else.
    """
    images = image if isinstance(image, list) else [image]
    if images and all(isinstance(one, Image.Image) for one in images):
        x = _from_pil(images, f)
    elif images and all(isinstance(one, Tensor) for one in images):
        x = _stacked(images)
        if x.shape[1] == latent_channels:
            return x
        x = _fitted(x, f)
    else:
        kinds = ", ".join(dict.fromkeys(type(one).__name__ for one in images)) or "an empty list"
        raise TypeError(f"image should be a PIL picture, a tensor, or a list of one of them, found {kinds}")
    if x.min() < 0:  # never of a PIL picture
        logger.warning("image has values below 0 and is taken to be in [-1, 1]; pictures are expected in [0, 1]")
        return x
    return 2.0 * x - 1.0


def _from_pil(images: list[Image.Image], f: int) -> Tensor:
    """Return pictures (B, 3, H, W) in [0, 1]."""
    for picture in images:
        if picture.mode != "RGB":
            raise ValueError(f"image should be an RGB picture, found mode {picture.mode}: use image.convert('RGB')")
    size = tuple(side - side % f for side in images[0].size)
    if 0 in size:
        raise ValueError(f"image should be at least {f} pixels wide and high, found {images[0].size}")
    pixels = [np.asarray(picture.resize(size, Image.Resampling.LANCZOS), dtype=np.float32) for picture in images]
    return torch.from_numpy(np.stack(pixels) / 255.0).permute(0, 3, 1, 2)


def _stacked(tensors: list[Tensor]) -> Tensor:
    """Return tensors (C, H, W) or (B, C, H, W) as one batch."""
    ranks = {one.ndim for one in tensors}
    if ranks not in ({3}, {4}):
        shapes = ", ".join(str(tuple(one.shape)) for one in tensors)
        raise ValueError(f"image should be (C, H, W) or (B, C, H, W), found {shapes}")
    return torch.cat(tensors) if ranks == {4} else torch.stack(tensors)


def _fitted(x: Tensor, f: int) -> Tensor:
    """Check pictures (B, 3, H, W) and drop rows and columns, spread evenly, until f divides the sides."""
    H, W = x.shape[-2:]
    if x.shape[1] != 3 or min(H, W) < f:
        raise ValueError(f"image should be (B, 3, H, W) with sides of at least {f}, or latents, found {tuple(x.shape)}")
    if not x.is_floating_point() or not (x.min() >= -1 and x.max() <= 1):  # NaN is in no range
        raise ValueError(
            f"image should be a floating tensor in [0, 1] or [-1, 1], found {x.dtype} from {x.min().item():g} to "
            f"{x.max().item():g}"
        )
    return F.interpolate(x, size=(H - H % f, W - W % f)) if H % f or W % f else x
