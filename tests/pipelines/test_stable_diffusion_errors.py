"""Every wrong argument of a generation is its own clear error, before anything is computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import minidiff
from minidiff import CLIPTextModel, StableDiffusionPipeline, UNet2DConditionModel
from minidiff.errors import CheckpointNotFoundError, ConfigError
from tests.tiny import TEXT, UNET, save_tiny

PROMPT = "a red heart"
EMBEDS = torch.zeros(1, 77, 24)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(save_tiny(tmp_path_factory.mktemp("tiny")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no prompt": ({"prompt": None}, ValueError, "either prompt or prompt_embeds"),
    "prompt of a wrong type": ({"prompt": 5}, ValueError, "prompt should be a str or a list.*5"),
    "prompt list of a wrong type": ({"prompt": ["a", 5]}, ValueError, "prompt should be a str or a list"),
    "empty prompt list": ({"prompt": []}, ValueError, "at least one"),
    "prompt and embeddings": ({"prompt_embeds": EMBEDS}, ValueError, "not both"),
    "negative twice": ({"negative_prompt": "", "negative_prompt_embeds": EMBEDS}, ValueError, "not both"),
    "negative of another type": ({"negative_prompt": ["a"]}, TypeError, "negative_prompt.*type of prompt"),
    "too many negatives": ({"prompt": ["a"], "negative_prompt": ["a", "b"]}, ValueError, "2 texts for 1 prompts"),
    "flat embeddings": ({"prompt": None, "prompt_embeds": torch.zeros(77, 24)}, ValueError, r"\(77, 24\)"),
    "embeddings of two shapes": (
        {"prompt": None, "prompt_embeds": EMBEDS, "negative_prompt_embeds": EMBEDS[:, :70]},
        ValueError,
        "same shape",
    ),
    "embeddings of another family": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 77, 768)},
        ValueError,
        r"prompt_embeds should be \(B, L, 24\).*768.*SD 1.x",
    ),
    "negative embeddings of another batch": (
        {"negative_prompt_embeds": EMBEDS.expand(2, -1, -1)},
        ValueError,
        r"negative_prompt_embeds should be \(1, L, D\)",
    ),
    "height not divisible": ({"height": 30}, ValueError, "height should be divisible by 4, found 30; 28"),
    "width zero": ({"width": 0}, ValueError, "width should be at least 1"),
    "height a float": ({"height": 32.0}, TypeError, "height should be an integer"),
    "no steps": ({"num_inference_steps": 0}, ValueError, "num_inference_steps.*0"),
    "too many steps": ({"num_inference_steps": 1001}, ValueError, "1001"),
    "steps of a wrong type": ({"num_inference_steps": "20"}, (ValueError, TypeError), "num_inference_steps.*'20'"),
    "timesteps and sigmas": ({"timesteps": [9], "sigmas": [1.0]}, ValueError, "not both"),
    "a picture that fits into no memory": (
        {"height": 8_000_000},
        ValueError,
        "height should be at most 65,536, found 8",
    ),
    "pictures without end": (
        {"num_images_per_prompt": 2**63},
        ValueError,
        "num_images_per_prompt should be at most",
    ),
    "prompts without end": (
        {"prompt": ["a"] * 10_001},
        ValueError,
        "prompts .* at most 10,000, found 10,001",
    ),
    "a prompt without end": (
        {"prompt": "a" * 10**6},
        ValueError,
        "prompt 0 has 1,000,000 characters",
    ),
    "no pictures": ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt should be at least 1"),
    "guidance not a number": ({"guidance_scale": float("nan")}, ValueError, "guidance_scale.*nan"),
    "guidance of a wrong type": ({"guidance_scale": "7"}, TypeError, "guidance_scale should be a number"),
    "negative guidance": ({"guidance_scale": -1.0}, ValueError, "guidance_scale"),
    "rescale above one": ({"guidance_rescale": 1.5}, ValueError, "guidance_rescale.*1.5"),
    "eta above one": ({"eta": 2.0}, ValueError, "eta.*2.0"),
    "wrong latents": ({"latents": torch.zeros(1, 4, 9, 8)}, ValueError, r"latents should be \(1, 4, 8, 8\).*9, 8"),
    "too few generators": (
        {"num_images_per_prompt": 3, "generator": [torch.Generator(), torch.Generator()]},
        ValueError,
        "generator is a list of 2 for 3 pictures",
    ),
    "generator of a wrong type": ({"generator": 7}, TypeError, "generator.*7"),
    "seed and generator": ({"seed": 1, "generator": torch.Generator()}, ValueError, "one of generator=, seed="),
    "too few seeds": ({"seeds": [1, 2]}, ValueError, "list of 1 integers"),
    "seed too large": ({"seed": 2**70}, ValueError, r"a seed should be an integer from -2\^63 to .*71 bits"),
    "seeds too large": ({"seeds": [2**64]}, ValueError, "65 bits"),
    "guidance beyond floats": (
        {"guidance_scale": 10**400},
        ValueError,
        "guidance_scale should be finite, .* bits",
    ),
    "latents that are text": ({"latents": "x"}, TypeError, "latents should be a tensor, found str"),
    "embeddings that are text": (
        {"prompt": None, "prompt_embeds": "x"},
        TypeError,
        "embeds should be a tensor, found str",
    ),
    "negative embeddings of lists": ({"negative_prompt_embeds": [[1.0]]}, TypeError, "a tensor, found list"),
    "no function": ({"callback_on_step_end": 3}, TypeError, "callback_on_step_end should be a function, found 3"),
    "no list of names": (
        {"callback_on_step_end_tensor_inputs": "latents"},
        TypeError,
        "should be a list of names, found 'latents'",
    ),
    "seed a float": ({"seed": 1.5}, TypeError, "seed should be an integer"),
    "clip_skip too large": ({"clip_skip": 4}, ValueError, "clip_skip.*0 to 3.*4"),
    "unknown output": ({"output_type": "jpeg"}, ValueError, "output_type.*jpeg"),
    "unknown argument": ({"guidance": 3.0}, TypeError, "guidance"),
    "not implemented": ({"ip_adapter_image": object()}, TypeError, "ip_adapter_image"),
    "unknown callback tensor": ({"callback_on_step_end_tensor_inputs": ["noise"]}, ValueError, "noise"),
    "callback without result": ({"callback_on_step_end": lambda *_: None}, TypeError, "should return a dict"),
    "callback with another tensor": (
        {"callback_on_step_end": lambda *_: {"sigma": EMBEDS}},
        ValueError,
        "sigma",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(pipe: StableDiffusionPipeline, name: str) -> None:
    arguments, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        pipe(**{"prompt": PROMPT, "num_inference_steps": 2, **arguments})


def test_steps_says_at_once_what_is_wrong(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="divisible"):
        pipe.steps(PROMPT, height=30)
    with pytest.raises(TypeError, match="output_type"):
        pipe.steps(PROMPT, output_type="pil")


def test_unknown_schedulers_and_classes() -> None:
    with pytest.raises(AttributeError, match="EulerMaruyamaScheduler"):
        _ = minidiff.EulerMaruyamaScheduler


def test_missing_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="nowhere"):
        StableDiffusionPipeline.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    with pytest.raises(CheckpointNotFoundError, match=r"model_index\.json"):
        StableDiffusionPipeline.from_pretrained(tmp_path)


def test_components_that_do_not_fit(pipe: StableDiffusionPipeline) -> None:
    """Refused when the pipeline is built, naming both components and the families their widths belong to."""
    wide = CLIPTextModel({**TEXT, "vocab_size": 540, "hidden_size": 32})
    inpainting = UNet2DConditionModel(**{**UNET, "in_channels": 9})
    small = CLIPTextModel({**TEXT, "vocab_size": 10})
    parts = pipe.components
    for change, message in (
        ({"text_encoder": wide}, "text_encoder and unet.*32.*24"),
        ({"unet": inpainting}, "vae and unet.*4.*9.*inpainting"),
        ({"text_encoder": small}, "tokenizer and text_encoder.*10"),
        ({"safety_checker": object()}, "safety_checker should be None or called, found object"),
    ):
        with pytest.raises(ConfigError, match=message):
            StableDiffusionPipeline(**{**parts, **change})


def test_components_that_are_absent(pipe: StableDiffusionPipeline) -> None:
    """Without a text encoder embeddings are asked for; without a VAE there are only latents."""
    bare = StableDiffusionPipeline(**{**pipe.components, "text_encoder": None, "tokenizer": None, "vae": None})
    bare.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="pass prompt_embeds"):
        bare(PROMPT, num_inference_steps=2)
    embeds = {"prompt_embeds": EMBEDS, "negative_prompt_embeds": EMBEDS, "height": 64, "width": 64}
    with pytest.raises(ValueError, match="output_type='latent'"):
        bare(**embeds, num_inference_steps=1)
    assert bare(**embeds, num_inference_steps=1, output_type="latent").images.shape == (1, 4, 8, 8)


def test_a_picture_that_is_not_finite(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        pipe.decode(torch.full((1, 4, 8, 8), float("nan")))


@contextmanager
def refused(message: str, layer: torch.nn.Module, factor: float) -> Iterator[None]:
    """Expect an error as long as the weights of a layer are so many times as large."""
    before = layer.weight
    layer.weight = torch.nn.Parameter(before.detach() * factor)
    try:
        with pytest.raises(ValueError, match=message):
            yield
    finally:
        layer.weight = before


@pytest.mark.parametrize("output_type", ["latent", "pil"])
def test_where_values_that_are_not_finite_began(pipe: StableDiffusionPipeline, output_type: str) -> None:
    """Float32 got the advice for float16, and latents were returned without a word."""
    nan, options = float("nan"), {"num_inference_steps": 2, "output_type": output_type}
    with refused(
        r"latents hold NaN .*weight unet\.mid_block\S*conv1\.weight holds them", pipe.unet.mid.res[0].conv1, nan
    ):
        pipe(PROMPT, **options)
    with refused(r"finite, so they began in a step: pipe\.steps\(\) shows in which$", pipe.unet.conv_out, 1e38):
        pipe(PROMPT, **options)
    with pytest.raises(ValueError, match="latents hold NaN .*prompt_embeds held them before the first step"):
        pipe(prompt_embeds=EMBEDS * nan, **options)
    for latents, found in ((torch.full((1, 4, 8, 8), nan), "NaN"), (torch.zeros(1, 4, 8, 8).cfloat(), "torch.comp")):
        with pytest.raises(ValueError, match=f"latents should be finite floating-point numbers, found {found}"):
            pipe(PROMPT, latents=latents, **options)


def test_the_layer_in_which_a_decoder_overflows(pipe: StableDiffusionPipeline) -> None:
    layer = pipe.vae.decoder.conv_in
    with refused(r"hold NaN .*: layer decoder\.conv_in overflows in torch\.float32; try pipe\.vae\.to", layer, 1e38):
        pipe.decode(torch.full((1, 4, 8, 8), 1e9))
    with refused(r"pictures hold NaN .*the weight vae\.decoder\.conv_in\.weight holds them", layer, float("nan")):
        pipe(PROMPT, num_inference_steps=1)
    assert len(pipe(PROMPT, num_inference_steps=1).images) == 1 and not layer._forward_hooks


def test_a_unet_that_does_not_know_its_size(pipe: StableDiffusionPipeline) -> None:
    unet = UNet2DConditionModel(**{**UNET, "sample_size": None})
    other = StableDiffusionPipeline(**{**pipe.components, "unet": unet})
    with pytest.raises(ValueError, match="height must be given"):
        other(PROMPT, num_inference_steps=1)
