"""Outputs of published checkpoints, as diffusers' own tests state them: ``pytest --network`` with this file.

They download up to 4 GB for each Stable Diffusion checkpoint. The numbers were computed on other machines, some with
GPUs; the tolerances are those of diffusers' tests.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import hf_hub_download

import minidiff

pytestmark = [pytest.mark.network, pytest.mark.timeout(3600)]
PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "published_outputs.json").read_text())
PROMPT = "a photograph of an astronaut riding a horse"


def close(found, expected, tolerance, relative=0.0):
    found = torch.as_tensor(np.asarray(found)).flatten().double()
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=tolerance, rtol=relative)


def stored_noise(seed, *shape):
    """The inputs of diffusers' tests are stored, so that every device starts from the same."""
    name = f"gaussian_noise_s={seed}_shape={'_'.join(map(str, shape))}.npy"
    return torch.from_numpy(np.load(hf_hub_download("fusing/diffusers-testing", name, repo_type="dataset")))


@torch.no_grad()
@pytest.mark.parametrize("repo", PUBLISHED["unconditional"]["expected"])
def test_unconditional_unet(repo):
    unet = minidiff.UNet2DModel.from_pretrained(repo)
    torch.manual_seed(0)
    side = unet.config.sample_size
    sample = unet(torch.randn(1, unet.config.in_channels, side, side), torch.tensor([10])).sample
    close(sample[0, 0, 0, :30], PUBLISHED["unconditional"]["expected"][repo], PUBLISHED["unconditional"]["tolerance"])


@torch.no_grad()
@pytest.mark.parametrize("published", PUBLISHED["unets"], ids=lambda p: p["repo"])
def test_conditional_unet(published):
    unet = minidiff.UNet2DConditionModel.from_pretrained(published["repo"], subfolder=published["subfolder"])
    side, D = unet.config.sample_size, unet.config.cross_attention_dim
    for row in published["rows"]:
        x, ctx = stored_noise(row["seed"], 4, unet.config.in_channels, side, side), stored_noise(row["seed"], 4, 77, D)
        sample = unet(x, int(row["timestep"]), ctx).sample
        close(sample[-1, -2:, -2:, :2], row["expected"], published["tol"])


@torch.no_grad()
def test_autoencoder():
    vae = minidiff.AutoencoderKL.from_pretrained(PUBLISHED["vae"]["repo"], subfolder="vae")
    mode, decode = PUBLISHED["vae"]["rows"]
    for row in mode["rows"]:
        close(vae(stored_noise(row["seed"], 4, 3, 512, 512)).sample[-1, -2:, -2:, :2], row["expected"], mode["tol"])
    for row in decode["rows"]:
        pixels = vae.decode(stored_noise(row["seed"], 3, 4, 64, 64)).sample
        close(pixels[-1, -2:, :2, -2:], row["expected"], decode["tol"])


@torch.no_grad()
@pytest.mark.parametrize("published", PUBLISHED["small"], ids=lambda p: p["repo"])
def test_small_networks(published):
    network = getattr(minidiff, published["model"]).from_pretrained(published["repo"])
    side = network.config.sample_size
    x = torch.randn(1, network.config.in_channels, side, side, generator=torch.manual_seed(0))
    if published["model"] == "UNet2DModel":
        sample = network(x, torch.tensor([10])).sample
    else:
        sample = network(x, sample_posterior=True, generator=torch.Generator().manual_seed(0)).sample
    close(sample[0, -1, -3:, -3:], published["expected"], 0.0, relative=published["tolerance"])


@pytest.mark.parametrize("row", PUBLISHED["text_to_image"]["rows"], ids=lambda r: f"{r['repo']} {r['scheduler']}")
def test_text_to_image(row):
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(row["repo"])
    if row["scheduler"] is not None:
        pipe.scheduler = getattr(minidiff, row["scheduler"]).from_config(pipe.scheduler.config, **row["options"])
    latents = torch.from_numpy(np.random.RandomState(0).standard_normal((1, 4, 64, 64))).float()
    out = pipe(PROMPT, latents=latents, num_inference_steps=row["steps"], output_type="np")
    close(out.images[0, -3:, -3:, -1], row["expected"], row["tolerance"])


@pytest.mark.parametrize(
    "row", PUBLISHED["ddpm"]["rows"], ids=lambda r: f"{r['repo']} {r['pipeline']} {r['scheduler']}"
)
def test_unconditional_pipelines(row):
    pipe = getattr(minidiff, row["pipeline"]).from_pretrained(row["repo"])
    if row["scheduler"] is not None:
        pipe.scheduler = getattr(minidiff, row["scheduler"])()
    out = pipe(generator=torch.manual_seed(0), output_type="np")
    close(out.images[0, -3:, -3:, -1], row["expected"], row["tolerance"])
