"""``CLIPImageProcessor`` bit for bit against transformers' on PIL: every option, every kind of picture, its files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff import CLIPImageProcessor
from minidiff.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from tests.theirs import transformers

CONFIGS = Path(__file__).parents[1] / "data" / "hub_configs"
PUBLISHED = {
    "CompVis--stable-diffusion-v1-4/feature_extractor": {},  # sizes as numbers, CLIPFeatureExtractor
    "lambdalabs--sd-image-variations-diffusers/feature_extractor": {},  # sizes as dicts, both names of its class
}
RANDOM = np.random.default_rng(0)


def picture(mode: str, width: int, height: int) -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(RANDOM.integers(0, 256, shape, dtype=np.uint8))


def with_a_transparent_colour() -> Image.Image:
    palette = picture("RGB", 40, 30).convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    return palette


PICTURES = {
    **{f"{mode} {w}x{h}": picture(mode, w, h) for mode in ("L", "RGB", "RGBA") for w, h in ((1, 1), (7, 13), (51, 20))},
    "grey and alpha": picture("RGBA", 9, 12).convert("LA"),
    "palette": picture("RGB", 50, 40).convert("P"),
    "palette with a transparent colour": with_a_transparent_colour(),
    "black and white": picture("L", 50, 40).convert("1"),
    "array (H, W, 3)": RANDOM.integers(0, 256, (20, 30, 3), dtype=np.uint8),
    "array (3, H, W)": RANDOM.integers(0, 256, (3, 20, 30), dtype=np.uint8),
    "array (H, W, 4)": RANDOM.integers(0, 256, (20, 30, 4), dtype=np.uint8),
    "array (1, H, W), int64": RANDOM.integers(0, 256, (1, 20, 30)),
    "array (3, H, 3)": RANDOM.integers(0, 256, (3, 9, 3), dtype=np.uint8),
    "fractions": RANDOM.random((3, 20, 30)),
    "fractions, RGBA, float32": RANDOM.random((20, 30, 4), dtype=np.float32),
    "whole numbers that are floating": np.round(RANDOM.random((3, 9, 9)) * 255),
    "batch": RANDOM.random((2, 3, 20, 30)),
    "tensor": torch.from_numpy(RANDOM.random((3, 22, 31), dtype=np.float32)),
    "batch of tensors": torch.from_numpy(RANDOM.integers(0, 256, (2, 3, 8, 9), dtype=np.uint8)),
    "list of sizes": [picture("RGB", 9, 14), picture("RGB", 14, 9)],
    "list of batches": [RANDOM.random((2, 3, 8, 9)), RANDOM.random((1, 3, 9, 8))],
    "nested list": [[picture("RGB", 9, 14)], [picture("L", 14, 9)]],
}
SMALL = {"size": 12, "crop_size": 11}
OPTIONS = {
    "SMALL": SMALL,
    "two numbers": {"size": (8, 5), "crop_size": (12, 7)},
    "height and width": {"size": {"height": 9, "width": 20}, "crop_size": {"height": 5, "width": 22}},
    "shortest edge": {"size": {"shortest_edge": 17}, "crop_size": 40},
    "no resize": {"do_resize": False, "crop_size": {"height": 60, "width": 9}},
    "no crop": {"do_center_crop": False, "size": 10},
    "no RGB": {**SMALL, "do_convert_rgb": False, "do_normalize": False},
    "one mean, no RGB": {**SMALL, "do_convert_rgb": False, "image_mean": 0.5, "image_std": 0.25},
    "no rescale": {**SMALL, "do_rescale": False},
    "no normalize": {**SMALL, "do_normalize": False},
    "another factor": {**SMALL, "rescale_factor": 0.01, "image_mean": [0.1, 0.2, 0.3], "image_std": (1, 2, 3)},
    "conversion alone": {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False},
    "normalize alone": {"do_resize": False, "do_center_crop": False, "do_rescale": False},
    **{f"resample {k}": {**SMALL, "resample": k} for k in range(6)},
}


def assert_same(ours: Any, theirs: Any) -> None:
    """Compare ``pixel_values``: dtypes, shapes and every bit."""
    for one, other in zip(ours["pixel_values"], theirs["pixel_values"], strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_with_every_picture(options: str) -> None:
    how = OPTIONS[options]
    ours, theirs = CLIPImageProcessor(**how), transformers.CLIPImageProcessorPil(**how)
    plain = CLIPImageProcessor()
    for images in PICTURES.values():
        try:
            expected = theirs(images)
        except ValueError:  # such as a mean for three channels and a picture of four
            with pytest.raises(ValueError, match=r"channels|should be"):
                ours(images)
            continue
        assert_same(ours(images), expected)
        assert_same(plain(images, **how), expected)  # as arguments of a call


@pytest.mark.parametrize("name", ["RGB 51x20", "RGBA 51x20", "L 7x13"])
def test_the_default_and_the_kinds_of_result(name: str) -> None:
    images = [PICTURES[name]] * 2
    ours, theirs = CLIPImageProcessor(), transformers.CLIPImageProcessor()  # which is that on PIL here
    for kind in ("pt", "np"):
        a, b = ours(images, return_tensors=kind), theirs(images, return_tensors=kind)
        assert type(a.pixel_values) is type(b.pixel_values) and a.pixel_values.shape == (2, 3, 224, 224)
        assert_same(a, b)
    moved = ours.preprocess(images, return_tensors="pt").to("cpu", torch.float64).pixel_values
    assert moved.dtype == torch.float64 and torch.equal(moved.float(), theirs(images, return_tensors="pt").pixel_values)
    assert isinstance(ours(images)["pixel_values"], list)


@pytest.mark.parametrize("folder", PUBLISHED)
def test_published_files(folder: str, tmp_path: Path) -> None:
    ours = CLIPImageProcessor.from_pretrained(CONFIGS / folder)
    theirs = transformers.CLIPImageProcessor.from_pretrained(CONFIGS / folder)
    assert_same(ours(PICTURES["RGB 51x20"]), theirs(PICTURES["RGB 51x20"]))
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    written = [json.loads((tmp_path / name / "preprocessor_config.json").read_text()) for name in ("ours", "theirs")]
    assert written[0] == written[1]
    back = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "ours")
    assert_same(CLIPImageProcessor.from_pretrained(tmp_path / "theirs")(PICTURES["tensor"]), back(PICTURES["tensor"]))


def test_fields_instead_of_those_of_the_file(tmp_path: Path) -> None:
    CLIPImageProcessor(**SMALL).save_pretrained(tmp_path / "here")
    found = CLIPImageProcessor.from_pretrained(tmp_path, subfolder="here", size=20, do_normalize=None)
    assert found.size == {"shortest_edge": 20} and found.crop_size == {"height": 11, "width": 11} and found.do_normalize
    with pytest.raises(CheckpointNotFoundError, match=r"preprocessor_config\.json"):
        CLIPImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is a file"):
        found.save_pretrained(tmp_path / "file")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": {"longest_edge": 5}}, r"size should be a number, two, or have .*found \{'longest_edge': 5\}"),
        ({"size": {"shortest_edge": 5, "longest_edge": 9}}, "size should be"),
        ({"crop_size": {"shortest_edge": 5}}, "crop_size should be"),
        ({"size": 0}, r"size\['shortest_edge'\] should be at least 1"),
        ({"resample": 6}, "resample should be 0 to 5, found 6"),
        ({"do_pad": True}, r"do_pad = true"),
        ({"do_resize": "yes"}, "do_resize should be true or false, found 'yes'"),
        ({"image_processor_type": "ViTImageProcessor"}, "image_processor_type"),
        ({"patch_size": 14}, r"patch_size = 14 \(unknown field\)"),
    ],
)
def test_refused_fields(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises((ConfigError, ValueError), match=message):
        CLIPImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ("picture.png", {}, "found 'picture.png'"),
        (np.zeros((4, 5)), {}, r"found ndarray of shape \(4, 5\)"),
        (np.zeros((5, 4, 6)), {}, r"1, 3 or 4 channels in front or behind, found shape \(5, 4, 6\)"),
        (np.full((3, 4, 4), 300.0), {}, r"whole numbers of 0 to 255 or fractions of \[0, 1\], found 300.0"),
        (np.full((3, 4, 4), 1.5), {}, "found 1.5 to 1.5"),
        (np.full((3, 4, 4), np.nan), {}, "found nan"),
        (np.full((4, 5, 5), 1.5), {}, r"floating RGBA should be in \[0, 1\]"),
        ([], {}, r"found \[\]"),
        (PICTURES["list of sizes"], {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}, "one size"),
        (PICTURES["RGB 7x13"], {"return_tensors": "tf"}, "return_tensors should be"),
    ],
)
def test_refused_pictures(images: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CLIPImageProcessor()(images, **options)


def test_unknown_options_of_a_call() -> None:
    with pytest.raises(TypeError, match="do_padding"):
        CLIPImageProcessor()(PICTURES["RGB 7x13"], do_padding=True)
