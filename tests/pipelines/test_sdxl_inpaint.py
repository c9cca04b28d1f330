"""Inpainting with SDXL, seed for seed: UNets of 4 and of 9 channels against the reference's, on tiny networks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import minidiff
from minidiff import StableDiffusionXLInpaintPipeline
from tests.pictures import assert_same, load, load_both, seeded, with_scheduler
from tests.theirs import diffusers
from tests.tiny_xl import POOLED, save_base, save_refiner

LIBRARIES = (minidiff, diffusers)
SCHEDULERS = [name for name in minidiff.__all__ if name.endswith("Scheduler")]
PROMPT = "a red heart over two cats"


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Base with its 4 channels, ours and theirs, in float64 so that only a wrong formula can make a difference."""
    folder = save_base(tmp_path_factory.mktemp("base"))
    return load_both("StableDiffusionXLInpaintPipeline", folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same with a UNet of 9 channels."""
    folder = save_base(tmp_path_factory.mktemp("nine"), unet={"in_channels": 9})
    return load_both("StableDiffusionXLInpaintPipeline", folder)


@pytest.fixture(scope="module")
def refiners(tmp_path_factory: pytest.TempPathFactory, pipes: tuple[Any, Any]) -> tuple[Any, Any]:
    """The refiner, which is told aesthetic scores, sharing encoder and autoencoder of base."""
    folder = save_refiner(tmp_path_factory.mktemp("refiner"))
    return tuple(
        load(library.StableDiffusionXLInpaintPipeline, folder, text_encoder_2=pipe.text_encoder_2, vae=pipe.vae)
        for library, pipe in zip(LIBRARIES, pipes, strict=True)
    )


PICTURE = torch.rand(1, 3, 32, 32, generator=seeded(6), dtype=torch.float64)
LATENTS, OTHER = torch.randn(2, 1, 4, 8, 8, generator=seeded(7), dtype=torch.float64)
PIXELS = np.random.default_rng(0).integers(0, 256, (37, 45, 3), dtype=np.uint8)
MASK = torch.zeros(1, 1, 32, 32)
MASK[..., 5:20, 9:30] = 1
GREYS = np.random.default_rng(1).integers(0, 256, (37, 45), dtype=np.uint8)
RNG = seeded(5)
EMBEDS, NEGATIVE = (torch.randn(1, 77, 40, generator=RNG, dtype=torch.float64) for _ in range(2))
POOL, NEGATIVE_POOL = (torch.randn(1, POOLED, generator=RNG, dtype=torch.float64) for _ in range(2))
OPTIONS = {"prompt": PROMPT, "image": PICTURE, "mask_image": MASK, "height": 32, "width": 32, "num_inference_steps": 3}
OPTIONS |= {"strength": 0.7, "output_type": "np"}  # two steps


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(pipes: tuple[Any, Any], name: str) -> None:
    results = [
        with_scheduler(pipe, library, name, lambda pipe: pipe(**OPTIONS, generator=seeded()).images)
        for pipe, library in zip(pipes, LIBRARIES, strict=True)
    ]
    assert_same(*results)


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler"])
def test_schedulers_of_every_kind_with_a_trained_unet(trained: tuple[Any, Any], name: str) -> None:
    results = [
        with_scheduler(pipe, library, name, lambda pipe: pipe(**OPTIONS, generator=seeded()).images)
        for pipe, library in zip(trained, LIBRARIES, strict=True)
    ]
    assert_same(*results)


@pytest.mark.parametrize("strength", [0.34, 0.9999, 1.0])
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
def test_strengths(pipes: tuple[Any, Any], trained: tuple[Any, Any], name: str, strength: float) -> None:
    options = OPTIONS | {"strength": strength}
    for both in (pipes, trained):
        results = [
            with_scheduler(pipe, library, name, lambda pipe: pipe(**options, generator=seeded()).images)
            for pipe, library in zip(both, LIBRARIES, strict=True)
        ]
        assert_same(*results)


@pytest.mark.parametrize("strength", [0.0, 0.001, 0.24])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "PNDMScheduler"])
def test_a_strength_that_leaves_no_step(pipes: tuple[Any, Any], name: str, strength: float) -> None:
    """With PNDM too, which would evaluate once even so."""
    messages = (f"strength={strength} of 4 steps leaves no step", "which is < 1")
    for pipe, library, message in zip(pipes, LIBRARIES, messages, strict=True):
        with pytest.raises(ValueError, match=message):
            options = OPTIONS | {"strength": strength, "num_inference_steps": 4}
            with_scheduler(pipe, library, name, lambda pipe, a=options: pipe(**a))


CALLS: dict[str, dict[str, Any]] = {
    "defaults": {"strength": 0.9999, "height": None, "width": None},
    "guidance off": {"guidance_scale": 1.0},
    "another size": {"height": 24, "width": 40},
    "prompts": {"prompt_2": "blue sky", "negative_prompt": "dogs", "negative_prompt_2": "hills"},
    "embeddings": {"prompt": None, "prompt_embeds": EMBEDS, "pooled_prompt_embeds": POOL}
    | {"negative_prompt_embeds": NEGATIVE, "negative_pooled_prompt_embeds": NEGATIVE_POOL},
    "sizes": {"original_size": (512, 768), "crops_coords_top_left": (5, 9), "target_size": (100, 120)}
    | {"negative_original_size": (100, 200), "negative_target_size": (64, 32)},
    "rescaled guidance": {"guidance_rescale": 0.7},
    "skipped layer": {"clip_skip": 1},
    "two pictures of one image": {"num_images_per_prompt": 2},
    "two images, masks and prompts": {
        "prompt": [PROMPT, "a face"],
        "image": PICTURE * torch.tensor([1.0, 0.5]).view(2, 1, 1, 1),
        "mask_image": torch.cat([MASK, 1 - MASK]),
        "num_images_per_prompt": 2,
    },
    "noise given": {"latents": LATENTS},
    "noise given for all of it": {"latents": LATENTS, "strength": 1.0},
    "masked latents given": {"masked_image_latents": OTHER},
    "latents as image, masked ones beside them": {"image": LATENTS, "masked_image_latents": OTHER},
    "taken over": {"image": LATENTS, "masked_image_latents": OTHER, "denoising_start": 0.5},
    "the first half": {"denoising_end": 0.6, "num_inference_steps": 6},
    "the middle of a run": {"denoising_start": 0.25, "denoising_end": 0.75},
    "PIL, and a grey mask": {"image": Image.fromarray(PIXELS), "mask_image": Image.fromarray(GREYS)},
    "PIL, and a coloured mask": {"image": Image.fromarray(PIXELS), "mask_image": Image.fromarray(255 - PIXELS)},
    "lists of PIL": {"image": [Image.fromarray(PIXELS)] * 2, "mask_image": [Image.fromarray(GREYS)] * 2}
    | {"num_images_per_prompt": 2},
    "arrays": {"image": (PIXELS / 255).astype(np.float32), "mask_image": (GREYS / 255).astype(np.float32)},
    "tensors from -1 to 1": {"image": PICTURE * 2 - 1, "mask_image": MASK[0]},
    "everything masked": {"mask_image": MASK * 0 + 1},
    "nothing masked": {"mask_image": MASK * 0},
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of pixels from -1 to 1, by both
@pytest.mark.parametrize("name", CALLS)
def test_every_argument(pipes: tuple[Any, Any], name: str) -> None:
    assert_same(*(pipe(**OPTIONS | CALLS[name], generator=seeded()).images for pipe in pipes))


DIFFERENT = [  # where a UNet of 9 channels makes a difference: what is drawn, encoded and shown
    "defaults",
    "guidance off",
    "two images, masks and prompts",
    "noise given",
    "masked latents given",
    "latents as image, masked ones beside them",
    "taken over",
    "the middle of a run",
    "arrays",
    "everything masked",
]


@pytest.mark.parametrize("name", DIFFERENT)
def test_every_argument_with_a_trained_unet(trained: tuple[Any, Any], name: str) -> None:
    assert_same(*(pipe(**OPTIONS | CALLS[name], generator=seeded()).images for pipe in trained))


def test_an_image_of_latents_alone(pipes: tuple[Any, Any]) -> None:
    """Latents cannot be masked, which only a UNet of 9 channels asks for."""
    assert_same(*(pipe(**OPTIONS | {"image": LATENTS}, generator=seeded()).images for pipe in pipes))


@pytest.mark.parametrize("channels", [4, 9])
def test_the_part_around_the_mask(pipes: tuple[Any, Any], trained: tuple[Any, Any], channels: int) -> None:
    mask = np.zeros((37, 45), np.uint8)
    mask[6:14, 20:33] = 255
    options = {"image": Image.fromarray(PIXELS), "mask_image": Image.fromarray(mask), "padding_mask_crop": 3}
    both = pipes if channels == 4 else trained
    results = [pipe(**OPTIONS | options | {"output_type": "pil"}, generator=seeded()).images[0] for pipe in both]
    ours, theirs = (np.asarray(picture, dtype=int) for picture in results)
    assert ours.shape == theirs.shape == PIXELS.shape
    assert abs(ours - theirs).max() <= 1  # measured: 0
    assert np.array_equal(ours[mask == 0], PIXELS[mask == 0]) and abs(ours - PIXELS)[mask > 0].mean() > 10


def test_a_list_of_generators(pipes: tuple[Any, Any], trained: tuple[Any, Any]) -> None:
    """They draw for the image, the noise, the masked image, in this order; with a scheduler that draws on."""
    for both in (pipes, trained):
        results = [
            with_scheduler(
                pipe,
                library,
                "EulerAncestralDiscreteScheduler",
                lambda pipe: pipe(**OPTIONS, num_images_per_prompt=2, generator=[seeded(1), seeded(2)]).images,
            )
            for pipe, library in zip(both, LIBRARIES, strict=True)
        ]
        assert_same(*results)


def test_the_refiner_and_its_scores(refiners: tuple[Any, Any]) -> None:
    for change in ({}, {"aesthetic_score": 9.0, "negative_aesthetic_score": 1.0, "strength": 0.5}):
        assert_same(*(pipe(**OPTIONS | change, generator=seeded()).images for pipe in refiners))


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_base_and_refiner_together(pipes: tuple[Any, Any], refiners: tuple[Any, Any], name: str) -> None:
    """The hand-over as it is written everywhere, with the mask on both sides."""
    pictures = []
    for base, refiner, library in zip(pipes, refiners, LIBRARIES, strict=True):
        options = OPTIONS | {"num_inference_steps": 7, "generator": seeded()}
        first = options | {"denoising_end": 0.6, "output_type": "latent"}
        latents = with_scheduler(base, library, name, lambda pipe, a=first: pipe(**a).images)
        second = options | {"denoising_start": 0.6, "image": latents}
        pictures.append(with_scheduler(refiner, library, name, lambda pipe, a=second: pipe(**a).images))
    assert_same(*pictures)


def test_callbacks_see_and_change_the_masks(trained: tuple[Any, Any]) -> None:
    names = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids", "mask", "masked_image_latents"]
    results, seen = [], []

    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen[-1].append((i, float(t), {name: tuple(tensor.shape) for name, tensor in tensors.items()}))
        if i == 0:
            tensors["mask"] = 1 - tensors["mask"]
            tensors["masked_image_latents"] = tensors["masked_image_latents"] * 0.5
        return tensors

    for pipe in trained:
        seen.append([])
        options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
        results.append(pipe(**OPTIONS, **options, generator=seeded()).images)
    assert seen[0] == seen[1] and len(seen[0]) == 2
    assert_same(*results)


def test_what_is_not_masked_is_kept(pipes: tuple[Any, Any]) -> None:
    """With a UNet of 4 channels the latents outside of the mask are those of the image, to the bit."""
    ours, _ = pipes
    found = ours(**OPTIONS | {"image": LATENTS, "output_type": "latent"}, seed=2).images
    inside = torch.nn.functional.interpolate(MASK, size=(8, 8)).bool().expand_as(LATENTS)
    image = LATENTS.float().double()  # the reference rounds images to float32
    assert torch.equal(found[~inside], image[~inside]) and not torch.isclose(found[inside], image[inside]).any()


def test_a_picture_depends_on_its_seed_and_its_images_alone(pipes: tuple[Any, Any], trained: tuple[Any, Any]) -> None:
    for ours, _ in (pipes, trained):
        options = OPTIONS | CALLS["two images, masks and prompts"] | {"num_images_per_prompt": 1}
        batch = ours(**options | {"output_type": "pt"}, seed=20)
        assert batch.seeds == [20, 21]
        for k in range(2):
            alone = {"prompt": options["prompt"][k], "output_type": "pt", "seed": 20 + k}
            alone |= {name: options[name][k : k + 1] for name in ("image", "mask_image")}
            found = ours(**options | alone).images[0]
            torch.testing.assert_close(found, batch.images[k], rtol=0, atol=1e-13)  # measured: 5e-15


def test_steps_yields_what_a_call_computes(pipes: tuple[Any, Any]) -> None:
    ours, _ = pipes
    options = {name: value for name, value in OPTIONS.items() if name != "output_type"} | {"seed": 3}
    steps = list(ours.steps(**options))
    assert [step.index for step in steps] == [0, 1]
    assert torch.equal(steps[-1].latents, ours(**options, output_type="latent").images)


def test_saved_pipeline_is_loaded_by_the_reference(refiners: tuple[Any, Any], tmp_path: Path) -> None:
    ours, _ = refiners
    ours.save_pretrained(tmp_path)
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(theirs) is diffusers.StableDiffusionXLInpaintPipeline
    assert theirs.config.requires_aesthetics_score is True
    assert type(minidiff.DiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionXLInpaintPipeline
