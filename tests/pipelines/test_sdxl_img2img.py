"""Image to image with SDXL, seed for seed, and base and refiner as an ensemble: against the reference's pipelines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import minidiff
from minidiff import StableDiffusionXLImg2ImgPipeline
from minidiff.images.processor import to_tensor
from tests.pictures import assert_same, load, load_both, seeded, with_scheduler
from tests.theirs import diffusers, relative_error
from tests.tiny_xl import save_base, save_refiner

SCHEDULERS = [name for name in minidiff.__all__ if name.endswith("Scheduler")]
PROMPT = "a red heart over two cats"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Ours and theirs from the same files, in float64 so that only a wrong formula can make a difference."""
    folder = save_base(tmp_path_factory.mktemp("base"))
    return load_both("StableDiffusionXLPipeline", folder)


@pytest.fixture(scope="module")
def refiners(tmp_path_factory: pytest.TempPathFactory, bases: tuple[Any, Any]) -> tuple[Any, Any]:
    """Refiners that share the second text encoder and the autoencoder of base, as they are used."""
    folder = save_refiner(tmp_path_factory.mktemp("refiner"))
    return tuple(
        load(library.StableDiffusionXLImg2ImgPipeline, folder, text_encoder_2=base.text_encoder_2, vae=base.vae)
        for library, base in zip((minidiff, diffusers), bases, strict=True)
    )


PICTURE = torch.rand(1, 3, 32, 32, generator=seeded(6), dtype=torch.float64)
LATENTS = torch.randn(1, 4, 8, 8, generator=seeded(7), dtype=torch.float64)
PIXELS = np.random.default_rng(0).integers(0, 256, (37, 45, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if not name.startswith("EDM")])
def test_base_and_refiner_together(bases: tuple[Any, Any], refiners: tuple[Any, Any], name: str) -> None:
    """The hand-over as it is written everywhere: the latents and the picture are the reference's."""
    handed, pictures = [], []
    for base, refiner, library in zip(bases, refiners, (minidiff, diffusers), strict=True):
        options = {"prompt": PROMPT, "num_inference_steps": 7, "generator": seeded()}
        first = with_scheduler(
            base, library, name, lambda pipe, o=options: pipe(**o, denoising_end=0.6, output_type="latent").images
        )
        handed.append(first)
        second = with_scheduler(
            refiner,
            library,
            name,
            lambda pipe, o=options, x=first: pipe(**o, denoising_start=0.6, image=x, output_type="np").images,
        )
        pictures.append(second)
    assert relative_error(*handed) < 2e-7  # measured: 4.3e-8, of the reference's float32 noise levels
    assert_same(*pictures)


@pytest.mark.parametrize("cut", [0.21, 0.46, 0.8])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_the_cut_anywhere(bases: tuple[Any, Any], refiners: tuple[Any, Any], name: str, cut: float) -> None:
    """Within steps of two evaluations and between them; test_hand_over.py has the numbers of all cuts."""
    pictures = []
    for base, refiner, library in zip(bases, refiners, (minidiff, diffusers), strict=True):
        options = {"prompt": PROMPT, "num_inference_steps": 5, "guidance_scale": 1.0}
        first = options | {"denoising_end": cut, "output_type": "latent", "generator": seeded()}
        latents = with_scheduler(base, library, name, lambda pipe, a=first: pipe(**a).images)
        second = options | {"denoising_start": cut, "image": latents, "output_type": "np"}
        pictures.append(with_scheduler(refiner, library, name, lambda pipe, a=second: pipe(**a).images))
    assert_same(*pictures)


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "PNDMScheduler"]
)
def test_strengths(refiners: tuple[Any, Any], name: str, strength: float) -> None:
    """Every scheduler takes half of a run below; here those that evaluate once, twice, and once more than asked."""
    options = {"prompt": PROMPT, "image": PICTURE, "strength": strength, "num_inference_steps": 4, "output_type": "np"}
    results = [
        with_scheduler(pipe, library, name, lambda pipe: pipe(**options, generator=seeded()).images)
        for pipe, library in zip(refiners, (minidiff, diffusers), strict=True)
    ]
    assert_same(*results)


