"""A tiny autoencoder as ``pipe.vae``, in every task of both families, against the reference's pictures."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import minidiff
from minidiff import AutoencoderTiny, AutoPipelineForImage2Image, DiffusionPipeline, fast
from minidiff.errors import ConfigError
from tests.networks.test_vae_tiny import small
from tests.pictures import load_both, quiet, seeded
from tests.pipelines.test_memory import call, enable, fake_device, make, networks, size
from tests.single_files import states_equal
from tests.theirs import diffusers, randomize
from tests.tiny import save_tiny
from tests.tiny_xl import save_base

PICTURE = torch.rand(1, 3, 32, 32, generator=seeded(6), dtype=torch.float64)
MASK = torch.zeros(1, 1, 32, 32)
MASK[..., 5:20, 9:30] = 1
SAVERS: dict[str, Callable[..., Path]] = {"StableDiffusion": save_tiny, "StableDiffusionXL": save_base}
IMAGE = {"image": PICTURE, "strength": 0.7, "num_inference_steps": 3}
HOLE = IMAGE | {"mask_image": MASK, "height": 32, "width": 32}
TASKS: dict[str, tuple[int, dict[str, Any]]] = {  # the end of the name -> channels of the UNet, arguments
    "Pipeline": (4, {"num_inference_steps": 2}),
    "Img2ImgPipeline": (4, IMAGE),
    "InpaintPipeline": (4, HOLE),
    "InpaintPipeline of 9 channels": (9, HOLE),
    "InpaintPipeline of 9 channels, all steps": (9, HOLE | {"strength": 1.0}),
    "InstructPix2PixPipeline": (8, {"image": PICTURE, "num_inference_steps": 2}),
}

MANY = ("Img2ImgPipeline", "InpaintPipeline")  # tasks that are also tried with one generator for each picture


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """Checkpoints of the reference whose ``vae`` is a tiny autoencoder of 4 pixels per latent, as their index says."""

    @lru_cache
    def save(family: str, channels: int) -> Path:
        plain = SAVERS[family](tmp_path_factory.mktemp("plain"), unet={"in_channels": channels})
        pipe = getattr(diffusers, f"{family}Pipeline").from_pretrained(plain)
        pipe.vae = diffusers.AutoencoderTiny(**small(levels=3, scaling_factor=0.8))  # 1 as published
        randomize(pipe.vae, seed=5, scale=1.3)
        folder = tmp_path_factory.mktemp("tiny")
        pipe.save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", SAVERS)
def test_pictures_of_every_task(saved: Callable[[str, int], Path], family: str, task: str) -> None:
    """In float64, with one generator and with one for each picture: nothing is drawn for the latents of an image."""
    channels, options = TASKS[task]
    ours, theirs = load_both(family + task.split(" ")[0], saved(family, channels))
    assert type(ours.vae) is AutoencoderTiny and ours.vae_scale_factor == theirs.vae_scale_factor == 4
    if "mask_image" in options:  # the reference rounds images and masks in another dtype than its UNet's
        torch.set_default_dtype(torch.float64)
    try:
        for many in (False, True) if task in MANY else (False,):
            found = []
            for pipe in (ours, theirs):
                generator = [seeded(1), seeded(2)] if many else seeded(3)
                prompt = ["a red heart over two cats"] * (2 if many else 1)
                images = options | ({"image": PICTURE.repeat(2, 1, 1, 1)} if many and "image" in options else {})
                found.append(pipe(prompt, **images, generator=generator, guidance_scale=3.0, output_type="np").images)
            assert found[1].std() > 0.05
            assert np.abs(found[0] - found[1]).max() * 255 <= 1  # measured: 0 and, for XL, at most 2e-4
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("family", SAVERS)
def test_exchanged_given_and_kept(saved: Callable[[str, int], Path], family: str, tmp_path: Path) -> None:
    """As ``pipe.vae = ...``, as ``vae=...``, and in the index of a checkpoint that is saved and loaded."""
    folder = saved(family, 4)
    cls, options = getattr(minidiff, f"{family}Pipeline"), {"num_inference_steps": 2, "seed": 1, "output_type": "np"}
    quiet(pipe := DiffusionPipeline.from_pretrained(folder))
    expected = pipe("red", **options).images
    tiny = AutoencoderTiny.from_pretrained(folder, subfolder="vae")
    SAVERS[family](plain := tmp_path / "plain")
    for other in (cls.from_pretrained(plain, vae=tiny), cls.from_pretrained(plain)):
        other.vae = tiny
        assert np.array_equal(quiet(other)("red", **options).images, expected)
        assert AutoPipelineForImage2Image.from_pipe(other).vae is tiny
        other.save_pretrained(tmp_path / "saved")
        theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")
        assert type(theirs.vae) is diffusers.AutoencoderTiny and states_equal(theirs.vae, tiny)
        assert type(DiffusionPipeline.from_pretrained(tmp_path / "saved").vae) is AutoencoderTiny


def test_wrong_number_of_latent_channels(saved: Callable[[str, int], Path]) -> None:
    with pytest.raises(ConfigError, match="for 16 latent channels"):
        DiffusionPipeline.from_pretrained(saved("StableDiffusion", 4), vae=AutoencoderTiny(latent_channels=16))


def tiny_pipe(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a pipeline with a tiny autoencoder of 2 pixels per latent, and random weights."""
    pipe = make(name, dtype)
    pipe.vae = randomize(AutoencoderTiny(**small(encoder=8, decoder=8, levels=2)), seed=5, scale=1.3).to(dtype)
    return pipe


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"])
def test_xl_leaves_it_in_float16(name: str) -> None:
    """Where ``AutoencoderKL`` overflows and is used in float32."""
    pipe = tiny_pipe(name, torch.float16)
    assert pipe._decoder() is pipe._encoder() is pipe.vae
    seen = []
    pipe.vae.decoder.register_forward_hook(lambda module, args, out: seen.append(args[0].dtype))
    pipe.vae.encoder.register_forward_hook(lambda module, args, out: seen.append(args[0].dtype))
    assert np.isfinite(call(pipe)).all()
    assert set(seen) == {torch.float16}


