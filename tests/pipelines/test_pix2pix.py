"""Editing by instruction, seed for seed: both instruct-pix2pix pipelines against the reference, on tiny networks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import minidiff
from minidiff.pipelines.editing import guide_twice
from tests.pictures import assert_same, load, load_both, seeded, with_scheduler
from tests.theirs import diffusers
from tests.tiny import save_tiny
from tests.tiny_xl import POOLED, save_base

SCHEDULERS = [  # one of each kind: the three passes meet a scheduler as the two of text to image do
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
]
PROMPT = "a red heart over two cats"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("edit"), unet={"in_channels": 8})


@pytest.fixture(scope="module")
def pipes(folder: Path) -> tuple[Any, Any]:
    """Ours and theirs from the same files, in float64 so that only a wrong formula can make a difference."""
    return load_both("StableDiffusionInstructPix2PixPipeline", folder, safety_checker=None)


PICTURE = torch.rand(1, 3, 32, 32, generator=seeded(6), dtype=torch.float64)
LATENTS = torch.randn(1, 4, 8, 8, generator=seeded(7), dtype=torch.float64)
PIXELS = np.random.default_rng(0).integers(0, 256, (37, 45, 3), dtype=np.uint8)
EMBEDS = torch.randn(2, 77, 24, generator=seeded(5), dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_every_kind(pipes: tuple[Any, Any], name: str) -> None:
    options = {"prompt": PROMPT, "image": PICTURE, "num_inference_steps": 3, "output_type": "np"}
    results = [
        with_scheduler(pipe, library, name, lambda pipe: pipe(**options, generator=seeded()).images)
        for pipe, library in zip(pipes, (minidiff, diffusers), strict=True)
    ]
    assert_same(*results)


@pytest.fixture(scope="module")
def pipes_xl(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same for Stable Diffusion XL."""
    folder = save_base(tmp_path_factory.mktemp("edit_xl"), unet={"in_channels": 8})
    return tuple(load(library.StableDiffusionXLInstructPix2PixPipeline, folder) for library in (minidiff, diffusers))


TWO = PICTURE * torch.tensor([1.0, 0.5]).view(2, 1, 1, 1)
CALLS: dict[str, dict[str, Any]] = {
    "text scale": {"guidance_scale": 3.0},
    "image scale": {"image_guidance_scale": 2.5},
    "image scale of one": {"image_guidance_scale": 1.0},
    "no image guidance, and so none": {"image_guidance_scale": 0.9},
    "no text guidance, and so none": {"guidance_scale": 1.0},
    "neither": {"guidance_scale": 0.0, "image_guidance_scale": 0},
    "negative prompt": {"negative_prompt": "blue sky"},
    "two pictures of one image": {"num_images_per_prompt": 2},
    "one image, two prompts": {"prompt": [PROMPT, "a face"], "negative_prompt": ["sky", ""]},
    "two images, two prompts": {"prompt": [PROMPT, "a face"], "image": TWO},
    "two images for four pictures": {"prompt": [PROMPT, "a face"], "image": TWO, "num_images_per_prompt": 2},
    "noise given": {"latents": LATENTS},
    "latents as image": {"image": LATENTS},
    "embeddings": {"prompt": None, "prompt_embeds": EMBEDS[:1]},
    "both embeddings": {"prompt": None, "prompt_embeds": EMBEDS, "negative_prompt_embeds": EMBEDS.flip(0)},
    "PIL of an odd size": {"image": Image.fromarray(PIXELS)},
    "list of PIL": {"image": [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)], "num_images_per_prompt": 2},
    "tensor of an odd size": {"image": torch.rand(3, 35, 38, generator=seeded(9), dtype=torch.float64)},
    "eta ignored": {"eta": 0.5},
}


@pytest.mark.parametrize("name", CALLS)
def test_every_argument(pipes: tuple[Any, Any], name: str) -> None:
    arguments = {"prompt": PROMPT, "image": PICTURE, "num_inference_steps": 2, "output_type": "np"} | CALLS[name]
    assert_same(*(pipe(**arguments, generator=seeded()).images for pipe in pipes))


