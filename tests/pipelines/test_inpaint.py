"""Inpainting with Stable Diffusion 1.x, seed for seed: StableDiffusionInpaintPipeline against the reference's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import minidiff
from minidiff import StableDiffusionInpaintPipeline, StableDiffusionPipeline
from tests.pictures import assert_same_latents, seeded
from tests.theirs import diffusers
from tests.tiny import save_tiny

SCHEDULERS = [name for name in minidiff.__all__ if name.endswith("Scheduler")]
PROMPT = "a red heart over two cats"
RUNS = [(name, 4, strength) for name in SCHEDULERS for strength in (1.0, 0.7)]
RUNS += [(f"{name}Scheduler", 9, 0.7) for name in ("EulerDiscrete", "HeunDiscrete", "PNDM")]
Pipes = dict[int, tuple[Any, Any]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Checkpoints with a UNet that reads latents alone, and with one that was trained to inpaint."""
    make = tmp_path_factory.mktemp
    return {n: save_tiny(make(f"unet{n}"), unet={"in_channels": n}) for n in (4, 9)}


@pytest.fixture(scope="module")
def pipes(folders: dict[int, Path]) -> Pipes:
    """Ours and theirs from the same files, in float64 so that only a wrong formula can make a difference."""
    return {n: tuple(load(library, folder) for library in (minidiff, diffusers)) for n, folder in folders.items()}


