"""Whole pictures with networks of EDM as published: Playground v2.5 and CosXL, every task, optimised or not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import minidiff
from tests.pictures import assert_same, load, load_both, quiet, seeded
from tests.theirs import diffusers
from tests.tiny import save_tiny
from tests.tiny_xl import save_base

PLAYGROUND = ("EDMDPMSolverMultistepScheduler", {})
COSXL = (
    "EDMEulerScheduler",
    {"prediction_type": "v_prediction", "sigma_data": 1.0, "sigma_max": 120.0, "sigma_schedule": "exponential"},
)
MODELS = {"playground": PLAYGROUND, "cosxl": COSXL}
MOMENTS = {"latents_mean": [-1.6574, 1.886, -1.383, 2.5155], "latents_std": [8.4927, 5.9022, 6.5498, 5.2299]}
PICTURE = torch.rand(1, 3, 32, 32, generator=seeded(6), dtype=torch.float64)
MASK = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
MASK[..., 5:20, 9:30] = 1
TASKS: dict[str, dict[str, Any]] = {
    "Pipeline": {"guidance_scale": 3.0},
    "Img2ImgPipeline": {"image": PICTURE, "strength": 0.6},
    "InpaintPipeline": {"image": PICTURE, "mask_image": MASK, "height": 32, "width": 32, "strength": 0.6},
}
PROMPT = "a red heart over two cats"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    made = {}
    for family, save in (("StableDiffusion", save_tiny), ("StableDiffusionXL", save_base)):
        for model, (kind, options) in MODELS.items():
            folder = made[family, model] = save(tmp_path_factory.mktemp("edm"))
            getattr(diffusers, kind)(**options).save_pretrained(folder / "scheduler")
            index = json.loads((folder / "model_index.json").read_text())
            (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", kind]}))
            if model == "playground":
                path = folder / "vae" / "config.json"
                path.write_text(json.dumps(json.loads(path.read_text()) | MOMENTS | {"scaling_factor": 0.5}))
    return made


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("family", ["StableDiffusion", "StableDiffusionXL"])
def test_pictures(folders: dict[tuple[str, str], Path], family: str, model: str, task: str) -> None:
    options = TASKS[task] | {"num_inference_steps": 5, "output_type": "np"}
    ours, theirs = load_both(family + task, folders[family, model])
    pictures = [pipe(PROMPT, generator=seeded(), **options).images for pipe in (ours, theirs)]
    assert_same(*pictures)
    ours.optimize()
    again = ours(PROMPT, generator=seeded(), **options).images
    np.testing.assert_allclose(again, pictures[0], atol=2e-7, rtol=0)  # measured: 0


@pytest.mark.parametrize("model", MODELS)
def test_previews_are_the_clean_latents(folders: dict[tuple[str, str], Path], model: str) -> None:
    """The last one is the result: both end at level 0."""
    pipe = load(minidiff.StableDiffusionXLPipeline, folders["StableDiffusionXL", model])
    steps = list(pipe.steps(PROMPT, num_inference_steps=5, seed=3))
    assert torch.allclose(steps[-1].denoised, steps[-1].latents, rtol=0, atol=1e-12)
    assert all(step.denoised.isfinite().all() for step in steps)
    times = [float(step.timestep) for step in steps]
    assert (
        times == sorted(times, reverse=True) and abs(times[0] - 0.25 * np.log(pipe.scheduler.config.sigma_max)) < 1e-6
    )


def test_places_on_the_schedule_are_sigmas_of_a_call(folders: dict[tuple[str, str], Path]) -> None:
    """The reference's pipelines hand over a list, on which its scheduler fails."""
    pipe = quiet(minidiff.StableDiffusionXLPipeline.from_pretrained(folders["StableDiffusionXL", "playground"]))
    pipe.scheduler = minidiff.EDMEulerScheduler()
    places = np.linspace(0, 1, 4).tolist()
    options = {"seed": 1, "output_type": "np"}
    assert np.array_equal(
        pipe(PROMPT, sigmas=places, **options).images, pipe(PROMPT, num_inference_steps=4, **options).images
    )
    with pytest.raises(ValueError, match="are places on its Karras schedule"):
        pipe(PROMPT, sigmas=[80.0, 10.0, 1.0], **options)


@pytest.mark.parametrize("argument", ["denoising_start", "denoising_end"])
@pytest.mark.parametrize("scheduler", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "continuous Euler"])
def test_shares_of_training_timesteps_are_refused(
    folders: dict[tuple[str, str], Path], scheduler: str, argument: str
) -> None:
    """In log(sigma) / 4 all steps would lie after the cut: the reference begins clean latents as if they were noise."""
    pipe = quiet(minidiff.StableDiffusionXLImg2ImgPipeline.from_pretrained(folders["StableDiffusionXL", "cosxl"]))
    continuous = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
    options = continuous if scheduler == "continuous Euler" else {}
    pipe.scheduler = getattr(minidiff, "EulerDiscreteScheduler" if options else scheduler)(**options)
    with pytest.raises(ValueError, match=r"count timesteps of training, and \w+ as it is configured has none"):
        pipe(PROMPT, image=PICTURE, num_inference_steps=4, **{argument: 0.5})
