"""A picture is the same alone and in a batch, to one level of 255 in float32, for every task and scheduler.

In float32 a matrix product may be summed in another order in a larger batch; the noise is to the bit the same, because
each picture has a generator of its own.
"""

from typing import Any

import numpy as np
import pytest
import torch

import minidiff
from minidiff import StableDiffusionPipeline, StableDiffusionXLPipeline
from tests.pictures import quiet, seeded
from tests.tiny import save_tiny
from tests.tiny_xl import save_base

SCHEDULERS = [name for name in minidiff.__all__ if name.endswith("Scheduler")]
PROMPTS = ["a red heart over two cats", "sky", "the red dragon's face " * 30, ""]
NEGATIVES = ["blue", "two cats and 3 dogs over green hills " * 20, "", "a face"]
SEEDS = [7, 1, 30, 4]


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    return quiet(StableDiffusionPipeline.from_pretrained(save_tiny(tmp_path_factory.mktemp("sd"))))


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionXLPipeline:
    return quiet(StableDiffusionXLPipeline.from_pretrained(save_base(tmp_path_factory.mktemp("xl"))))


def with_scheduler(pipe: Any, name: str) -> Any:
    other = type(pipe)(**{**pipe.components, "scheduler": getattr(minidiff, name).from_config(pipe.scheduler.config)})
    return quiet(other)


def assert_equal_pictures(ours: Any, expected: Any) -> None:
    """Measured: 0 levels for nearly all, 1 for a few."""
    ours, expected = (np.asarray(picture, dtype=int) for picture in (ours, expected))
    assert ours.std() > 10 and abs(ours - expected).max() <= 1


@pytest.mark.parametrize(
    "family, name", [*(("sd", name) for name in SCHEDULERS), ("xl", "EulerDiscreteScheduler"), ("xl", "DDPMScheduler")]
)
def test_a_batch_of_four(request: pytest.FixtureRequest, family: str, name: str) -> None:
    """With prompts and negative prompts of all lengths, in the same and in different pictures."""
    pipe = with_scheduler(request.getfixturevalue(family), name)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0}
    batch = pipe(PROMPTS, negative_prompt=NEGATIVES, generator=[seeded(s) for s in SEEDS], **options).images
    assert len(batch) == 4 and abs(np.asarray(batch[0], dtype=int) - np.asarray(batch[1], dtype=int)).max() > 10
    for k in (0, 3):
        alone = pipe(PROMPTS[k], negative_prompt=NEGATIVES[k], generator=seeded(SEEDS[k]), **options).images
        assert_equal_pictures(batch[k], alone[0])


@pytest.mark.parametrize("family", ["sd", "xl"])
def test_seeds_are_generators(request: pytest.FixtureRequest, family: str) -> None:
    """``seeds=[...]``, ``seed=s`` for s, s + 1, ..., and a list of generators mean the same pictures."""
    pipe = with_scheduler(request.getfixturevalue(family), "EulerAncestralDiscreteScheduler")
    options = {"num_inference_steps": 2, "num_images_per_prompt": 2, "output_type": "pt"}
    by_generators = pipe(PROMPTS[:2], generator=[seeded(s) for s in (5, 6, 7, 8)], **options)
    by_seeds = pipe(PROMPTS[:2], seeds=[5, 6, 7, 8], **options)
    by_seed = pipe(PROMPTS[:2], seed=5, **options)
    assert by_seeds.seeds == by_seed.seeds == [5, 6, 7, 8] and by_generators.seeds is None
    assert torch.equal(by_generators.images, by_seeds.images) and torch.equal(by_seeds.images, by_seed.images)
    alone = pipe(PROMPTS[1], seed=8, **options | {"num_images_per_prompt": 1})
    torch.testing.assert_close(alone.images[0], by_seeds.images[3], rtol=0, atol=1 / 255)


@pytest.mark.parametrize("family", ["sd", "xl"])
def test_one_generator_draws_for_the_whole_batch(request: pytest.FixtureRequest, family: str) -> None:
    """As in the reference: the first picture of a batch is not the picture of that generator alone."""
    pipe = request.getfixturevalue(family)
    options = {"num_inference_steps": 1, "output_type": "latent"}
    batch = pipe(PROMPTS[0], num_images_per_prompt=2, generator=seeded(3), **options).images
    noise = torch.randn(2, 4, 8, 8, generator=seeded(3))
    given = pipe(PROMPTS[0], num_images_per_prompt=2, latents=noise, **options).images
    assert torch.equal(batch, given)
