"""Image to image and inpainting: every bad input raises an error that names it and says what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff import (
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
    VaeImageProcessor,
    load_image,
)
from minidiff.errors import ConfigError
from minidiff.images.processor import mask_tensor, to_tensor
from minidiff.images.regions import crop_region, overlay
from tests.tiny import UNET

PROMPT = "a red heart"
PICTURE = torch.full((1, 3, 32, 32), 0.5)
MASK = torch.ones(1, 1, 32, 32)
PIL = Image.new("RGB", (40, 32), "red")
WHITE = Image.new("L", (40, 32), 255)
Wrong = dict[str, tuple[dict[str, Any], type[Exception], str]]


@pytest.fixture(scope="module")
def pipe(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def inpaint(pipe: StableDiffusionPipeline) -> StableDiffusionInpaintPipeline:
    return StableDiffusionInpaintPipeline(**pipe.components | {"unet": unet(9)})


def unet(channels: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(**UNET, in_channels=channels)


IMAGES: Wrong = {
    "no image": ({"image": None}, ValueError, "image to begin with"),
    "a path": ({"image": "cat.png"}, TypeError, "found str"),
    "an empty list": ({"image": []}, TypeError, "found an empty list"),
    "a mixed list": ({"image": [PIL, PICTURE]}, TypeError, "found Image, Tensor"),
    "transparency": ({"image": PIL.convert("RGBA")}, ValueError, r"mode RGBA: use image.convert\('RGB'\)"),
    "grey": ({"image": [PIL, PIL.convert("L")]}, ValueError, "mode L: use"),
    "a palette": ({"image": PIL.convert("P")}, ValueError, "mode P: use"),
    "too small": ({"image": PIL.resize((3, 32))}, ValueError, r"at least 4 pixels wide and high, found \(3, 32\)"),
    "array with transparency": ({"image": np.zeros((32, 32, 4))}, ValueError, r"\(H, W, 3\).*found \(32, 32, 4\)"),
    "a flat array": ({"image": np.zeros((32, 32))}, ValueError, r"\(H, W, 3\).*found \(32, 32\)"),
    "channels first in an array": ({"image": np.zeros((8, 32, 32))}, ValueError, r"found \(8, 32, 32\)"),
    "channels last in a tensor": ({"image": torch.zeros(32, 32, 3)}, ValueError, r"found \(3, 32\)"),
    "five channels": ({"image": torch.zeros(1, 5, 32, 32)}, ValueError, r"\(B, 3, H, W\), or latents \(B, 4, h, w\)"),
    "a flat tensor": ({"image": torch.zeros(32, 32)}, ValueError, r"found \(32, 32\)"),
    "tensors of two sizes": ({"image": [PICTURE[0], PICTURE[0, :, :16]]}, ValueError, "all of one size; found"),
    "pixels to 255": ({"image": PICTURE * 510}, ValueError, "from 255 to 255; divide pixels of 0 to 255 by 255"),
    "bytes": ({"image": np.zeros((32, 32, 3), np.uint8)}, ValueError, "torch.uint8 from 0 to 0; divide"),
    "integers": ({"image": PICTURE.long()}, ValueError, "should be floating, found torch.int64"),
    "NaN": ({"image": PICTURE * float("nan")}, ValueError, "NaN or infinity"),
    "NaN latents": ({"image": torch.full((1, 4, 8, 8), torch.nan)}, ValueError, "latents.*NaN or infinity"),
    "images that do not go round": (
        {"image": PICTURE.repeat(2, 1, 1, 1), "num_images_per_prompt": 3},
        ValueError,
        "2 images cannot be dealt out to 3 pictures",
    ),
    "more images than pictures": ({"image": PICTURE.repeat(2, 1, 1, 1)}, ValueError, "2 images cannot be dealt out"),
    "strength above one": ({"strength": 1.1}, ValueError, "strength.*1.1"),
    "strength below zero": ({"strength": -0.1}, ValueError, "strength.*-0.1"),
    "strength not a number": ({"strength": "0.5"}, TypeError, "strength.*'0.5'"),
    "NaN strength": ({"strength": float("nan")}, ValueError, "strength.*nan"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_wrong_arguments_of_image_to_image(pipe: StableDiffusionPipeline, name: str) -> None:
    arguments, error, message = IMAGES[name]
    with pytest.raises(error, match=message):
        StableDiffusionImg2ImgPipeline(**pipe.components)(
            **{"prompt": PROMPT, "image": PICTURE, "num_inference_steps": 4, **arguments}
        )


@pytest.mark.parametrize("name", ["height", "latents", "guidance_rescale", "ip_adapter_image", "mask_image"])
def test_arguments_that_image_to_image_does_not_have(pipe: StableDiffusionPipeline, name: str) -> None:
    other = StableDiffusionImg2ImgPipeline(**pipe.components)
    value = {"height": 32, "guidance_rescale": 0.5}.get(name, torch.zeros(1, 4, 8, 8))
    with pytest.raises(TypeError, match=f"does not implement the argument.*{name}"):
        other(PROMPT, PICTURE, **{name: value})
    if name in ("height", "latents", "guidance_rescale"):
        with pytest.raises(TypeError, match=f"takes no {name}"):
            other.steps(PROMPT, PICTURE, **{name: value})


def test_strength_that_leaves_no_step(pipe: StableDiffusionPipeline, inpaint: StableDiffusionInpaintPipeline) -> None:
    """PNDM alone takes its one evaluation more in image-to-image; inpainting refuses, as in the reference."""
    other = StableDiffusionImg2ImgPipeline(**pipe.components)
    options = {"num_inference_steps": 5, "strength": 0.19, "output_type": "latent"}
    assert len(list(other.steps(PROMPT, PICTURE, strength=0.19, num_inference_steps=5))) == 1
    with pytest.raises(ValueError, match="strength=0.19 of 5 steps leaves no step to take.*at least 0.2, or for more"):
        inpaint(PROMPT, PICTURE, MASK, **options)


INPAINTING: Wrong = {
    "no image": ({"image": None}, ValueError, "image to begin with"),
    "no mask": ({"mask_image": None}, ValueError, "needs a mask_image: white is repainted"),
    "a colour mask": ({"mask_image": PICTURE}, ValueError, "one channel.*found 3 channels"),
    "a mask like latents": ({"mask_image": torch.zeros(1, 4, 8, 8)}, ValueError, "found 4 channels"),
    "NaN in the mask": ({"mask_image": MASK * float("nan")}, ValueError, "NaN or infinity"),
    "a mask of complex numbers": ({"mask_image": MASK + 0j}, ValueError, "floating, found torch.complex64"),
    "a mask of no pixels": (
        {"mask_image": Image.new("L", (64, 0))},
        ValueError,
        "has no pixels: its size is",
    ),
    "a path": ({"mask_image": "mask.png"}, TypeError, "found str"),
    "masks that do not go round": (
        {"mask_image": MASK.repeat(2, 1, 1, 1), "num_images_per_prompt": 3},
        ValueError,
        "2 masks cannot be dealt out to 3 pictures",
    ),
    "masks that do not fit the images": (
        {"image": PICTURE.repeat(3, 1, 1, 1), "mask_image": MASK.repeat(2, 1, 1, 1), "num_images_per_prompt": 6},
        ValueError,
        "2 masks and 3 images",
    ),
    "an array of colours": ({"mask_image": np.zeros((32, 32, 3))}, ValueError, "32 masks cannot be dealt out to 1"),
    "a size off the grid": ({"height": 30}, ValueError, "height should be divisible by 4, found 30"),
    "latents of another size": (
        {"image": torch.zeros(1, 4, 9, 8), "masked_image_latents": torch.zeros(1, 4, 8, 8)},
        ValueError,
        r"latents of an image should be \(B, C, 8, 8\), found \(1, 4, 9, 8\)",
    ),
    "latents without masked latents": ({"image": torch.zeros(1, 4, 8, 8)}, ValueError, "pass masked_image_latents"),
    "masked latents of another size": (
        {"masked_image_latents": torch.zeros(1, 4, 8, 9)},
        ValueError,
        r"masked_image_latents should be \(B, 4, 8, 8\), found \(1, 4, 8, 9\)",
    ),
    "masked latents of other channels": (
        {"masked_image_latents": torch.zeros(1, 2, 8, 8)},
        ValueError,
        r"masked_image_latents should be \(B, 4, 8, 8\), found \(1, 2, 8, 8\)",
    ),
    "noise of another size": ({"latents": torch.zeros(1, 4, 9, 8)}, ValueError, r"latents should be \(1, 4, 8, 8\)"),
    "crop of a tensor": ({"padding_mask_crop": 4}, ValueError, "image should be a PIL picture, found Tensor"),
    "crop by a tensor": ({"padding_mask_crop": 4, "image": PIL}, ValueError, "mask_image should be a PIL picture"),
    "crop of two sizes": (
        {"padding_mask_crop": 4, "image": PIL, "mask_image": WHITE.resize((32, 32))},
        ValueError,
        r"one size, found \(40, 32\) and \(32, 32\)",
    ),
    "crop by nothing": (
        {"padding_mask_crop": 4, "image": PIL, "mask_image": WHITE.point(lambda _: 0)},
        ValueError,
        "black all over",
    ),
    "crop to an array": (
        {"padding_mask_crop": 4, "image": PIL, "mask_image": WHITE, "output_type": "np"},
        ValueError,
        "output_type should be 'pil', found 'np'",
    ),
    "crop below zero": (
        {"padding_mask_crop": -1, "image": PIL, "mask_image": WHITE},
        ValueError,
        "0 or more, found -1",
    ),
    "guidance_rescale": ({"guidance_rescale": 0.5}, TypeError, "does not implement.*guidance_rescale"),
    "unknown callback tensor": ({"callback_on_step_end_tensor_inputs": ["noise"]}, ValueError, "mask.*found 'noise'"),
}


@pytest.mark.parametrize("name", INPAINTING)
def test_wrong_arguments_of_inpainting(inpaint: StableDiffusionInpaintPipeline, name: str) -> None:
    arguments, error, message = INPAINTING[name]
    with pytest.raises(error, match=message):
        inpaint(**{"prompt": PROMPT, "image": PICTURE, "mask_image": MASK, "num_inference_steps": 4, **arguments})


def test_unets_of_other_tasks(pipe: StableDiffusionPipeline, inpaint: StableDiffusionInpaintPipeline) -> None:
    """The error names the pipeline that such a UNet belongs to."""
    for cls in (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline):
        with pytest.raises(ConfigError, match="found in_channels 9.*use StableDiffusionInpaintPipeline"):
            cls(**inpaint.components)
    with pytest.raises(ConfigError, match="in_channels 4 or 9 and out_channels 4, found in_channels 5"):
        StableDiffusionInpaintPipeline(**pipe.components | {"unet": unet(5)})


def test_autoencoders_of_other_kinds(folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AsymmetricAutoencoderKL"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="vae is diffusers.AsymmetricAutoencoderKL, which minidiff does not"):
        StableDiffusionInpaintPipeline.from_pretrained(tmp_path)


def test_pixels_without_an_autoencoder(pipe: StableDiffusionPipeline) -> None:
    other = StableDiffusionImg2ImgPipeline(**pipe.components | {"vae": None})
    with pytest.raises(ValueError, match="has no vae: pass latents as image"):
        other(PROMPT, PICTURE, output_type="latent")
    options = {"num_inference_steps": 2, "output_type": "latent", "seed": 0}
    assert other(PROMPT, torch.ones(1, 4, 8, 8), **options).images.shape == (1, 4, 8, 8)


def test_pipelines_from_pipelines(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(TypeError, match="on the class that the new pipeline is to have"):
        DiffusionPipeline.from_pipe(pipe)
    with pytest.raises(TypeError, match="StableDiffusionImg2ImgPipeline got unknown arguments surprise"):
        StableDiffusionImg2ImgPipeline.from_pipe(pipe, surprise=1)
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no text_encoder_2, tokenizer_2"):
        StableDiffusionXLImg2ImgPipeline.from_pipe(pipe)
    with pytest.raises(ValueError, match="torch_dtype='int8' is not one of"):
        StableDiffusionImg2ImgPipeline.from_pipe(pipe, torch_dtype="int8")


FUNCTIONS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "two conversions": (
        lambda: VaeImageProcessor(do_convert_rgb=True, do_convert_grayscale=True),
        ValueError,
        "do_convert_rgb and do_convert_grayscale",
    ),
    "another filter": (lambda: VaeImageProcessor(resample="box"), ValueError, "resample.*lanczos.*'box'"),
    "another way to fit": (
        lambda: VaeImageProcessor().preprocess(PIL, resize_mode="stretch"),
        ValueError,
        "resize_mode.*fill.*'stretch'",
    ),
    "a tensor to fill": (
        lambda: VaeImageProcessor().preprocess(PICTURE, resize_mode="fill"),
        ValueError,
        "resize_mode and crops_coords are for PIL",
    ),
    "no height": (lambda: to_tensor(PIL, 8, 4, height=0), ValueError, "height should be at least 1"),
    "height not a number": (lambda: mask_tensor(WHITE, 8, 32.0, 32), TypeError, "height should be an integer"),
    "pictures of two modes": (
        lambda: VaeImageProcessor().preprocess([PIL, WHITE]),
        ValueError,
        r"one mode and size, found \[\('L', 40, 32\), \('RGB', 40, 32\)\]",
    ),
    "NaN to show": (lambda: VaeImageProcessor().postprocess(PICTURE * float("nan")), ValueError, "NaN or infinity"),
    "another output": (lambda: VaeImageProcessor().postprocess(PICTURE, "jpeg"), ValueError, "output_type.*'jpeg'"),
    "flags for one": (lambda: VaeImageProcessor().postprocess(PICTURE, "pt", [True] * 2), ValueError, "do_denormalize"),
    "a black mask": (lambda: crop_region(WHITE.point(lambda _: 0), 32, 32), ValueError, "black all over"),
    "two sizes": (lambda: overlay(WHITE, PIL, PIL.resize((8, 8))), ValueError, r"one size.*\(8, 8\)"),
    "no such file": (lambda: load_image("nowhere.png"), ValueError, "nowhere.png is not a file, nor an address"),
    "another protocol": (lambda: load_image("ftp://example.org/a.png"), ValueError, "http:// or https://"),
    "not a picture": (lambda: load_image(__file__), ValueError, "is not a picture that can be read"),
    "not a source": (lambda: load_image(3), ValueError, "found int"),
    "nobody there": (
        lambda: load_image("http://127.0.0.1:9/a.png"),
        OSError,
        "could not load http://127.0.0.1:9/a.png",
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_wrong_arguments_of_functions(name: str) -> None:
    call, error, message = FUNCTIONS[name]
    with pytest.raises(error, match=message):
        call()