@pytest.mark.parametrize("strength", [0.0, 0.001, 0.24])
def test_a_strength_that_leaves_no_step(refiners: tuple[Any, Any], strength: float) -> None:
    """Of four steps 1/4 is the least; the reference breaks inside torch. PNDM evaluates once even so."""
    ours, theirs = refiners
    options = {"prompt": PROMPT, "image": PICTURE, "strength": strength, "num_inference_steps": 4}
    with pytest.raises(ValueError, match=f"strength={strength} of 4 steps leaves no step.*at least 0.25"):
        ours(**options)
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        theirs(**options)
    results = [
        with_scheduler(
            pipe, library, "PNDMScheduler", lambda pipe: pipe(**options, output_type="np", generator=seeded()).images
        )
        for pipe, library in zip(refiners, (minidiff, diffusers), strict=True)
    ]
    assert_same(*results)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(refiners: tuple[Any, Any], name: str) -> None:
    options = {"prompt": PROMPT, "image": PICTURE, "strength": 0.5, "num_inference_steps": 6, "output_type": "np"}
    results = [
        with_scheduler(pipe, library, name, lambda pipe: pipe(**options, generator=seeded()).images)
        for pipe, library in zip(refiners, (minidiff, diffusers), strict=True)
    ]
    assert_same(*results)


CALLS: dict[str, dict[str, Any]] = {
    "a quarter": {"strength": 0.3},
    "strength that rounding makes smaller": {"strength": 0.58, "num_inference_steps": 50},
    "all of it": {"strength": 1.0},
    "guidance off": {"guidance_scale": 1.0},
    "negative prompt": {"negative_prompt": "blue sky"},
    "aesthetic scores": {"aesthetic_score": 9.0, "negative_aesthetic_score": 1.0},
    "original size": {"original_size": (512, 768)},
    "crops": {"crops_coords_top_left": (5, 9), "negative_crops_coords_top_left": (2, 3)},
    "negative original size": {"negative_original_size": (100, 200)},
    "two pictures of one image": {"num_images_per_prompt": 2},
    "two images for four pictures": {
        "image": PICTURE.repeat(2, 1, 1, 1) * torch.tensor([1.0, 0.5]).view(2, 1, 1, 1),
        "prompt": [PROMPT, "a face"],
        "num_images_per_prompt": 2,
    },
    "latents as image": {"image": LATENTS},
    "clean latents, taken over": {"image": LATENTS, "denoising_start": 0.5},
    "taken over at a step": {"image": LATENTS, "denoising_start": 0.499, "num_inference_steps": 10},
    "a picture, taken over": {"denoising_start": 0.5},
    "the middle of a run": {"image": LATENTS, "denoising_start": 0.25, "denoising_end": 0.75},
    "the start of the rest": {"strength": 0.8, "denoising_end": 0.75},
    "noisy latents": {"latents": LATENTS},
    "PIL of an odd size": {"image": Image.fromarray(PIXELS)},
    "list of PIL": {"image": [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)], "num_images_per_prompt": 2},
    "tensor of an odd size": {"image": torch.rand(3, 35, 38, generator=seeded(9), dtype=torch.float64)},
    "tensor from -1 to 1": {"image": PICTURE * 2 - 1},
    "array": {"image": (PIXELS / 255).astype(np.float32)},
    "batch of arrays": {"image": (PIXELS[None, :32, :32] / 127.5 - 1).astype(np.float32)},
    "list of arrays": {"image": [(PIXELS / 255).astype(np.float32)] * 2, "num_images_per_prompt": 2},
    "list of tensors": {"image": [PICTURE[0], 1 - PICTURE[0]], "num_images_per_prompt": 2},
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of pixels from -1 to 1, by both
@pytest.mark.parametrize("name", CALLS)
def test_every_argument(refiners: tuple[Any, Any], name: str) -> None:
    arguments = {"prompt": PROMPT, "image": PICTURE, "strength": 0.6, "num_inference_steps": 5, "output_type": "np"}
    assert_same(*(pipe(**arguments | CALLS[name], generator=seeded()).images for pipe in refiners))


def test_a_list_of_generators(refiners: tuple[Any, Any]) -> None:
    """Each draws the noise of the autoencoder's Gaussian first, then that of the first step."""
    results = []
    for pipe in refiners:
        options = {"num_images_per_prompt": 2, "num_inference_steps": 4, "strength": 0.5, "output_type": "np"}
        results.append(pipe(PROMPT, image=PICTURE, generator=[seeded(1), seeded(2)], **options).images)
    assert_same(*results)


