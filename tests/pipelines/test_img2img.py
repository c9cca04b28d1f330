"""Image to image with Stable Diffusion 1.x, seed for seed: StableDiffusionImg2ImgPipeline against the reference's."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import minidiff
from minidiff import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from minidiff.pipelines.strength import last_steps
from tests.pictures import assert_same_latents, load_both, seeded
from tests.theirs import diffusers
from tests.tiny import SCHEDULER

SCHEDULERS = [name for name in minidiff.__all__ if name.endswith("Scheduler")]
STRENGTHS = (0.4, 0.7, 1.0)  # of 3 steps: 1, 2 and 3
PROMPT = "a red heart over two cats"


@pytest.fixture(scope="module")
def pipes(folder: Path) -> tuple[Any, Any]:
    """Ours and theirs from the same text-to-image files, in float64 so that only a wrong formula makes a difference."""
    return load_both("StableDiffusionImg2ImgPipeline", folder, safety_checker=None)


PICTURE = torch.rand(1, 3, 32, 32, generator=seeded(6), dtype=torch.float64)
LATENTS = torch.randn(1, 4, 8, 8, generator=seeded(7), dtype=torch.float64)
PIXELS = np.random.default_rng(0).integers(0, 256, (37, 45, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_at_every_strength(pipes: tuple[Any, Any], name: str) -> None:
    results: dict[float, list[torch.Tensor]] = {strength: [] for strength in STRENGTHS}
    for pipe, library in zip(pipes, (minidiff, diffusers), strict=True):
        original = pipe.scheduler
        pipe.scheduler = getattr(library, name).from_config(original.config)
        for strength, found in results.items():
            options = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
            found.append(pipe(PROMPT, image=PICTURE, strength=strength, generator=seeded(), **options).images)
        pipe.scheduler = original
    for found in results.values():
        assert_same_latents(*found, name)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_number_of_steps(name: str) -> None:
    """The timesteps that are left are the reference's, for every count and strength, and where none is left, none."""
    ours = getattr(minidiff, name).from_config(SCHEDULER)
    theirs = getattr(diffusers, name).from_config(SCHEDULER)
    their_part = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps
    for steps in (1, 2, 7, 50):
        theirs.set_timesteps(steps)
        plan = ours.plan(steps)
        for strength in (0.0, 0.01, 0.3, 0.58, 0.75, 1.0):
            expected, _ = their_part(SimpleNamespace(scheduler=theirs), steps, strength, None)
            request = SimpleNamespace(strength=strength, timesteps=None, sigmas=None)
            if not len(expected):
                with pytest.raises(ValueError, match=f"strength={strength} of {steps} steps leaves no step"):
                    last_steps(ours, plan, request)
                continue
            part = last_steps(ours, plan, request)
            assert part.times[part.start :] == tuple(expected.tolist()), (steps, strength)


CALLS: dict[str, dict[str, Any]] = {
    "strength of nothing, one evaluation of PNDM": {"strength": 0.0},
    "guidance off": {"guidance_scale": 1.0},
    "negative prompt": {"negative_prompt": "blue sky"},
    "two pictures of one image": {"num_images_per_prompt": 2},
    "two images for four pictures": {
        "image": PICTURE.repeat(2, 1, 1, 1) * torch.tensor([1.0, 0.5]).view(2, 1, 1, 1),
        "prompt": [PROMPT, "a face"],
        "num_images_per_prompt": 2,
    },
    "embeddings": {
        "prompt": None,
        "prompt_embeds": torch.randn(1, 77, 24, generator=seeded(5), dtype=torch.float64),
        "negative_prompt_embeds": torch.randn(1, 77, 24, generator=seeded(8), dtype=torch.float64),
    },
    "latents as image": {"image": LATENTS},
    "a list of latents": {"image": [LATENTS[0], 1 - LATENTS[0]], "prompt": [PROMPT] * 2},
    "PIL of an odd size": {"image": Image.fromarray(PIXELS)},
    "list of PIL": {"image": [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)], "num_images_per_prompt": 2},
    "array": {"image": PIXELS.astype(np.float32) / 255},
    "arrays": {"image": np.stack([PIXELS, 255 - PIXELS]) / 255, "num_images_per_prompt": 2},
    "tensor of an odd size": {"image": torch.rand(3, 35, 38, generator=seeded(9), dtype=torch.float64)},
    "tensor from -1 to 1": {"image": PICTURE * 2 - 1},
    "list of tensors": {"image": [PICTURE[0], 1 - PICTURE[0]], "num_images_per_prompt": 2},
    "list of generators": {"generator": [seeded(1), seeded(2)], "num_images_per_prompt": 2},
    "list of generators and images": {
        "generator": [seeded(k) for k in range(4)],
        "image": [PICTURE[0], 1 - PICTURE[0]],
        "num_images_per_prompt": 4,
    },
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:image has values:FutureWarning")
def test_every_argument(pipes: tuple[Any, Any], name: str) -> None:
    arguments = {"prompt": PROMPT, "image": PICTURE, "strength": 0.7, "num_inference_steps": 3} | CALLS[name]
    results = []
    for pipe in pipes:
        drawn = arguments.get("generator", seeded())
        drawn = [one.manual_seed(k) for k, one in enumerate(drawn)] if isinstance(drawn, list) else drawn
        results.append(pipe(**arguments | {"generator": drawn}, output_type="latent").images)
    assert_same_latents(*results)


