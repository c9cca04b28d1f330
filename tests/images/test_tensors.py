"""minidiff.images.tensors against diffusers' VaeImageProcessor and make_image_grid, bit for bit."""

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff import make_image_grid
from minidiff.images.tensors import read_metadata, save_png, to_numpy, to_pil, to_unit
from tests.theirs import diffusers

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def decoded(dtype: torch.dtype, channels: int = 3, batch: int = 2) -> torch.Tensor:
    """Decoder output beyond [-1, 1], and with every pixel value k/255 and every tie between two of them."""
    x = torch.randn(batch, channels, 16, 32).double()
    x[0, 0] = torch.arange(512).view(16, 32) / 255 - 1  # k/510: 0, 1/2, 1, 3/2 ... of a level
    return x.to(dtype)


def reference(x: torch.Tensor, output_type: str) -> object:
    return diffusers.image_processor.VaeImageProcessor().postprocess(x, output_type=output_type)


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_unit(dtype):
    x = decoded(dtype)
    ours, theirs = to_unit(x), reference(x, "pt")
    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_numpy(dtype):
    x = decoded(dtype)
    ours, theirs = to_numpy(x), reference(x, "np")
    assert ours.dtype == theirs.dtype == np.float32 and np.array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_to_pil(dtype, channels, mode):
    x = decoded(dtype, channels)
    ours, theirs = to_pil(x), reference(x, "pil")
    assert [image.mode for image in ours] == [mode] * 2
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("convert", [to_unit, to_numpy, to_pil])
def test_broken_pixels_name_the_picture_and_the_fix(value, convert):
    x = torch.zeros(3, 3, 4, 4, dtype=torch.float16)
    x[1, 2, 3, 3] = value
    with pytest.raises(ValueError, match=r"pictures \[1\] of 3 .* torch.float16.*decode in float32 or bfloat16"):
        convert(x)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(B, C, H, W\), found \(3, 8, 8\)"):
        to_pil(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"1, 3 or 4 channels, found 2"):
        to_pil(torch.zeros(1, 2, 8, 8))


@pytest.mark.parametrize("resize", [None, 10])
@pytest.mark.parametrize("rows, cols", [(1, 6), (2, 3), (3, 2)])
def test_grid(rows, cols, resize):
    pictures = to_pil(decoded(torch.float32, batch=4)) + to_pil(decoded(torch.float32, channels=1))
    ours, theirs = (f(pictures, rows, cols, resize) for f in (make_image_grid, diffusers.utils.make_image_grid))
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_grid_cell_is_the_size_of_the_first_picture():
    pictures = [Image.new("RGB", (5, 4), "red"), Image.new("RGB", (7, 9), "blue")]
    ours, theirs = (f(pictures, 2, 1) for f in (make_image_grid, diffusers.utils.make_image_grid))
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("count, rows, cols", [(3, 2, 2), (0, 0, 3), (4, 1, 3)])
def test_grid_of_the_wrong_size_is_refused(count, rows, cols):
    with pytest.raises(ValueError, match=f"{rows} rows and {cols} columns needs {rows * cols} pictures, found {count}"):
        make_image_grid([Image.new("RGB", (2, 2))] * count, rows, cols)


def test_png_round_trip(tmp_path):
    picture = to_pil(decoded(torch.float32))[0]
    metadata = {"prompt": "rouge pomme 🍎 <b>\n\tline two", "negative": "", "seed": 2**63, "guidance": 7.5}
    save_png(picture, tmp_path / "a.png", metadata)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), np.asarray(picture))
    assert read_metadata(tmp_path / "a.png") == {name: str(value) for name, value in metadata.items()}


def test_png_without_metadata(tmp_path):
    save_png(Image.new("L", (2, 2)), tmp_path / "a.png")
    assert read_metadata(tmp_path / "a.png") == {}


@pytest.mark.parametrize("name", ["", "x" * 80, "préfixe 🍎"])
def test_png_chunk_names(tmp_path, name):
    with pytest.raises(ValueError, match="1 to 79 Latin-1 characters"):
        save_png(Image.new("L", (2, 2)), tmp_path / "a.png", {name: "value"})


def test_metadata_of_another_format_is_refused(tmp_path):
    Image.new("L", (2, 2)).save(tmp_path / "a.gif")
    with pytest.raises(ValueError, match="a.gif is a GIF file"):
        read_metadata(tmp_path / "a.gif")
