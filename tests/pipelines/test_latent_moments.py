"""``latents_mean`` and ``latents_std`` of an autoencoder, where each of the reference's pipelines looks at them.

Those of XL decode with them, and image to image encodes with them too; inpainting and editing encode without, and
Stable Diffusion 1.x and 2.x ignore them altogether.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import minidiff
from minidiff.errors import ConfigError
from tests.pictures import assert_same, load, load_both, seeded
from tests.tiny import save_tiny
from tests.tiny_xl import save_base, save_refiner

# Of Playground v2.5: comfyanonymous/ComfyUI, comfy/latent_formats.py (SDXL_Playground_2_5), with scale_factor 0.5 as in
# the reference's loaders/single_file_utils.py (PLAYGROUND_VAE_SCALING_FACTOR).
MOMENTS = {"latents_mean": [-1.6574, 1.886, -1.383, 2.5155], "latents_std": [8.4927, 5.9022, 6.5498, 5.2299]}
SCALING = 0.5
PROMPT = "a red heart over two cats"
PICTURE = torch.rand(1, 3, 32, 32, generator=seeded(6), dtype=torch.float64)
MASK = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
MASK[..., 5:20, 9:30] = 1
IMAGE = {"image": PICTURE, "strength": 0.7}
INPAINT = IMAGE | {"mask_image": MASK, "height": 32, "width": 32}
CASES = {  # what to save, the pipeline, arguments, whether encoding and decoding look at the moments
    "XL": ("base", "StableDiffusionXLPipeline", {}, False, True),
    "XL, image to image": ("base", "StableDiffusionXLImg2ImgPipeline", IMAGE, True, True),
    "refiner": ("refiner", "StableDiffusionXLImg2ImgPipeline", IMAGE, True, True),
    "XL, inpainting": ("base", "StableDiffusionXLInpaintPipeline", INPAINT, False, True),
    "XL, inpainting with 9 channels": ("nine", "StableDiffusionXLInpaintPipeline", INPAINT, False, True),
    "XL, editing": ("eight", "StableDiffusionXLInstructPix2PixPipeline", {"image": PICTURE}, False, True),
    "SD": ("tiny", "StableDiffusionPipeline", {}, False, False),
    "SD, image to image": ("tiny", "StableDiffusionImg2ImgPipeline", IMAGE, False, False),
    "SD, inpainting": ("tiny", "StableDiffusionInpaintPipeline", INPAINT, False, False),
}
SAVED = {
    "base": save_base,
    "nine": lambda folder: save_base(folder, unet={"in_channels": 9}),
    "eight": lambda folder: save_base(folder, unet={"in_channels": 8}),
    "tiny": save_tiny,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: save(tmp_path_factory.mktemp(name)) for name, save in SAVED.items()}
    made["refiner"] = save_refiner(tmp_path_factory.mktemp("refiner"))
    for folder in made.values():
        describe(folder, **MOMENTS, scaling_factor=SCALING)
    return made


def describe(folder: Path, **fields: Any) -> None:
    """Write fields into the configuration of the autoencoder."""
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("name", CASES)
def test_pictures(folders: dict[str, Path], name: str) -> None:
    saved, pipeline, arguments, *_ = CASES[name]
    results = []
    for pipe in load_both(pipeline, folders[saved]):
        options = {"num_inference_steps": 4, "output_type": "np"} | arguments
        results.append(pipe(PROMPT, generator=seeded(), **options).images)
    assert_same(*results)


@pytest.mark.parametrize("name", CASES)
def test_who_looks_at_them(folders: dict[str, Path], name: str) -> None:
    """What is ignored on both sides would be equal too."""
    saved, pipeline, _, encodes, decodes = CASES[name]
    pipe = load(getattr(minidiff, pipeline), folders[saved])
    latents = torch.randn(1, 4, 8, 8, generator=seeded(1), dtype=torch.float64)
    mean, std = (torch.tensor(MOMENTS[field]).double().view(1, 4, 1, 1) for field in ("latents_mean", "latents_std"))
    decoded = latents * std / SCALING + mean if decodes else latents / SCALING
    assert torch.equal(pipe._decoded(latents), pipe.vae.decode(decoded).sample)
    drawn = pipe.vae.encode(PICTURE).latent_dist.sample(seeded(2))
    encoded = (drawn - mean) * SCALING / std if encodes else SCALING * drawn
    assert torch.equal(pipe._encode_image(PICTURE, 1, seeded(2), latents), encoded)


def test_there_and_back(folders: dict[str, Path]) -> None:
    """Scaling undoes unscaling; and one of the two fields alone counts for nothing, as in the reference."""
    pipe = minidiff.StableDiffusionXLImg2ImgPipeline.from_pretrained(folders["base"])
    x = torch.randn(2, 4, 3, 3, generator=seeded(1), dtype=torch.float64)
    assert (pipe._scaled(pipe._unscaled(x, pipe.vae), pipe.vae) - x).abs().max() < 1e-14  # measured 2e-15
    vae = minidiff.AutoencoderKL.from_config(pipe.vae.config, latents_mean=None)
    assert torch.equal(pipe._unscaled(x, vae), x / SCALING) and torch.equal(pipe._scaled(x, vae), SCALING * x)


def test_they_are_saved(folders: dict[str, Path], tmp_path: Path) -> None:
    minidiff.AutoencoderKL.from_pretrained(folders["base"], subfolder="vae").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).items() >= MOMENTS.items()


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("latents_mean", [0.0] * 3, "latents_mean should be null or 4 numbers"),
        ("latents_mean", 0.5, "found 0.5"),
        ("latents_mean", [0, 0, 0, "1"], "found"),
        ("latents_std", [1.0, 1.0, 0.0, 1.0], r"latents_std should be null or 4 positive numbers.*\[1.0, 1.0, 0.0"),
    ],
)
def test_a_number_for_each_channel(field: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        minidiff.AutoencoderKL(latent_channels=4, **{field: value})
