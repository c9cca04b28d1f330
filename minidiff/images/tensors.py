"""Pictures as the world knows them: tensors of a decoder in [-1, 1] to NumPy, PIL and PNG files, and grids of them.

    pixel = round(255 · clamp(x / 2 + 1/2, 0, 1)),  halves to the even number

Checked bit for bit against ``diffusers.image_processor.VaeImageProcessor`` and, from ``diffusers.utils``,
``make_image_grid`` and ``load_image``.
"""

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from minidiff.atomic import write_file

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # of files that are opened
Images = list[Image.Image] | np.ndarray | Tensor  # what pipelines return, by their ``output_type``


def to_unit(x: Tensor) -> Tensor:
    """Map decoded pixels from [-1, 1] to [0, 1], in the dtype and on the device of ``x``.

    ``x``: (B, C, H, W). Raises ``ValueError`` naming the pictures that hold NaN or infinity: they would come out black.
    """
    if x.ndim != 4:
        raise ValueError(f"pictures are a tensor of shape (B, C, H, W), found {tuple(x.shape)}")
    broken = (~x.isfinite()).flatten(1).any(1)
    if broken.any():
        which = broken.nonzero().flatten().tolist()
        raise ValueError(
            f"pictures {which} of {len(x)} hold NaN or infinity after decoding in {x.dtype}. In float16 the decoder "
            "overflows: decode in float32 or bfloat16 (`pipe.vae.to(torch.float32)`)."
        )
    return (x * 0.5 + 0.5).clamp(0, 1)


def to_numpy(x: Tensor) -> np.ndarray:
    """Map decoded pixels (B, C, H, W) in [-1, 1] to a float32 array (B, H, W, C) in [0, 1]. Raises as ``to_unit``."""
    return as_array(to_unit(x))


def as_array(images: Tensor) -> np.ndarray:
    """Return pixels (B, C, H, W) as a float32 array (B, H, W, C), in the range that they have."""
    return images.permute(0, 2, 3, 1).float().cpu().numpy()


def to_pil(x: Tensor) -> list[Image.Image]:
    """Turn decoded pixels (B, C, H, W) in [-1, 1] into B pictures, C = 1 grey, 3 RGB, 4 RGBA. Raises as ``to_unit``."""
    if x.ndim == 4 and x.shape[1] not in (1, 3, 4):
        raise ValueError(f"pictures have 1, 3 or 4 channels, found {x.shape[1]} in a tensor of shape {tuple(x.shape)}")
    return as_pictures(to_numpy(x))


def as_pictures(images: np.ndarray) -> list[Image.Image]:
    """Turn pixels (B, H, W, C) in [0, 1] into B pictures, C = 1 grey, 3 RGB, 4 RGBA; of (H, W, C) make one."""
    pixels = ((images if images.ndim == 4 else images[None]) * 255).round().astype(np.uint8)
    return [Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture) for picture in pixels]


def load_image(
    image: str | Path | Image.Image, convert_method: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image:
    """Return a picture from a file or an http(s) address, or a copy of a PIL picture, upright and in RGB.

    Cameras write pictures as the sensor lies, with a note which side is up; that note is followed. ``convert_method``
    replaces the conversion to RGB. Formats are ``FORMATS``: for others, such as EPS, PIL may start a program.

    Raises:
        ValueError: if there is no such file, or it is no picture.
        OSError: if the address does not answer.
    """
    if isinstance(image, Image.Image):
        picture = ImageOps.exif_transpose(image)
    elif not isinstance(image, (str, Path)):
        raise ValueError(f"load_image takes a path, an http(s) address or a PIL picture, found {type(image).__name__}")
    else:
        source = io.BytesIO(_download(image)) if str(image).startswith(("http://", "https://")) else image
        if source is image and not os.path.isfile(image):
            raise ValueError(f"{image} is not a file, nor an address that begins with http:// or https://")
        picture = ImageOps.exif_transpose(_opened(source, image))
    return picture.convert("RGB") if convert_method is None else convert_method(picture)


def _opened(source: str | Path | io.BytesIO, name: str | Path) -> Image.Image:
    """Read a picture; what is called ``name`` in the error, if it is none."""
    try:
        with Image.open(source, formats=FORMATS) as picture:
            picture.load()
            return picture
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # a SyntaxError in the file
        raise ValueError(f"{name} is not a picture that can be read ({', '.join(FORMATS)}): {error}") from error


def _download(url: str) -> bytes:
    import urllib.request  # brings ssl

    request = urllib.request.Request(url, headers={"User-Agent": "minidiff"})  # some servers refuse urllib's own name
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read()
    except OSError as error:
        raise OSError(f"could not load {url}: {error}") from error


def make_image_grid(images: Sequence[Image.Image], rows: int, cols: int, resize: int | None = None) -> Image.Image:
    """Lay ``rows * cols`` pictures out on one RGB sheet, row by row; the first picture's size is the size of a cell.

    ``resize`` makes each picture a square of so many pixels first. Raises ``ValueError`` if the number does not fit.
    """
    if len(images) != rows * cols or not images:
        raise ValueError(f"a grid of {rows} rows and {cols} columns needs {rows * cols} pictures, found {len(images)}")
    if resize is not None:
        images = [image.resize((resize, resize)) for image in images]
    width, height = images[0].size
    grid = Image.new("RGB", (cols * width, rows * height))
    for k, image in enumerate(images):
        row, col = divmod(k, cols)
        grid.paste(image, (col * width, row * height))
    return grid


def save_png(image: Image.Image, path: str | Path, metadata: Mapping[str, object] | None = None) -> None:
    """Write ``image`` as PNG with one text chunk for each entry of ``metadata`` (values as ``str``).

    Raises ``ValueError`` for a name that PNG cannot hold: 1 to 79 characters of Latin-1.
    """
    chunks = PngInfo()
    for name, value in (metadata or {}).items():
        if not 1 <= len(name) <= 79 or not all(ord(character) < 256 for character in name):
            raise ValueError(f"a PNG text chunk is named by 1 to 79 Latin-1 characters, found {name!r}")
        chunks.add_itxt(name, str(value))
    write_file(Path(path), lambda made: image.save(made, format="PNG", pnginfo=chunks))


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the text chunks of a PNG file by name. Raises ``ValueError`` if the file holds another format."""
    image = _opened(path, path)
    if image.format != "PNG":
        raise ValueError(f"{path} is a {image.format} file; metadata is written to PNG files only")
    return dict(image.text)