SCHEDULED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "eta": ("DDIMScheduler", {}, {"eta": 0.7}),
    "timesteps": ("DDPMScheduler", {}, {"timesteps": [900, 500, 300, 100, 7]}),
    "timesteps of two evaluations each": ("HeunDiscreteScheduler", {}, {"timesteps": [900, 500, 300, 100, 7]}),
    "sigmas": ("EulerDiscreteScheduler", {}, {"sigmas": [9.0, 4.0, 2.0, 1.0, 0.5, 0.1, 0.0]}),
    "Karras levels": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, {}),
    "v-prediction": ("DDIMScheduler", {"prediction_type": "v_prediction"}, {}),
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_every_argument_of_schedulers(pipes: tuple[Any, Any], name: str) -> None:
    scheduler, config, arguments = SCHEDULED[name]
    results = []
    for pipe, library in zip(pipes, (minidiff, diffusers), strict=True):
        original = pipe.scheduler
        pipe.scheduler = getattr(library, scheduler).from_config(original.config, **config)
        options = {"num_inference_steps": 5, "strength": 0.7, "output_type": "latent"} | arguments
        results.append(pipe(PROMPT, image=PICTURE, generator=seeded(), **options).images)
        pipe.scheduler = original
    assert_same_latents(*results, scheduler)


def test_pictures_are_at_most_one_level_apart(folder: Path) -> None:
    """In float32, as people run it, from a picture of PIL to pictures of PIL."""
    results = []
    for library in (minidiff, diffusers):
        pipe = library.StableDiffusionImg2ImgPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        pipe.to(torch.float32)
        pipe.set_progress_bar_config(disable=True)
        options = {"image": Image.fromarray(PIXELS), "strength": 0.75, "num_inference_steps": 4}
        images = pipe(PROMPT, **options, num_images_per_prompt=2, generator=seeded()).images
        results.append(np.stack([np.asarray(image, dtype=int) for image in images]))
    assert results[0].shape == (2, 36, 44, 3) and results[0].std() > 10
    assert abs(results[0] - results[1]).max() <= 1  # measured: 0


def test_callbacks(pipes: tuple[Any, Any]) -> None:
    """They see the same steps, timesteps and tensors, and may change them and stop."""
    results, seen = [], []
    for pipe in pipes:
        found: list[Any] = []

        def change(pipe: Any, i: int, t: Any, tensors: dict[str, Any], found: list[Any] = found) -> dict[str, Any]:
            found.append((i, int(t), pipe.num_timesteps, sorted(tensors)))
            pipe._interrupt = i == 2
            return {"latents": tensors["latents"] * 0.9}

        options = {"num_inference_steps": 6, "strength": 0.8, "output_type": "latent", "generator": seeded()}
        names = ["latents", "prompt_embeds"]
        options |= {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names}
        results.append(pipe(PROMPT, image=PICTURE, **options).images)
        seen.append(found)
    assert seen[0] == seen[1] and len(seen[0]) == 3
    assert_same_latents(*results)


def test_a_picture_is_the_same_alone_and_in_a_batch(pipes: tuple[Any, Any]) -> None:
    """With a generator, or a seed, for each picture; for solvers that draw noise too."""
    ours, _ = pipes
    original = ours.scheduler
    for name in ("PNDMScheduler", "EulerAncestralDiscreteScheduler"):
        ours.scheduler = getattr(minidiff, name).from_config(original.config)
        options = {"image": PICTURE, "strength": 0.7, "num_inference_steps": 4, "output_type": "pt"}
        batch = ours(PROMPT, num_images_per_prompt=4, seed=20, **options)
        listed = ours(PROMPT, num_images_per_prompt=4, generator=[seeded(20 + k) for k in range(4)], **options)
        assert batch.seeds == [20, 21, 22, 23] and torch.equal(batch.images, listed.images)
        for k in (0, 3):
            alone = ours(PROMPT, generator=seeded(20 + k), **options)
            torch.testing.assert_close(alone.images[0], batch.images[k], rtol=0, atol=1e-13)
    ours.scheduler = original


def test_steps_yields_what_a_call_computes(pipes: tuple[Any, Any]) -> None:
    ours, _ = pipes
    arguments = {"image": PICTURE, "strength": 0.5, "num_inference_steps": 6, "seed": 3}
    steps = list(ours.steps(PROMPT, **arguments))
    assert [step.index for step in steps] == list(range(4))  # PNDM evaluates once more than it takes steps
    assert torch.equal(steps[-1].latents, ours(PROMPT, **arguments, output_type="latent").images)


def test_components_are_shared(folder: Path) -> None:
    text_to_image = StableDiffusionPipeline.from_pretrained(folder)
    for other in (
        StableDiffusionImg2ImgPipeline(**text_to_image.components),
        StableDiffusionImg2ImgPipeline.from_pipe(text_to_image),
    ):
        assert all(getattr(other, name) is part for name, part in text_to_image.components.items())
    assert other.config.requires_safety_checker is False
    back = StableDiffusionPipeline.from_pipe(other, requires_safety_checker=True, torch_dtype="float64")
    assert back.unet is text_to_image.unet and back.dtype == torch.float64
    assert back.config.requires_safety_checker is True


def test_saved_pipeline_is_loaded_by_the_reference(pipes: tuple[Any, Any], tmp_path: Path) -> None:
    ours, _ = pipes
    ours.save_pretrained(tmp_path)
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)) is diffusers.StableDiffusionImg2ImgPipeline
    assert type(minidiff.DiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionImg2ImgPipeline
