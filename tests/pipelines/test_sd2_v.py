"""Stable Diffusion 2 and 2.1 at 768: v-prediction, seed for seed, on a tiny twin of exactly their topology.

Every field of the published configurations is kept but the widths: 4 levels, 2 layers each, 23 layers of text, heads of
one width in all levels, linear projections, the upcast of 2.1, latents of 96 x 96.
"""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import minidiff
from tests.pictures import assert_same, load_both, seeded
from tests.theirs import diffusers, randomize, transformers
from tests.tiny_xl import vocabulary

CONFIGS = Path(__file__).parents[1] / "data" / "hub_configs"
LIBRARIES = (minidiff, diffusers)
SCHEDULERS = [  # one of each kind; the schedulers' own tests compare v-prediction in all of them
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
]
PROMPT = "a red heart over two cats"
SCHEDULER = {  # as published
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
NARROW = {
    "unet": {"block_out_channels": [8, 16, 32, 32], "attention_head_dim": [1, 2, 4, 4], "norm_num_groups": 4}
    | {"cross_attention_dim": 24},
    "vae": {"block_out_channels": [4, 8, 8, 8], "norm_num_groups": 4},
    "text_encoder": {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2},
}


def twin(repo: str, part: str) -> dict[str, Any]:
    published = json.loads((CONFIGS / f"stabilityai--{repo}" / part / "config.json").read_text())
    return {name: value for name, value in published.items() if name[0] != "_"} | NARROW[part]


def save_twin(repo: str, folder: Path) -> Path:
    vocab, merges = vocabulary()
    text = twin(repo, "text_encoder") | {"vocab_size": len(vocab), "torch_dtype": "float32"}
    diffusers.StableDiffusionPipeline(
        vae=randomize(diffusers.AutoencoderKL(**twin(repo, "vae")), seed=1),
        text_encoder=randomize(transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)), seed=2),
        tokenizer=transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77, pad_token="!"),
        unet=randomize(diffusers.UNet2DConditionModel(**twin(repo, "unet")), seed=3),
        scheduler=diffusers.DDIMScheduler.from_config(SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Ours and theirs of 2.1 from the same files, in float64 so that only a wrong formula can make a difference."""
    return load_both("StableDiffusionPipeline", save_twin("stable-diffusion-2-1", tmp_path_factory.mktemp("twin")))


def test_the_twin_is_what_is_published(pipes: tuple[Any, Any]) -> None:
    ours, theirs = pipes
    assert len(ours.text_encoder.state_dict()) == len(theirs.text_encoder.state_dict()) == 23 * 16 + 4
    assert len(ours.unet.state_dict()) == len(theirs.unet.state_dict()) == 686
    assert ours.unet.config.sample_size == 96 and ours._latent_size(None, None) == (96, 96)
    assert ours.vae_scale_factor == theirs.vae_scale_factor == 8
    assert ours.scheduler.config.prediction_type == "v_prediction" and ours.unet.config.upcast_attention is True


def run(pipe: Any, library: Any, name: str, task: str = "", **arguments: Any) -> np.ndarray:
    """Draw with another scheduler, and for image tasks with the pipeline of that name made of the same parts."""
    parts = pipe.components | {"scheduler": getattr(library, name).from_config(pipe.scheduler.config)}
    other = getattr(library, f"StableDiffusion{task}Pipeline")(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other(PROMPT, generator=seeded(), output_type="np", **arguments).images


SIZE = {"height": 64, "width": 48}


def test_at_768(pipes: tuple[Any, Any]) -> None:
    """The size that nobody asked for is that of training; in float32, where the pictures are equal to the bit."""
    pictures = []
    for pipe, library in zip(pipes, LIBRARIES, strict=True):
        parts = {name: copy.deepcopy(part) for name, part in pipe.components.items()}
        single = library.StableDiffusionPipeline(**parts, requires_safety_checker=False).to(torch.float32)
        pictures.append(run(single, library, "DDIMScheduler", num_inference_steps=1, guidance_scale=1.0))
    assert pictures[0].shape == (1, 768, 768, 3)
    levels = [(picture * 255).round() for picture in pictures]
    assert pictures[1].std() > 0.05 and abs(levels[0] - levels[1]).max() <= 1  # measured: 0


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(pipes: tuple[Any, Any], name: str) -> None:
    """PNDM among them, which mixes the v of several steps as they are."""
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "guidance_rescale": 0.7, **SIZE}
    ours, theirs = (run(pipe, library, name, **options) for pipe, library in zip(pipes, LIBRARIES, strict=True))
    assert_same(ours, theirs)


PICTURE = torch.rand(1, 3, 64, 48, generator=seeded(6), dtype=torch.float64)
MASK = torch.zeros(1, 1, 64, 48)
MASK[..., 20:50, 8:40] = 1


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
def test_image_tasks(pipes: tuple[Any, Any], name: str, task: str) -> None:
    options = {"image": PICTURE, "strength": 0.75, "num_inference_steps": 4}
    options |= {"mask_image": MASK, **SIZE} if task == "Inpaint" else {}
    ours, theirs = (run(pipe, library, name, task, **options) for pipe, library in zip(pipes, LIBRARIES, strict=True))
    assert_same(ours, theirs)


def test_pndm_mixes_what_the_network_says(pipes: tuple[Any, Any]) -> None:
    """The reference's PNDM mixes v as other solvers mix eps, where the multistep formula is one of eps.

    Taken over as it is, for equal pictures; mixing the eps that v implies gives others.
    """
    ours, theirs = pipes
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, **SIZE}
    mixed_v = run(ours, minidiff, "PNDMScheduler", **options)
    assert_same(mixed_v, run(theirs, diffusers, "PNDMScheduler", **options))

    scheduler = minidiff.PNDMScheduler.from_config(ours.scheduler.config)
    of_eps = minidiff.PNDMScheduler.from_config(ours.scheduler.config, prediction_type="epsilon")
    plan, past = scheduler.plan(4), ()
    ctx = ours.encode_prompt(PROMPT, "cpu", 1, False)[0]
    x = torch.randn(1, 4, 8, 6, generator=seeded(), dtype=torch.float64)
    for i, t in enumerate(plan.timesteps):
        alpha_bar = scheduler.alphas_cumprod[t].double()
        eps = alpha_bar.sqrt() * ours.unet(x, t, ctx).sample + (1 - alpha_bar).sqrt() * x
        x, past = of_eps.advance(plan, i, x, eps, past)
    assert abs(ours.decode(x, "np") - mixed_v).max() > 0.01


def test_without_the_upcast_of_2_1(tmp_path: Path) -> None:
    """Stable Diffusion 2 is the same network; its file says nothing of an upcast."""
    pipes = load_both("StableDiffusionPipeline", save_twin("stable-diffusion-2", tmp_path))
    assert pipes[0].unet.config.upcast_attention is False
    for name in ("DDIMScheduler", "PNDMScheduler"):
        options = {"num_inference_steps": 3, **SIZE}
        assert_same(*(run(pipe, library, name, **options) for pipe, library in zip(pipes, LIBRARIES, strict=True)))
