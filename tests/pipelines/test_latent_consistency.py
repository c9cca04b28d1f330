"""Latent consistency models: the two pipelines of their index, whole runs in float64 against the reference's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import minidiff
from minidiff import LatentConsistencyModelImg2ImgPipeline, LatentConsistencyModelPipeline
from minidiff.errors import ConfigError
from minidiff.pipelines.auto import TASKS
from tests.pictures import assert_same, load_both, seeded
from tests.theirs import diffusers
from tests.tiny import save_tiny

NAMES = ("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
IMAGE = torch.rand(1, 3, 32, 32, generator=seeded(6), dtype=torch.float64)
Pipes = tuple[Any, Any]


@pytest.fixture(scope="module")
def lcm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A twin of SimianLuo/LCM_Dreamshaper_v7, whose index names the class."""
    folder = save_tiny(tmp_path_factory.mktemp("lcm"), unet={"time_cond_proj_dim": 9})
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    parts = {name: part for name, part in pipe.components.items() if name in ("vae", "text_encoder", "tokenizer")}
    rest = {"unet": pipe.unet, "scheduler": pipe.scheduler, "safety_checker": None, "feature_extractor": None}
    diffusers.LatentConsistencyModelPipeline(**parts, **rest, requires_safety_checker=False).save_pretrained(folder)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == NAMES[0]
    return folder


@pytest.fixture(scope="module")
def text(lcm: Path) -> Pipes:
    return load_both("DiffusionPipeline", lcm)


@pytest.fixture(scope="module")
def image(lcm: Path) -> Pipes:
    return load_both(NAMES[1], lcm)


def draw(pipes: Pipes, **arguments: Any) -> None:
    """Compare pictures, which show a guidance that is not told, a wrong timestep, or noise drawn in another order."""
    arguments = {"prompt": ["a red heart", "two cats"], "output_type": "np"} | arguments
    ours, theirs = (pipe(**arguments, generator=seeded(3)).images for pipe in pipes)
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"guidance_scale": 1.0, "num_inference_steps": 2},
        {"original_inference_steps": 20, "num_inference_steps": 3},
        {"timesteps": [899, 500, 99]},
        {"num_images_per_prompt": 2, "height": 24, "width": 40},
    ],
    ids=str,
)
def test_text_to_image(text: Pipes, arguments: dict[str, Any]) -> None:
    assert [type(pipe).__name__ for pipe in text] == [NAMES[0]] * 2  # what the index names
    draw(text, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"strength": 0.35, "num_inference_steps": 3, "guidance_scale": 2.0},
        {"original_inference_steps": 100, "strength": 0.5},
        {"timesteps": [899, 500, 99, 9], "strength": 0.6},
        {"latents": torch.randn(2, 4, 8, 8, generator=seeded(8), dtype=torch.float64)},
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_image_to_image(image: Pipes, arguments: dict[str, Any]) -> None:
    draw(image, image=torch.cat([IMAGE, 1 - IMAGE]), **arguments)


@pytest.mark.parametrize("name", ["latents", "denoised", "prompt_embeds", "w_embedding"])
def test_callbacks(text: Pipes, name: str) -> None:
    seen: list[torch.Tensor] = []

    def change(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors[name])
        return {name: tensors[name] * 0.9}

    draw(text, callback_on_step_end=change, callback_on_step_end_tensor_inputs=[name])
    assert len(seen) == 8
    for ours, theirs in zip(seen[:4], seen[4:], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)  # measured: 3e-14


def test_steps_and_guidance(text: Pipes) -> None:
    """It is asked once per step, and film strips see what it predicts; the last prediction is the picture."""
    pipe = text[0]
    steps = list(pipe.steps("a red heart", seed=1))
    assert len(steps) == 4 and torch.equal(steps[-1].denoised, steps[-1].latents)
    picture = pipe("a red heart", seed=1, output_type="np").images
    np.testing.assert_array_equal(pipe.decode(steps[-1].latents, "np"), picture)
    assert not pipe.do_classifier_free_guidance and pipe.guidance_scale == 8.5


def test_by_task(lcm: Path, text: Pipes) -> None:
    tasks = ("AutoPipelineForText2Image", "AutoPipelineForImage2Image")
    for task, name in zip(tasks, NAMES, strict=True):
        for library, pipe in zip((minidiff, diffusers), text, strict=True):
            assert type(getattr(library, task).from_pipe(pipe)).__name__ == name
            assert type(getattr(library, task).from_pretrained(lcm)).__name__ == name
    assert len(TASKS) == 3
    with pytest.raises(ConfigError, match="AutoPipelineForInpainting knows the families StableDiffusion and"):
        minidiff.AutoPipelineForInpainting.from_pretrained(lcm)


def test_errors(folder: Path, text: Pipes) -> None:
    plain = LatentConsistencyModelPipeline.from_pretrained(folder, safety_checker=None)
    with pytest.raises(ConfigError, match="has no time_cond_proj_dim: use StableDiffusionPipeline"):
        plain("a cat")
    with pytest.raises(TypeError, match="does not implement .* negative_prompt"):
        text[0]("a cat", negative_prompt="a dog")
    with pytest.raises(TypeError, match="takes no negative_prompt: the model was distilled"):
        text[0].steps("a cat", negative_prompt="a dog")
    with pytest.raises(TypeError, match="original_inference_steps should be an integer"):
        text[0]("a cat", original_inference_steps=50.5)
    with pytest.raises(ValueError, match="give an image"):
        LatentConsistencyModelImg2ImgPipeline(**text[0].components)("a cat")
    with pytest.raises(ValueError, match="more than the 3 timesteps"):
        text[0]("a cat", original_inference_steps=3)