RNG = seeded(5)
EMBEDS_XL, NEGATIVE_XL = (torch.randn(1, 77, 40, generator=RNG, dtype=torch.float64) for _ in range(2))
POOL, NEGATIVE_POOL = (torch.randn(1, POOLED, generator=RNG, dtype=torch.float64) for _ in range(2))
POSITIVE = {"prompt": None, "prompt_embeds": EMBEDS_XL, "pooled_prompt_embeds": POOL}
NEGATIVES = {"negative_prompt_embeds": NEGATIVE_XL, "negative_pooled_prompt_embeds": NEGATIVE_POOL}
CALLS_XL: dict[str, dict[str, Any]] = {
    "both scales": {"guidance_scale": 3.0, "image_guidance_scale": 2.5},
    "two images for four pictures": {"prompt": [PROMPT, "a face"], "image": TWO, "num_images_per_prompt": 2},
    "guidance off": {"guidance_scale": 1.0},
    "latents as image": {"image": LATENTS},
    "noise given": {"latents": LATENTS},
    "second prompt": {"prompt_2": "blue sky"},
    "both negative prompts": {"negative_prompt": "blue sky", "negative_prompt_2": "dogs"},
    "empty negative prompt": {"negative_prompt": ""},
    "size": {"height": 24, "width": 56, "image": Image.fromarray(PIXELS)},
    "size of a tensor": {"height": 24, "width": 56},
    "original size": {"original_size": (512, 768)},
    "crop": {"crops_coords_top_left": (100, 3)},
    "target size": {"target_size": (1024, 640)},
    "rescaled guidance": {"guidance_rescale": 0.7},
    "cut": {"denoising_end": 0.5},
    "embeddings": POSITIVE,
    "both embeddings": POSITIVE | NEGATIVES,
}


@pytest.mark.parametrize("name", CALLS_XL)
def test_every_argument_xl(pipes_xl: tuple[Any, Any], name: str) -> None:
    arguments = {"prompt": PROMPT, "image": PICTURE, "num_inference_steps": 2, "output_type": "np"} | CALLS_XL[name]
    assert_same(*(pipe(**arguments, generator=seeded()).images for pipe in pipes_xl))


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler"])
def test_schedulers_of_every_kind_xl(pipes_xl: tuple[Any, Any], name: str) -> None:
    options = {"prompt": PROMPT, "image": PICTURE, "num_inference_steps": 3, "output_type": "np"}
    results = [
        with_scheduler(pipe, library, name, lambda pipe: pipe(**options, generator=seeded()).images)
        for pipe, library in zip(pipes_xl, (minidiff, diffusers), strict=True)
    ]
    assert_same(*results)


def test_cosxl_edit_reads_scaled_latents(pipes_xl: tuple[Any, Any]) -> None:
    results = []
    for pipe in pipes_xl:
        scaled = type(pipe)(**pipe.components, is_cosxl_edit=True)
        scaled.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "output_type": "np"}
        results.append(scaled(PROMPT, image=PICTURE, generator=seeded(), **options).images)
    assert_same(*results)
    plain = pipes_xl[0](PROMPT, image=PICTURE, generator=seeded(), **options).images
    assert abs(plain - results[0]).max() > 1e-3


def test_callbacks_of_sdxl(pipes_xl: tuple[Any, Any]) -> None:
    """The reference has none here: ours get what its other pipelines of SDXL hand out, and the image."""
    ours, _ = pipes_xl
    names = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids", "image_latents"]

    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert {name: len(tensor) for name, tensor in tensors.items()} == dict.fromkeys(names, 3) | {"latents": 1}
        pipe._interrupt = i == 1
        return {}

    options = {"image": PICTURE, "num_inference_steps": 4, "seed": 1}
    handling = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    stopped = ours(PROMPT, **options, **handling, output_type="latent").images
    assert torch.equal(stopped, list(ours.steps(PROMPT, **options))[1].latents)


def test_a_list_of_generators(pipes: tuple[Any, Any]) -> None:
    results = []
    for pipe in pipes:
        options = {"num_images_per_prompt": 2, "num_inference_steps": 3, "output_type": "np"}
        results.append(pipe(PROMPT, PICTURE, generator=[seeded(1), seeded(2)], **options).images)
    assert_same(*results)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_output_types(pipes: tuple[Any, Any], output_type: str) -> None:
    options = {"num_inference_steps": 2, "output_type": output_type}
    results = [pipe(PROMPT, PICTURE, generator=seeded(), **options) for pipe in pipes]
    assert type(results[0].images) is type(results[1].images)
    ours, theirs = (np.stack([np.asarray(x, dtype=np.float64) for x in out.images]) for out in results)
    bound = {"pil": 1, "latent": 2e-6}.get(output_type, 2e-7)  # levels of 256; of values up to 8; of values up to 1
    np.testing.assert_allclose(ours, theirs, atol=bound, rtol=0)  # measured: 0; 4e-14; 0
    for pipe in pipes:
        as_tuple = pipe(PROMPT, PICTURE, **options, return_dict=False)
        assert isinstance(as_tuple, tuple) and len(as_tuple) == 2 and as_tuple[1] is None


