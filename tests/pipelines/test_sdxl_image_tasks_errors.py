"""Wrong arguments and wrong UNets of SDXL inpainting and of the editing pipelines: each its own clear error."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import minidiff
from minidiff import AutoencoderKL, UNet2DConditionModel
from minidiff.errors import ConfigError
from tests.tiny import UNET, save_tiny
from tests.tiny_xl import BASE_UNET, save_base, save_refiner

PROMPT = "a red heart"
PICTURE, MASK = torch.zeros(1, 3, 32, 32), torch.ones(1, 1, 32, 32)
LATENTS = torch.zeros(1, 4, 8, 8)
CROP = {"image": Image.new("RGB", (40, 40)), "mask_image": Image.new("L", (40, 40), 255), "padding_mask_crop": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The components of a tiny SDXL."""
    return minidiff.DiffusionPipeline.from_pretrained(save_base(tmp_path_factory.mktemp("base"))).components


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The components of a tiny Stable Diffusion 1.x."""
    return minidiff.DiffusionPipeline.from_pretrained(save_tiny(tmp_path_factory.mktemp("sd"))).components


def built(name: str, parts: dict[str, Any], unet: dict[str, Any], channels: int) -> Any:
    """Make the pipeline of this name with a UNet of so many channels."""
    parts = dict(parts) | {"unet": UNet2DConditionModel(**{**unet, "in_channels": channels})}
    if name.startswith("StableDiffusionXLInstruct"):
        parts = {part: parts[part] for part in parts if part not in ("image_encoder", "feature_extractor")}
    pipe = getattr(minidiff, name)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def inpaint(base: dict[str, Any]) -> Any:
    return built("StableDiffusionXLInpaintPipeline", base, BASE_UNET, 4)


@pytest.fixture(scope="module")
def edit(sd: dict[str, Any]) -> Any:
    return built("StableDiffusionInstructPix2PixPipeline", sd, UNET, 8)


@pytest.fixture(scope="module")
def edit_xl(base: dict[str, Any]) -> Any:
    return built("StableDiffusionXLInstructPix2PixPipeline", base, BASE_UNET, 8)


Wrong = dict[str, tuple[dict[str, Any], type[Exception], str]]
WRONG: Wrong = {
    "no image": ({"image": None}, ValueError, "needs an image"),
    "no image but latents": ({"image": None, "latents": LATENTS}, ValueError, "needs an image"),
    "no mask": ({"mask_image": None}, ValueError, "needs a mask_image: white is repainted"),
    "mask of three channels": ({"mask_image": PICTURE}, ValueError, "mask_image should have one channel"),
    "mask that is a path": ({"mask_image": "mask.png"}, TypeError, "found str"),
    "image with transparency": ({"image": Image.new("RGBA", (32, 32))}, ValueError, "mode RGBA.*convert"),
    "image of a palette": ({"image": Image.new("P", (32, 32))}, ValueError, "mode P.*convert"),
    "grey image": ({"image": Image.new("L", (32, 32))}, ValueError, "mode L.*convert"),
    "too many images": ({"image": PICTURE.repeat(2, 1, 1, 1)}, ValueError, "2 images cannot be dealt out to 1 picture"),
    "too many masks": (
        {"mask_image": MASK.repeat(2, 1, 1, 1)},
        ValueError,
        "2 masks cannot be dealt out to 1 pict",
    ),
    "three masks for two images": (
        {"image": PICTURE.repeat(2, 1, 1, 1), "mask_image": MASK.repeat(3, 1, 1, 1), "num_images_per_prompt": 6},
        ValueError,
        "3 masks and 2 images: give one mask, one image",
    ),
    "latents of another size": ({"image": torch.zeros(1, 4, 9, 8)}, ValueError, r"latents of an image.*\(B, C, 8, 8\)"),
    "noise of another size": ({"latents": torch.zeros(1, 4, 9, 8)}, ValueError, r"latents should be \(1, 4, 8, 8\)"),
    "masked latents of another size": (
        {"masked_image_latents": torch.zeros(1, 4, 9, 8)},
        ValueError,
        r"masked_image_latents should be \(B, 4, 8, 8\), found \(1, 4, 9, 8\)",
    ),
    "height that is not divisible": ({"height": 30}, ValueError, "height should be divisible by 4, found 30"),
    "strength above one": ({"strength": 1.1}, ValueError, "strength.*1.1"),
    "strength that leaves no step": ({"strength": 0.1}, ValueError, "strength=0.1 of 4 steps leaves no step"),
    "start after the last step": ({"denoising_start": 0.9999}, ValueError, "denoising_start=0.9999 of 4 steps"),
    "start after the end": ({"denoising_start": 0.8, "denoising_end": 0.5}, ValueError, "found 0.8 and 0.5"),
    "start and noise": ({"denoising_start": 0.5, "latents": LATENTS}, ValueError, "denoising_start.*or latents"),
    "crop of tensors": ({"padding_mask_crop": 3}, ValueError, "with padding_mask_crop image should be a PIL picture"),
    "crop below zero": (CROP | {"padding_mask_crop": -1}, ValueError, "padding_mask_crop should be a number of pixels"),
    "crop to an array": (CROP | {"output_type": "np"}, ValueError, "output_type should be 'pil', found 'np'"),
    "crop around nothing": (CROP | {"mask_image": Image.new("L", (40, 40))}, ValueError, "black all over"),
    "crop of two sizes": (CROP | {"mask_image": Image.new("L", (40, 41), 255)}, ValueError, "should have one size"),
    "score not a number": ({"aesthetic_score": "high"}, TypeError, "aesthetic_score should be a number"),
    "not implemented": (
        {"ip_adapter_image": object()},
        TypeError,
        "StableDiffusionXLInpaintPipeline.*ip_adapter_image",
    ),
    "unknown": ({"callback_step": 1}, TypeError, "callback_step"),
    "callback tensor": ({"callback_on_step_end_tensor_inputs": ["image_latents"]}, ValueError, "image_latents"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_of_inpainting(inpaint: Any, name: str) -> None:
    arguments, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        inpaint(**{"prompt": PROMPT, "image": PICTURE, "mask_image": MASK, "num_inference_steps": 4, **arguments})


def test_latents_cannot_be_masked(base: dict[str, Any]) -> None:
    pipe = built("StableDiffusionXLInpaintPipeline", base, BASE_UNET, 9)
    with pytest.raises(ValueError, match="pass masked_image_latents too"):
        pipe(PROMPT, image=LATENTS, mask_image=MASK, num_inference_steps=2)


WRONG_EDITS: Wrong = {
    "no image": ({"image": None}, ValueError, "an edit needs an image"),
    "a path": ({"image": "cat.png"}, TypeError, "found str"),
    "image with transparency": ({"image": Image.new("RGBA", (32, 32))}, ValueError, "mode RGBA.*convert"),
    "too many images": ({"image": PICTURE.repeat(2, 1, 1, 1)}, ValueError, "2 images cannot be dealt out to 1 picture"),
    "negative scale": ({"image_guidance_scale": -1.0}, ValueError, "image_guidance_scale.*-1"),
    "scale not a number": ({"image_guidance_scale": "1.5"}, TypeError, "image_guidance_scale should be a number"),
    "NaN scale": ({"image_guidance_scale": float("nan")}, ValueError, "image_guidance_scale.*nan"),
    "noise of another size": ({"latents": torch.zeros(1, 4, 9, 8)}, ValueError, r"latents should be \(1, 4, 8, 8\)"),
    "strength": ({"strength": 0.5}, TypeError, "does not implement.*strength"),
    "another callback": ({"call_back": print}, TypeError, "does not implement.*call_back"),
    "callback tensor": ({"callback_on_step_end_tensor_inputs": ["mask"]}, ValueError, "mask"),
}


@pytest.mark.parametrize("family", ["edit", "edit_xl"])
@pytest.mark.parametrize("name", WRONG_EDITS)
def test_wrong_arguments_of_edits(request: pytest.FixtureRequest, name: str, family: str) -> None:
    pipe = request.getfixturevalue(family)
    arguments, error, message = WRONG_EDITS[name]
    with pytest.raises(error, match=message):
        pipe(**{"prompt": PROMPT, "image": PICTURE, "num_inference_steps": 2, **arguments})


def test_sizes_of_edits(edit: Any, edit_xl: Any) -> None:
    with pytest.raises(TypeError, match="height"):
        edit(PROMPT, PICTURE, height=32)
    with pytest.raises(TypeError, match="no height and width: the result has the size of the image"):
        edit.steps(PROMPT, image=PICTURE, height=32)
    with pytest.raises(ValueError, match=r"should be \(8, 8\) high and wide for \(32, 32\) pixels, found \(9, 8\)"):
        edit_xl(PROMPT, image=torch.zeros(1, 4, 9, 8), num_inference_steps=2)
    with pytest.raises(TypeError, match="takes no negative sizes"):
        edit_xl.steps(PROMPT, image=PICTURE, negative_target_size=(8, 8))
    with pytest.raises(ConfigError, match="is_cosxl_edit=True needs a vae"):
        type(edit_xl)(**{**edit_xl.components, "vae": None}, is_cosxl_edit=True)


def test_image_to_image_has_the_size_of_its_image(base: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="takes no height: the picture gets the size of the image"):
        minidiff.StableDiffusionXLImg2ImgPipeline(**base).steps(PROMPT, image=PICTURE, height=32)


# --- which UNet belongs to which pipeline ----------------------------------------------------------------------------

TASKS = {  # the end of a pipeline's name -> the channels of the UNets that it takes
    "Pipeline": [4],
    "Img2ImgPipeline": [4],
    "InpaintPipeline": [4, 9],
    "InstructPix2PixPipeline": [8],
}
OWNERS = {4: "Pipeline", 8: "InstructPix2PixPipeline", 9: "InpaintPipeline"}


@pytest.mark.parametrize("family", ["StableDiffusion", "StableDiffusionXL"])
@pytest.mark.parametrize("task", TASKS)
def test_every_pipeline_names_the_one_that_a_unet_is_for(
    base: dict[str, Any], sd: dict[str, Any], family: str, task: str
) -> None:
    parts, unet = (base, BASE_UNET) if family.endswith("XL") else (sd, UNET)
    for channels, owner in OWNERS.items():
        if channels in TASKS[task]:
            assert type(built(family + task, parts, unet, channels)).__name__ == family + task
            continue
        expected = " or ".join(map(str, TASKS[task]))
        found = rf"{family}{task}: .* in_channels {expected} .*found in_channels {channels} .*use {family}{owner}$"
        with pytest.raises(ConfigError, match=found):
            built(family + task, parts, unet, channels)
    with pytest.raises(ConfigError, match="found in_channels 7 .*no pipeline of minidiff takes this UNet"):
        built(family + task, parts, unet, 7)


def test_a_unet_without_its_vae_is_checked_too(sd: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="use StableDiffusionInpaintPipeline"):
        built("StableDiffusionPipeline", {**sd, "vae": None}, UNET, 9)


def test_an_overflow_in_float16_is_said_and_the_upcast_avoids_it(base: dict[str, Any]) -> None:
    """These latents are finite in float16, but not once they are divided by the scaling factor."""
    latents = (5000 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))).half()
    pictures = []
    for dtype, upcast in ((torch.float16, False), (torch.float16, True), (torch.float32, False)):
        vae = AutoencoderKL.from_config(base["vae"].config, force_upcast=upcast)
        vae.load_state_dict({name: tensor.half().float() for name, tensor in base["vae"].state_dict().items()})
        pipe = minidiff.StableDiffusionXLInpaintPipeline(**{**base, "vae": vae.to(dtype)})
        if (dtype, upcast) == (torch.float16, False):
            with pytest.raises(
                ValueError, match=r"NaN or infinity: layer \S+ overflows in torch.float16; try pipe.vae.to\("
            ):
                pipe.decode(latents)
        else:
            pictures.append(pipe.decode(latents, "pt"))
    assert torch.equal(*pictures)


def test_a_refiner_takes_what_it_shares_from_base(base: dict[str, Any], tmp_path: Path) -> None:
    """Components that are passed in are not loaded: their files need not be there."""
    folder = save_refiner(tmp_path / "refiner")
    for name in ("text_encoder_2", "vae"):
        shutil.rmtree(folder / name)
    shared = {name: base[name] for name in ("text_encoder_2", "vae")}
    for cls in (minidiff.StableDiffusionXLImg2ImgPipeline, minidiff.StableDiffusionXLInpaintPipeline):
        refiner = cls.from_pretrained(folder, **shared)
        assert all(getattr(refiner, name) is component for name, component in shared.items())
    with pytest.raises(OSError, match="text_encoder_2|vae"):
        minidiff.StableDiffusionXLImg2ImgPipeline.from_pretrained(folder)