def load(library: Any, folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    pipe = library.StableDiffusionInpaintPipeline.from_pretrained(folder, torch_dtype=dtype, safety_checker=None)
    pipe.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PICTURE = torch.rand(1, 3, 32, 32, generator=seeded(6), dtype=torch.float64)
LATENTS = torch.randn(1, 4, 8, 8, generator=seeded(7), dtype=torch.float64)
MASK = (torch.rand(1, 1, 32, 32, generator=seeded(8)) > 0.6).double()
PIXELS = np.random.default_rng(0).integers(0, 256, (72, 90, 4), dtype=np.uint8)


def drawn_mask(mode: str = "L") -> Image.Image:
    """Return a mask of the size of PIXELS: an ellipse, soft at one side."""
    mask = Image.new("L", (90, 72))
    ImageDraw.Draw(mask).ellipse((40, 20, 60, 50), fill=255)
    ImageDraw.Draw(mask).rectangle((30, 25, 45, 40), fill=100)
    return mask.convert(mode)


@pytest.mark.parametrize("name, channels, strength", RUNS)
def test_every_scheduler(pipes: Pipes, name: str, channels: int, strength: float) -> None:
    results = []
    for pipe, library in zip(pipes[channels], (minidiff, diffusers), strict=True):
        original = pipe.scheduler
        pipe.scheduler = getattr(library, name).from_config(original.config)
        options = {"num_inference_steps": 3, "strength": strength, "guidance_scale": 1.0, "output_type": "latent"}
        results.append(pipe(PROMPT, PICTURE, MASK, generator=seeded(), **options).images)
        pipe.scheduler = original
    assert_same_latents(*results, name)


CALLS: dict[str, dict[str, Any]] = {
    "a third": {"strength": 0.34, "num_inference_steps": 3},
    "three quarters": {"strength": 0.75, "num_inference_steps": 4},
    "guidance off": {"guidance_scale": 1.0},
    "negative prompt": {"negative_prompt": "blue sky"},
    "size": {"height": 40, "width": 24},
    "two pictures of one image": {"num_images_per_prompt": 2},
    "two images for four pictures": {
        "image": PICTURE.repeat(2, 1, 1, 1) * torch.tensor([1.0, 0.5]).view(2, 1, 1, 1),
        "prompt": [PROMPT, "a face"],
        "num_images_per_prompt": 2,
    },
    "two masks for one image": {"mask_image": torch.cat([MASK, 1 - MASK]), "num_images_per_prompt": 2},
    "two masks for two images": {
        "image": [PICTURE[0], 1 - PICTURE[0]],
        "mask_image": [MASK[0], 1 - MASK[0]],
        "num_images_per_prompt": 4,
    },
    "embeddings": {
        "prompt": None,
        "prompt_embeds": torch.randn(1, 77, 24, generator=seeded(5), dtype=torch.float64),
        "negative_prompt_embeds": torch.randn(1, 77, 24, generator=seeded(8), dtype=torch.float64),
    },
    "noise": {"latents": LATENTS},
    "noise at half strength": {"latents": LATENTS, "strength": 0.5},
    "masked latents": {"masked_image_latents": LATENTS},
    "masked pixels": {"masked_image_latents": PICTURE * 2 - 1},
    "latents as image": {"image": LATENTS, "masked_image_latents": LATENTS + 1},
    "latents as image at half strength": {"image": LATENTS, "masked_image_latents": LATENTS + 1, "strength": 0.5},
    "nothing to keep": {"mask_image": torch.ones(1, 1, 32, 32)},
    "nothing to repaint": {"mask_image": torch.zeros(1, 1, 32, 32)},
    "PIL": {"image": Image.fromarray(PIXELS[..., :3]), "mask_image": drawn_mask()},
    "PIL masks in other modes": {
        "image": Image.fromarray(PIXELS[..., :3]),
        "mask_image": [drawn_mask("1"), drawn_mask("RGBA")],
        "num_images_per_prompt": 2,
    },
    "arrays": {"image": PIXELS[..., :3] / 255, "mask_image": np.asarray(drawn_mask())},
    "a tensor from -1 to 1": {"image": PICTURE * 2 - 1},
    "list of generators": {"generator": [seeded(1), seeded(2)], "num_images_per_prompt": 2},
    "list of generators at half strength": {
        "generator": [seeded(1), seeded(2), seeded(3), seeded(4)],
        "image": [PICTURE[0], 1 - PICTURE[0]],
        "num_images_per_prompt": 4,
        "strength": 0.5,
    },
}


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:image has values:FutureWarning")
def test_every_argument(pipes: Pipes, name: str, channels: int) -> None:
    """With a solver that draws noise at each step, so that a draw too many or too few would show."""
    arguments = {"prompt": PROMPT, "image": PICTURE, "mask_image": MASK, "num_inference_steps": 2} | CALLS[name]
    results = []
    for pipe, library in zip(pipes[channels], (minidiff, diffusers), strict=True):
        drawn = arguments.get("generator", seeded())
        drawn = [one.manual_seed(k) for k, one in enumerate(drawn)] if isinstance(drawn, list) else drawn
        original = pipe.scheduler
        pipe.scheduler = library.DDPMScheduler.from_config(original.config)
        results.append(pipe(**arguments | {"generator": drawn}, output_type="latent").images)
        pipe.scheduler = original
    assert_same_latents(*results)


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("mode, pad", [("RGB", 0), ("RGB", 20), ("RGBA", 5), ("L", 9), ("P", 40)])
def test_an_enlarged_view_of_the_part_around_the_mask(
    folders: dict[int, Path], pipes: Pipes, channels: int, mode: str, pad: int
) -> None:
    """The picture keeps its size and, where the mask is black, every pixel."""
    rgba = Image.fromarray(PIXELS)
    picture = rgba if mode == "RGBA" else rgba.convert("RGB").convert(mode)
    options = {"padding_mask_crop": pad, "num_inference_steps": 2, "strength": 0.9}
    ours, theirs = (
        np.asarray(pipe(PROMPT, picture, drawn_mask(), generator=seeded(), **options).images[0], dtype=int)
        for pipe in pipes[channels]
    )
    assert ours.shape == (72, 90, 3)
    assert abs(ours - theirs).max() <= 1  # measured: 0
    if mode != "RGBA":
        black = np.asarray(drawn_mask()) == 0
        assert np.array_equal(ours[black], np.asarray(picture.convert("RGB"))[black])


@pytest.mark.parametrize("channels", [4, 9])
def test_pictures_are_at_most_one_level_apart(folders: dict[int, Path], channels: int) -> None:
    """In float32, as people run it, from pictures of PIL to pictures of PIL."""
    results = []
    for library in (minidiff, diffusers):
        pipe = load(library, folders[channels], torch.float32)
        options = {"image": Image.fromarray(PIXELS[..., :3]), "mask_image": drawn_mask(), "num_inference_steps": 4}
        images = pipe(PROMPT, **options, num_images_per_prompt=2, strength=0.8, generator=seeded()).images
        results.append(np.stack([np.asarray(image, dtype=int) for image in images]))
    assert results[0].shape == (2, 32, 32, 3) and results[0].std() > 10
    assert abs(results[0] - results[1]).max() <= 1  # measured: 0


def test_what_is_kept_is_kept_to_the_last_bit(pipes: Pipes) -> None:
    """With a UNet that reads latents alone; the other one only sees what there is."""
    ours, _ = pipes[4]
    options = {"image": LATENTS, "mask_image": MASK, "num_inference_steps": 3, "output_type": "latent", "seed": 1}
    black = torch.nn.functional.interpolate(MASK, size=(8, 8)).expand_as(LATENTS) == 0
    out = ours(PROMPT, **options).images
    assert torch.equal(out[black], LATENTS.float().double()[black])
    assert (out - LATENTS)[~black].abs().min() > 1e-6


def test_latents_as_image_need_no_masked_latents_where_no_unet_reads_them(pipes: Pipes) -> None:
    """The reference's pipeline fails here, its SDXL pipeline does not."""
    ours, _ = pipes[4]
    options = {"image": LATENTS, "mask_image": MASK, "num_inference_steps": 3, "output_type": "latent", "seed": 1}
    assert torch.equal(ours(PROMPT, **options).images, ours(PROMPT, **options, masked_image_latents=LATENTS).images)


@pytest.mark.parametrize("channels", [4, 9])
def test_callbacks(pipes: Pipes, channels: int) -> None:
    """They may also see and change the mask and the latents of the masked image, and stop."""
    results, seen = [], []
    names = ["latents", "prompt_embeds", "mask", "masked_image_latents"]
    for pipe in pipes[channels]:
        found: list[Any] = []

        def change(pipe: Any, i: int, t: Any, tensors: dict[str, Any], found: list[Any] = found) -> dict[str, Any]:
            sums = {name: x.double().sum().item() for name, x in tensors.items()}
            found.append((i, int(t), pipe.num_timesteps, sums))
            pipe._interrupt = i == 3
            return {"mask": 1 - tensors["mask"], "masked_image_latents": tensors["masked_image_latents"] * 0.5}

        options = {"num_inference_steps": 5, "output_type": "latent", "generator": seeded()}
        options |= {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names}
        results.append(pipe(PROMPT, PICTURE, MASK, **options).images)
        seen.append(found)
    assert len(seen[0]) == 4 and [one[:3] for one in seen[0]] == [one[:3] for one in seen[1]]
    for ours, theirs in zip(*seen, strict=True):
        assert ours[3] == pytest.approx(theirs[3], rel=1e-9)  # measured: 1e-14
    assert_same_latents(*results)


def test_outdated_schedulers_are_corrected(pipes: Pipes) -> None:
    """Other fields than for text to image: clip_sample stays."""
    for name, outdated, corrected in (
        ("PNDMScheduler", {"steps_offset": 0, "skip_prk_steps": False}, {"steps_offset": 1, "skip_prk_steps": True}),
        ("DDIMScheduler", {"steps_offset": 0, "clip_sample": True}, {"steps_offset": 1, "clip_sample": True}),
    ):
        results = []
        for pipe, library in zip(pipes[4], (minidiff, diffusers), strict=True):
            scheduler = getattr(library, name)(**outdated)
            built = type(pipe)(**{**pipe.components, "scheduler": scheduler}, requires_safety_checker=False)
            assert {field: built.scheduler.config[field] for field in corrected} == corrected
            built.set_progress_bar_config(disable=True)
            options = {"num_inference_steps": 3, "output_type": "latent", "generator": seeded()}
            results.append(built(PROMPT, PICTURE, MASK, **options).images)
        assert_same_latents(*results)


@pytest.mark.parametrize("channels", [4, 9])
def test_a_picture_is_the_same_alone_and_in_a_batch(pipes: Pipes, channels: int) -> None:
    """With a seed for each picture always; with a list of generators where there is an image for each."""
    ours, _ = pipes[channels]
    original = ours.scheduler
    ours.scheduler = minidiff.EulerAncestralDiscreteScheduler.from_config(original.config)
    options = {"mask_image": MASK, "strength": 0.7, "num_inference_steps": 4, "output_type": "pt"}
    batch = ours(PROMPT, PICTURE, num_images_per_prompt=4, seed=20, **options)
    four = PICTURE.repeat(4, 1, 1, 1)
    listed = ours(PROMPT, four, num_images_per_prompt=4, generator=[seeded(20 + k) for k in range(4)], **options)
    assert batch.seeds == [20, 21, 22, 23]
    for k in (0, 3):
        alone = ours(PROMPT, PICTURE, generator=seeded(20 + k), **options)
        torch.testing.assert_close(alone.images[0], batch.images[k], rtol=0, atol=1e-13)
        torch.testing.assert_close(alone.images[0], listed.images[k], rtol=0, atol=1e-13)
    ours.scheduler = original


@pytest.mark.parametrize("channels", [4, 9])
def test_steps_yields_what_a_call_computes(pipes: Pipes, channels: int) -> None:
    ours, _ = pipes[channels]
    arguments = {"image": PICTURE, "mask_image": MASK, "strength": 0.5, "num_inference_steps": 6, "seed": 3}
    steps = list(ours.steps(PROMPT, **arguments))
    assert [step.index for step in steps] == list(range(4))  # PNDM evaluates once more than it takes steps
    assert torch.equal(steps[-1].latents, ours(PROMPT, **arguments, output_type="latent").images)


def test_processors_are_the_reference_s(pipes: Pipes) -> None:
    """``pipe.mask_processor.blur`` and the rest, as the reference's tutorials use them."""
    ours, theirs = pipes[9]
    for name in ("image_processor", "mask_processor"):
        mine, other = getattr(ours, name), getattr(theirs, name).config
        assert {field: getattr(mine, field) for field in vars(mine)} == {field: other[field] for field in vars(mine)}


def test_saved_pipeline_is_loaded_by_the_reference(pipes: Pipes, tmp_path: Path) -> None:
    ours, _ = pipes[9]
    ours.save_pretrained(tmp_path)
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)) is diffusers.StableDiffusionInpaintPipeline
    assert type(minidiff.DiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionInpaintPipeline


def test_components_are_shared(folders: dict[int, Path]) -> None:
    text_to_image = StableDiffusionPipeline.from_pretrained(folders[4])
    other = StableDiffusionInpaintPipeline.from_pipe(text_to_image)
    assert all(getattr(other, name) is part for name, part in text_to_image.components.items())
