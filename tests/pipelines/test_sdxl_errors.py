"""Every wrong argument of a generation with SDXL is its own clear error, before anything is computed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import minidiff
from minidiff import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from minidiff.errors import ConfigError
from minidiff.images.processor import to_tensor
from tests.tiny import UNET
from tests.tiny_xl import BASE_UNET, SECOND, TEXT, save_base, save_refiner

PROMPT = "a red heart"
EMBEDS, POOLED = torch.zeros(1, 77, 40), torch.zeros(1, 20)
PICTURE = torch.zeros(1, 3, 32, 32)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(save_base(tmp_path_factory.mktemp("base")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_refiner(tmp_path_factory.mktemp("refiner"))


@pytest.fixture(scope="module")
def refiner(folder: Path) -> StableDiffusionXLImg2ImgPipeline:
    pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


Wrong = dict[str, tuple[dict[str, Any], type[Exception], str]]
WRONG: Wrong = {
    "no prompt": ({"prompt": None}, ValueError, "either prompt or prompt_embeds"),
    "second prompt of a wrong type": ({"prompt_2": 5}, ValueError, "prompt_2 should be a str or a list.*5"),
    "second prompts too many": ({"prompt_2": ["a", "b"]}, ValueError, "prompt_2 has 2 texts for 1 prompts"),
    "one second prompt for two": ({"prompt": ["a", "b"], "prompt_2": "c"}, ValueError, "prompt_2 has 1 text for 2"),
    "negatives too many": ({"negative_prompt": ["a", "b"]}, ValueError, "negative_prompt has 2 texts for 1 prompts"),
    "second negative alone": ({"negative_prompt_2": "a"}, ValueError, "negative_prompt_2 counts only beside"),
    "embeddings alone": (
        {"prompt": None, "prompt_embeds": EMBEDS},
        ValueError,
        "prompt_embeds and pooled_prompt_embeds",
    ),
    "negative embeddings alone": (
        {"negative_prompt_embeds": EMBEDS},
        ValueError,
        "negative_prompt_embeds and negative_pooled_prompt_embeds together",
    ),
    "second prompt and embeddings": (
        {"prompt": None, "prompt_2": "a", "prompt_embeds": EMBEDS, "pooled_prompt_embeds": POOLED},
        ValueError,
        "either prompt_2 or prompt_embeds",
    ),
    "embeddings of another family": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 77, 768), "pooled_prompt_embeds": POOLED},
        ValueError,
        r"prompt_embeds should be \(B, L, 40\).*768.*SD 1.x",
    ),
    "pooled embeddings of another batch": (
        {"prompt": None, "prompt_embeds": EMBEDS, "pooled_prompt_embeds": torch.zeros(2, 20)},
        ValueError,
        r"pooled_prompt_embeds should be \(1, P\), found \(2, 20\)",
    ),
    "pooled embeddings of another width": (
        {"prompt": None, "prompt_embeds": EMBEDS, "pooled_prompt_embeds": torch.zeros(1, 21)},
        ValueError,
        r"found \(2, 21\) and \(2, 6\)",
    ),
    "size of one number": ({"original_size": 1024}, TypeError, "original_size should be a pair.*1024"),
    "size of three numbers": ({"target_size": (1, 2, 3)}, TypeError, "target_size should be a pair"),
    "size of strings": ({"original_size": ("1024", "1024")}, TypeError, "original_size should be a number"),
    "negative crop": ({"crops_coords_top_left": (-1, 0)}, ValueError, "crops_coords_top_left.*-1"),
    "no crop": ({"crops_coords_top_left": None}, TypeError, "crops_coords_top_left should be a pair"),
    "half of the negative sizes": ({"negative_original_size": (8, 8)}, ValueError, "negative_target_size together"),
    "negative crop alone": ({"negative_crops_coords_top_left": (1, 1)}, ValueError, "counts only beside"),
    "end above one": ({"denoising_end": 1.5}, ValueError, "denoising_end.*1.5"),
    "end of nothing": ({"denoising_end": 0.0}, ValueError, "denoising_end should be above 0"),
    "end before the first step": ({"denoising_end": 0.01}, ValueError, "denoising_end=0.01 leaves nothing to do"),
    "end not a number": ({"denoising_end": "0.8"}, TypeError, "denoising_end should be a number"),
    "clip_skip too large": ({"clip_skip": 3}, ValueError, "clip_skip should be None or 0 to 2, found 3"),
    "start without an image": ({"denoising_start": 0.8}, TypeError, "does not implement.*denoising_start"),
    "unknown output": ({"output_type": "jpeg"}, ValueError, "output_type.*jpeg"),
    "not implemented": ({"ip_adapter_image": object()}, TypeError, "StableDiffusionXLPipeline.*ip_adapter_image"),
    "callback tensor of SD 1": (
        {"callback_on_step_end_tensor_inputs": ["negative_prompt_embeds"]},
        ValueError,
        "negative_prompt_embeds",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(pipe: StableDiffusionXLPipeline, name: str) -> None:
    arguments, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        pipe(**{"prompt": PROMPT, "num_inference_steps": 2, **arguments})


WRONG_IMAGES: Wrong = {
    "no image": ({"image": None}, ValueError, "needs an image"),
    "a path": ({"image": "cat.png"}, TypeError, "found str"),
    "an empty list": ({"image": []}, TypeError, "found an empty list"),
    "a picture with transparency": ({"image": Image.new("RGBA", (32, 32))}, ValueError, "mode RGBA.*convert"),
    "a picture that is too small": ({"image": Image.new("RGB", (3, 32))}, ValueError, r"at least 4.*\(3, 32\)"),
    "five channels": ({"image": torch.zeros(1, 5, 32, 32)}, ValueError, r"\(1, 5, 32, 32\)"),
    "a flat tensor": ({"image": torch.zeros(32, 32)}, ValueError, r"found \(32, 32\)"),
    "pixels to 255": ({"image": PICTURE + 255}, ValueError, "from 255 to 255"),
    "NaN": ({"image": PICTURE * float("nan")}, ValueError, "NaN or infinity"),
    "integers": ({"image": PICTURE.to(torch.uint8)}, ValueError, "torch.uint8"),
    "images that do not go round": (
        {"image": PICTURE.repeat(2, 1, 1, 1), "num_images_per_prompt": 3},
        ValueError,
        "2 images cannot be dealt out to 3 pictures",
    ),
    "latents of another batch": ({"latents": torch.zeros(2, 4, 8, 8)}, ValueError, r"latents should be \(1, 4, h, w\)"),
    "strength above one": ({"strength": 1.1}, ValueError, "strength.*1.1"),
    "strength that leaves no step": ({"strength": 0.1}, ValueError, "strength=0.1 of 4 steps leaves no step"),
    "start after the last step": (
        {"denoising_start": 0.9999},
        ValueError,
        "denoising_start=0.9999 of 4 steps leaves no",
    ),
    "start at the end": ({"denoising_start": 1.0}, ValueError, "denoising_start should be below"),
    "start after the end": ({"denoising_start": 0.8, "denoising_end": 0.5}, ValueError, "found 0.8 and 0.5"),
    "score not a number": ({"aesthetic_score": "high"}, TypeError, "aesthetic_score should be a number"),
    "height": ({"height": 32}, TypeError, "does not implement.*height"),
}


@pytest.mark.parametrize("name", WRONG_IMAGES)
def test_wrong_arguments_of_image_to_image(refiner: StableDiffusionXLImg2ImgPipeline, name: str) -> None:
    arguments, error, message = WRONG_IMAGES[name]
    with pytest.raises(error, match=message):
        refiner(**{"prompt": PROMPT, "image": PICTURE, "num_inference_steps": 4, **arguments})


def test_negative_crop_without_aesthetic_scores(pipe: StableDiffusionXLPipeline) -> None:
    other = StableDiffusionXLImg2ImgPipeline(**pipe.components)
    with pytest.raises(ValueError, match="counts only where requires_aesthetics_score is true"):
        other(PROMPT, image=PICTURE, negative_crops_coords_top_left=(1, 2))


def test_pictures_below_zero_are_said() -> None:
    with pytest.warns(FutureWarning, match=r"taken to be in \[-1, 1\]"):
        assert torch.equal(to_tensor(PICTURE - 0.5, 4, 4), PICTURE - 0.5)


def test_components_that_do_not_fit(pipe: StableDiffusionXLPipeline) -> None:
    """Refused when the pipeline is built, naming both components."""
    vocabulary = pipe.text_encoder.config.vocab_size
    wide = CLIPTextModel({**TEXT, "vocab_size": vocabulary, "hidden_size": 32})
    projected = CLIPTextModelWithProjection({**SECOND, "vocab_size": vocabulary, "projection_dim": 21})
    small = CLIPTextModelWithProjection({**SECOND, "vocab_size": 10})
    for change, message in (
        ({"text_encoder": wide}, r"text encoders and unet do not fit: hidden_size 32 \+ 16.*40"),
        ({"text_encoder": None}, "text encoders and unet do not fit: hidden_size 16 against.*40"),
        ({"text_encoder_2": projected}, "width 68, but projection_dim 21 .* and 6 sizes of width 8 make 69"),
        ({"text_encoder_2": small}, "tokenizer_2 and text_encoder_2 do not fit.*10"),
        ({"unet": UNet2DConditionModel(**UNET)}, "not one of Stable Diffusion XL"),
        ({"unet": UNet2DConditionModel(**{**BASE_UNET, "in_channels": 9})}, "in_channels 9.*inpainting"),
        ({"add_watermarker": True}, "add_watermarker=True is not implemented"),
    ):
        with pytest.raises(ConfigError, match=message):
            StableDiffusionXLPipeline(**{**pipe.components, **change})
    with pytest.raises(ConfigError, match="requires_aesthetics_score"):
        StableDiffusionXLImg2ImgPipeline(**pipe.components, requires_aesthetics_score=True)


def test_a_refiner_is_no_base(folder: Path) -> None:
    with pytest.raises(ConfigError, match="requires_aesthetics_score"):
        StableDiffusionXLPipeline.from_pretrained(folder)


def test_components_that_are_absent(pipe: StableDiffusionXLPipeline) -> None:
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")
    bare = StableDiffusionXLPipeline(**{**pipe.components, **dict.fromkeys(names)})
    bare.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="no text_encoder_2 or tokenizer_2: pass prompt_embeds and pooled"):
        bare(PROMPT, num_inference_steps=2)
    embeds = {"prompt_embeds": EMBEDS, "pooled_prompt_embeds": POOLED, "height": 64, "width": 64}
    with pytest.raises(ValueError, match="output_type='latent'"):
        bare(**embeds, num_inference_steps=1)
    assert bare(**embeds, num_inference_steps=1, output_type="latent").images.shape == (1, 4, 8, 8)
    other = StableDiffusionXLImg2ImgPipeline(**bare.components)
    embeds = {"prompt_embeds": EMBEDS, "pooled_prompt_embeds": POOLED}
    with pytest.raises(ValueError, match="no vae: pass latents as image"):
        other(**embeds, image=torch.zeros(1, 3, 64, 64))


def test_a_picture_that_is_not_finite(pipe: StableDiffusionXLPipeline) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        pipe.decode(torch.full((1, 4, 8, 8), float("nan")))


def test_what_is_public() -> None:
    for name in ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "CLIPTextModelWithProjection"):
        assert name in minidiff.__all__ and getattr(minidiff, name).__name__ == name