@pytest.mark.parametrize("kind", ["model", "sequential"])
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLInpaintPipeline"])
def test_offloaded(name: str, kind: str) -> None:
    """The same picture; every weight is on the device while it is used, and none of them afterwards."""
    pipe = tiny_pipe(name)
    before = call(pipe)
    with fake_device(enable(pipe, kind)) as device:
        after = call(pipe)
    assert before.std() > 0.02 and np.array_equal(after, before)
    assert device.bytes == 0 and "vae" in device.fetched
    if kind == "model":
        assert device.peak == max(map(size, networks(pipe).values()))


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLImg2ImgPipeline"])
def test_slices_and_tiles(name: str) -> None:
    pipe = tiny_pipe(name)
    arguments = {"num_images_per_prompt": 2}
    before = call(pipe, **arguments)
    pipe.enable_vae_slicing()
    pipe.enable_vae_tiling()  # one tile
    assert np.abs(call(pipe, **arguments) - before).max() < 1e-4  # measured: 6e-6
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size, pipe.vae.tile_overlap_factor = 8, 4, 0.5
    assert np.abs(call(pipe, **arguments) - before).max() > 1e-3
    pipe.disable_vae_slicing(), pipe.disable_vae_tiling()
    assert np.array_equal(call(pipe, **arguments), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimized(dtype: torch.dtype) -> None:
    """Large enough that each faster way is taken: 64 channels, as published."""
    vae = randomize(AutoencoderTiny(num_encoder_blocks=[1, 1], num_decoder_blocks=[1, 1], **WIDE)).to(dtype)
    x, z = PICTURE.to(dtype), torch.randn(1, 4, 16, 16, generator=seeded()).to(dtype)
    with torch.no_grad():
        before = vae.encode(x).latents, vae.decode(z).sample
        fast.optimize(vae)
        after = vae.encode(x).latents, vae.decode(z).sample
        assert any(isinstance(value, fast.Fast) for m in vae.modules() for value in vars(m).values())
        fast.restore(vae)
        again = vae.encode(x).latents, vae.decode(z).sample
    for one, two, three in zip(before, after, again, strict=True):
        assert torch.equal(one, three)
        error = (two - one).float().norm() / one.float().norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)  # measured: 6e-7 and 2e-3


WIDE = {"encoder_block_out_channels": [64, 64], "decoder_block_out_channels": [64, 64]}


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLImg2ImgPipeline"])
def test_optimized_pipeline(name: str) -> None:
    pipe = tiny_pipe(name)
    before = call(pipe)
    pipe.optimize()
    assert np.abs(call(pipe) - before).max() * 255 < 1  # measured: 0.05


def test_pictures_of_another_program() -> None:
    """``AutoencoderTiny`` by hand, as tutorials do: the scale that is divided by is 1."""
    pipe = tiny_pipe("StableDiffusionPipeline")
    latents = call(pipe, output_type="latent")
    by_hand = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    pixels = pipe.image_processor.postprocess(by_hand.detach(), "pil")[0]
    assert isinstance(pixels, Image.Image)
    assert np.array_equal(np.asarray(pixels), np.asarray(pipe.decode(latents)[0]))