def test_base_as_image_to_image(bases: tuple[Any, Any]) -> None:
    """With the components of base: two text encoders, six sizes, no aesthetic score."""
    results = []
    for pipe, library in zip(bases, (minidiff, diffusers), strict=True):
        other = library.StableDiffusionXLImg2ImgPipeline(**pipe.components)
        other.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 4, "strength": 0.5, "crops_coords_top_left": (3, 4), "output_type": "np"}
        options |= {"target_size": (50, 60), "negative_target_size": (70, 80)}
        results.append(other(PROMPT, "a face", image=PICTURE, generator=seeded(), **options).images)
    assert_same(*results)


def test_turbo(bases: tuple[Any, Any]) -> None:
    """sdxl-turbo's image to image: half of two steps, without guidance, after trailing spacing."""
    results = []
    for pipe, library in zip(bases, (minidiff, diffusers), strict=True):
        scheduler = library.EulerAncestralDiscreteScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="trailing"
        )
        other = library.StableDiffusionXLImg2ImgPipeline(**{**pipe.components, "scheduler": scheduler})
        other.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 2, "strength": 0.5, "guidance_scale": 0.0, "output_type": "np"}
        results.append(other(PROMPT, image=PICTURE, generator=seeded(), **options).images)
    assert_same(*results)


def test_one_run_in_two_halves_is_the_run(bases: tuple[Any, Any]) -> None:
    """With the same network on both sides and a solver that remembers nothing, the cut leaves no trace."""
    base, _ = bases
    second = StableDiffusionXLImg2ImgPipeline(**base.components)
    second.set_progress_bar_config(disable=True)
    options = {"prompt": PROMPT, "num_inference_steps": 10, "seed": 4, "output_type": "latent"}
    whole = base(**options).images
    for cut in (0.12, 0.3, 0.499, 0.5, 0.77, 0.8, 0.95):
        half = list(base.steps(PROMPT, num_inference_steps=10, seed=4, denoising_end=cut))
        options_2 = {"num_inference_steps": 10, "denoising_start": cut, "image": half[-1].latents, "seed": 4}
        rest = list(second.steps(PROMPT, **options_2))
        assert len(half) + len(rest) == 10, cut
        assert torch.equal(rest[-1].latents, whole), cut


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("size", [(37, 45), (4, 4), (32, 33)])
def test_pictures_are_prepared_as_the_reference_s(size: tuple[int, int]) -> None:
    theirs = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=4)
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8))
    tensor = torch.rand(2, 3, *size, generator=seeded(3))
    for image in (
        picture,
        [picture, picture],
        tensor,
        [tensor[0], tensor[1]],
        tensor * 2 - 1,
        torch.randn(1, 4, *size),
    ):
        ours = to_tensor(image, 4, 4)
        assert torch.equal(ours, theirs.preprocess(image))


def test_encoding_in_float32_where_the_config_asks_for_it(tmp_path: Path) -> None:
    """In float32 ours and theirs differ by rounding alone; in bfloat16 a float32 copy encodes."""
    folder = save_refiner(tmp_path, force_upcast=True)
    results = []
    for library in (minidiff, diffusers):
        pipe = library.StableDiffusionXLImg2ImgPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        pipe.to(torch.float32)
        pipe.set_progress_bar_config(disable=True)
        options = {"num_inference_steps": 4, "strength": 0.5, "output_type": "pil"}
        (image,) = pipe(PROMPT, image=PICTURE.float(), generator=seeded(), **options).images
        results.append(np.asarray(image, dtype=int))
    assert abs(results[0] - results[1]).max() <= 1
    ours = StableDiffusionXLImg2ImgPipeline.from_pretrained(folder)
    latents = {}
    for dtype in (torch.float32, torch.bfloat16):
        ours.to(dtype)
        image = ours._read_image(PICTURE)
        latents[dtype] = ours._encode_image(image, 1, seeded(3), torch.zeros(1, dtype=dtype))
        assert latents[dtype].dtype == ours.vae.dtype == dtype
    # What is left is the rounding of weights and latents to bfloat16: measured 4e-3.
    assert relative_error(latents[torch.bfloat16], latents[torch.float32]) < 1e-2


def test_saved_refiner_is_loaded_by_the_reference(refiners: tuple[Any, Any], tmp_path: Path) -> None:
    ours, _ = refiners
    ours.save_pretrained(tmp_path)
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(theirs) is diffusers.StableDiffusionXLImg2ImgPipeline
    assert theirs.text_encoder is None and theirs.config.requires_aesthetics_score is True
    again = minidiff.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is StableDiffusionXLImg2ImgPipeline and again.text_encoder is None