def test_callbacks_change_what_the_reference_s_change(pipes: tuple[Any, Any]) -> None:
    """Guidance is switched off in the middle, in the manner of the reference's documentation."""
    names = ["latents", "prompt_embeds", "image_latents"]
    seen: list[list[Any]] = []

    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        seen[-1].append((i, float(t), shapes, pipe.guidance_scale, pipe.image_guidance_scale))
        if i == 0:
            pipe._image_guidance_scale = 3.0
        if i == 2:
            pipe._guidance_scale = 0.0
            tensors |= {name: tensors[name].chunk(3)[0] for name in names[1:]}
        return tensors

    results = []
    for pipe in pipes:
        seen.append([])
        options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
        results.append(
            pipe(PROMPT, PICTURE, num_inference_steps=5, generator=seeded(), output_type="np", **options).images
        )
    assert seen[0] == seen[1] and len(seen[0]) == 6
    assert [scales[-2:] for scales in seen[0]] == [(7.5, 1.5), (7.5, 3.0), (7.5, 3.0), *[(0.0, 3.0)] * 3]
    assert_same(*results)


def test_the_formula() -> None:
    """With equal scales of one the picture and the sentence count as they are."""
    text, image, nothing = torch.randn(3, 2, 4, 8, 8, dtype=torch.float64, generator=seeded())
    torch.testing.assert_close(guide_twice(text, image, nothing, 1.0, 1.0), text)
    torch.testing.assert_close(guide_twice(text, image, nothing, 0.0, 1.0), image)
    torch.testing.assert_close(guide_twice(text, image, nothing, 0.0, 0.0), nothing)


def test_a_negative_text_beside_embeddings(pipes: tuple[Any, Any]) -> None:
    """The reference asks for a negative text of the type of the prompt here, and there is none."""
    ours, theirs = pipes
    negative = ours.encode_prompt("sky", "cpu", 1, False)[0]
    options = {"image": PICTURE, "prompt_embeds": EMBEDS[:1], "num_inference_steps": 2, "output_type": "np"}
    expected = theirs(**options, negative_prompt_embeds=negative, generator=seeded()).images
    assert_same(ours(**options, negative_prompt="sky", generator=seeded()).images, expected)


def test_steps_yields_what_a_call_computes(pipes: tuple[Any, Any]) -> None:
    ours, _ = pipes
    arguments = {"image": PICTURE, "num_inference_steps": 3, "image_guidance_scale": 2.0, "seed": 3}
    steps = list(ours.steps(PROMPT, **arguments))
    called = ours(PROMPT, **arguments, output_type="latent")
    assert torch.equal(steps[-1].latents, called.images) and called.seeds == [3]


def test_a_picture_depends_on_its_seed_and_image_alone(pipes: tuple[Any, Any]) -> None:
    ours, _ = pipes
    options = {"num_inference_steps": 2, "output_type": "pt"}
    batch = ours([PROMPT, "a face"], TWO, seed=20, **options)
    for k, prompt in enumerate((PROMPT, "a face")):
        alone = ours(prompt, TWO[k : k + 1], seeds=[20 + k], **options)
        torch.testing.assert_close(alone.images[0], batch.images[k], rtol=0, atol=1e-13)  # measured: 5e-15


def test_saved_pipeline_is_loaded_by_the_reference(pipes: tuple[Any, Any], tmp_path: Path) -> None:
    ours, _ = pipes
    ours.save_pretrained(tmp_path)
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert type(theirs) is diffusers.StableDiffusionInstructPix2PixPipeline
    again = minidiff.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is minidiff.StableDiffusionInstructPix2PixPipeline


def test_a_saved_xl_pipeline_is_loaded_by_the_reference(pipes_xl: tuple[Any, Any], tmp_path: Path) -> None:
    minidiff.StableDiffusionXLInstructPix2PixPipeline(**pipes_xl[0].components, is_cosxl_edit=True).save_pretrained(
        tmp_path
    )
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(theirs) is diffusers.StableDiffusionXLInstructPix2PixPipeline and theirs.is_cosxl_edit is True
    again = minidiff.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is minidiff.StableDiffusionXLInstructPix2PixPipeline and again.config.is_cosxl_edit is True


def test_an_outdated_scheduler_config_is_left_as_it_is(pipes: tuple[Any, Any]) -> None:
    """Unlike in text to image, the reference corrects nothing here."""
    for pipe, library in zip(pipes, (minidiff, diffusers), strict=True):
        old = library.PNDMScheduler.from_config(pipe.scheduler.config, steps_offset=0)
        again = type(pipe)(**{**pipe.components, "scheduler": old}, requires_safety_checker=False)
        assert again.scheduler.config.steps_offset == 0
