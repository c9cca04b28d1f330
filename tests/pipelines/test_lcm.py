"""UNets that are told the guidance scale (LCM) are asked once per step, in every pipeline as in the reference's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import minidiff
from tests.theirs import diffusers, randomize
from tests.tiny import save_tiny
from tests.tiny_xl import save_base

WIDTH = 9
PICTURE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MASK = (torch.arange(32)[None, None, None] > 12).double().expand(1, 1, 32, 32)
TASKS = {
    "StableDiffusionPipeline": {},
    "StableDiffusionImg2ImgPipeline": {"image": PICTURE, "strength": 0.7},
    "StableDiffusionInpaintPipeline": {"image": PICTURE, "mask_image": MASK, "height": 32, "width": 32},
    "StableDiffusionXLPipeline": {},
    "StableDiffusionXLImg2ImgPipeline": {"image": PICTURE, "strength": 0.7},
    "StableDiffusionXLInpaintPipeline": {"image": PICTURE, "mask_image": MASK, "height": 32, "width": 32},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A tiny pipeline each of Stable Diffusion and XL; their UNets are replaced by some that are told the scale."""
    made = {False: save_tiny(tmp_path_factory.mktemp("tiny")), True: save_base(tmp_path_factory.mktemp("xl"))}
    for folder in made.values():
        fields = diffusers.UNet2DConditionModel.load_config(folder / "unet")
        told = diffusers.UNet2DConditionModel.from_config({**fields, "time_cond_proj_dim": WIDTH})
        randomize(told, seed=3).save_pretrained(folder / "unet")
    return made


@pytest.mark.parametrize("optimized", [False, True], ids=["", "optimized"])
@pytest.mark.parametrize("name", TASKS)
def test_pictures(name: str, optimized: bool, folders: dict[bool, Path]) -> None:
    pictures, facts = [], []
    for library in (minidiff, diffusers):
        pipe = getattr(library, name).from_pretrained(folders["XL" in name], torch_dtype=torch.float64)
        pipe.scheduler = library.LCMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        if optimized and library is minidiff:
            pipe.optimize()
        call: dict[str, Any] = {
            "num_inference_steps": 4,
            "num_images_per_prompt": 2,
            "output_type": "np",
            **TASKS[name],
        }
        for scale in (8.0, 2.0):
            generator = torch.Generator().manual_seed(0)
            pictures.append(pipe("a red heart", guidance_scale=scale, generator=generator, **call).images)
        facts.append((pipe.do_classifier_free_guidance, pipe.guidance_scale))
    assert facts == [(False, 2.0)] * 2
    ours, theirs = np.stack(pictures[:2]), np.stack(pictures[2:])
    assert np.abs(theirs[0] - theirs[1]).max() > 1e-3  # the scale shows
    np.testing.assert_allclose(ours, theirs, atol=2e-7, rtol=0)  # measured: at most 6e-8


def test_the_encoded_scale() -> None:
    ours, theirs = minidiff.StableDiffusionPipeline, diffusers.StableDiffusionPipeline
    w = torch.tensor([7.5, 0.0])
    assert torch.equal(ours.get_guidance_scale_embedding(None, w, 64), theirs.get_guidance_scale_embedding(None, w, 64))
