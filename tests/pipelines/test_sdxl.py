"""Whole pictures, seed for seed: StableDiffusionXLPipeline against the reference's, on one tiny random checkpoint."""

import json
import logging
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch

import minidiff
from minidiff import StableDiffusionXLPipeline
from tests.pictures import assert_same, load_both, seeded, with_scheduler
from tests.theirs import diffusers
from tests.tiny_xl import POOLED, save_base

SCHEDULERS = [name for name in minidiff.__all__ if name.endswith("Scheduler")]
PROMPT = "a red heart over two cats"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pipes(folder: Path) -> tuple[Any, Any]:
    """Ours and theirs from the same files, in float64 so that only a wrong formula can make a difference."""
    return load_both("StableDiffusionXLPipeline", folder)


@pytest.mark.parametrize(
    "cut, name",
    [(None, name) for name in SCHEDULERS] + [(0.55, name) for name in SCHEDULERS if not name.startswith("EDM")],
)
def test_every_scheduler(pipes: tuple[Any, Any], name: str, cut: float | None) -> None:
    arguments = {"num_inference_steps": 6, "guidance_scale": 3.0, "denoising_end": cut, "output_type": "np"}
    results = [
        with_scheduler(pipe, library, name, lambda pipe: pipe(PROMPT, generator=seeded(), **arguments).images)
        for pipe, library in zip(pipes, (minidiff, diffusers), strict=True)
    ]
    assert_same(*results)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name.startswith("EDM")])
def test_a_share_of_timesteps_says_nothing_where_log_sigma_is_told(pipes: tuple[Any, Any], name: str) -> None:
    """The reference takes no step and returns the noise."""
    with pytest.raises(ValueError, match=r"denoising_end count timesteps of training, and \w+ as it is configured has"):
        with_scheduler(pipes[0], minidiff, name, lambda pipe: pipe(PROMPT, denoising_end=0.55))


RNG = seeded(5)
EMBEDS, NEGATIVE = (torch.randn(2, 77, 40, generator=RNG, dtype=torch.float64) for _ in range(2))
POOL, NEGATIVE_POOL = (torch.randn(2, POOLED, generator=RNG, dtype=torch.float64) for _ in range(2))
ONE = {"prompt": None, "prompt_embeds": EMBEDS[:1], "pooled_prompt_embeds": POOL[:1]}
NEGATIVES = {"negative_prompt_embeds": NEGATIVE, "negative_pooled_prompt_embeds": NEGATIVE_POOL}
CALLS = {
    "guidance off": {"guidance_scale": 0.0},
    "second prompt": {"prompt_2": "blue sky"},
    "empty second prompt": {"prompt_2": ""},
    "negative prompt": {"negative_prompt": "blue sky"},
    "empty negative prompt": {"negative_prompt": ""},
    "both negative prompts": {"negative_prompt": "blue sky", "negative_prompt_2": "dogs"},
    "two pictures": {"num_images_per_prompt": 2},
    "list of prompts": {"prompt": [PROMPT, "a face"], "prompt_2": ["hills", "a cat"], "negative_prompt": ["sky", ""]},
    "one negative for two prompts": {"prompt": [PROMPT, "a face"], "negative_prompt": "sky"},
    "size": {"height": 24, "width": 56},
    "original size": {"original_size": (512, 768)},
    "crop": {"crops_coords_top_left": (100, 3)},
    "target size": {"target_size": (1024, 640)},
    "negative sizes": {
        "negative_original_size": (512, 384),
        "negative_crops_coords_top_left": (7, 9),
        "negative_target_size": (1000, 900),
    },
    "rescaled guidance": {"guidance_rescale": 0.7},
    "latents": {"latents": torch.randn(1, 4, 8, 8, generator=seeded(4), dtype=torch.float64)},
    "embeddings": ONE,
    "embeddings, negative text": {**ONE, "negative_prompt": "sky"},
    "both embeddings": {"prompt": None, "prompt_embeds": EMBEDS, "pooled_prompt_embeds": POOL, **NEGATIVES},
    "skipped layer": {"clip_skip": 1},
    "long prompt": {"prompt": "cats and dogs " * 40},
    "cut": {"denoising_end": 0.3},
    "cut at a step": {"denoising_end": 0.499, "num_inference_steps": 10},  # at 501, which is the fifth
    "whole run": {"denoising_end": 1.0},
}


@pytest.mark.parametrize("name", CALLS)
def test_every_argument(pipes: tuple[Any, Any], name: str) -> None:
    arguments = {"prompt": PROMPT, "num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "np"} | CALLS[name]
    assert_same(*(pipe(**arguments, generator=seeded()).images for pipe in pipes))


def test_every_condition_shows(pipes: tuple[Any, Any]) -> None:
    """An argument that is ignored would be equal to the reference's if that ignored it too."""
    ours, _ = pipes
    options = {"num_inference_steps": 2, "seed": 0, "output_type": "pt", "prompt": PROMPT, "negative_prompt": "sky"}
    still = ours(**options).images
    names = ["second prompt", "both negative prompts", "original size", "crop", "target size", "negative sizes"]
    for name in [*names, "skipped layer"]:
        assert (ours(**{**options, **CALLS[name]}).images - still).abs().max() > 1e-4, name


def test_an_absent_negative_prompt_is_zeros_an_empty_one_is_not(pipes: tuple[Any, Any], folder: Path) -> None:
    ours, _ = pipes
    _, negative, _, pooled = ours.encode_prompt(PROMPT)
    assert not negative.any() and not pooled.any()
    _, empty, _, empty_pooled = ours.encode_prompt(PROMPT, negative_prompt="")
    assert empty.any() and empty_pooled.any()
    index = json.loads((folder / "model_index.json").read_text())
    assert index["force_zeros_for_empty_prompt"] is True
    other = StableDiffusionXLPipeline(**ours.components, force_zeros_for_empty_prompt=False)
    assert torch.equal(other.encode_prompt(PROMPT)[1], empty)


@pytest.mark.parametrize("guided", [True, False])
def test_encode_prompt(pipes: tuple[Any, Any], guided: bool) -> None:
    arguments = {"prompt_2": "a face", "negative_prompt": "sky", "num_images_per_prompt": 2, "clip_skip": 1}
    ours, theirs = (pipe.encode_prompt(PROMPT, do_classifier_free_guidance=guided, **arguments) for pipe in pipes)
    assert (ours[1] is None) == (theirs[1] is None) == (not guided)
    for a, b in zip(ours, theirs, strict=True):
        if b is not None and a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_output_types(pipes: tuple[Any, Any], output_type: str) -> None:
    results = [pipe(PROMPT, num_inference_steps=2, generator=seeded(), output_type=output_type) for pipe in pipes]
    assert type(results[0].images) is type(results[1].images)
    ours, theirs = (np.stack([np.asarray(x, dtype=np.float64) for x in out.images]) for out in results)
    bound = {"pil": 1, "latent": 2e-6}.get(output_type, 2e-7)  # levels of 256; of values up to 8; of values up to 1
    np.testing.assert_allclose(ours, theirs, atol=bound, rtol=0)  # measured: 0; 5.3e-7; 6e-8
    for pipe in pipes:
        as_tuple = pipe(PROMPT, num_inference_steps=1, output_type=output_type, return_dict=False)
        assert isinstance(as_tuple, tuple) and len(as_tuple) == 1


def test_a_list_of_generators(pipes: tuple[Any, Any]) -> None:
    results = []
    for pipe in pipes:
        generators = [seeded(s) for s in (7, 8, 9)]
        arguments = {"num_images_per_prompt": 3, "num_inference_steps": 3, "output_type": "np"}
        results.append(pipe(PROMPT, generator=generators, **arguments).images)
    assert_same(*results)


def test_callbacks_change_what_the_reference_s_change(pipes: tuple[Any, Any]) -> None:
    """Guidance is switched off in the middle, in the manner of the reference's documentation; then the run stops."""
    names = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    seen: list[list[Any]] = []

    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen[-1].append((i, float(t), {name: tuple(tensor.shape) for name, tensor in tensors.items()}))
        if i == 1:
            pipe._guidance_scale = 0.0
            tensors |= {name: tensors[name].chunk(2)[-1] for name in names[1:]}
        if i == 3:
            pipe._interrupt = True
        return tensors

    results = []
    for pipe in pipes:
        seen.append([])
        options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
        results.append(pipe(PROMPT, num_inference_steps=6, generator=seeded(), output_type="np", **options).images)
    assert seen[0] == seen[1] and len(seen[0]) == 4
    assert_same(*results)


def test_turbo(pipes: tuple[Any, Any]) -> None:
    """One to four steps of Euler ancestral with trailing spacing, without guidance, as sdxl-turbo is used."""
    for steps in (1, 4):
        arguments = {"num_inference_steps": steps, "guidance_scale": 0.0, "output_type": "np"}
        results = [
            with_scheduler(
                pipe,
                library,
                "EulerAncestralDiscreteScheduler",
                lambda pipe, a=arguments: pipe(PROMPT, generator=seeded(), **a).images,
                timestep_spacing="trailing",
            )
            for pipe, library in zip(pipes, (minidiff, diffusers), strict=True)
        ]
        assert_same(*results)


# --- half precision --------------------------------------------------------------------------------------------------


def test_decoding_in_float32_where_the_config_asks_for_it(tmp_path: Path) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(save_base(tmp_path, force_upcast=True))
    latents = torch.randn(1, 4, 8, 8, generator=seeded()).half()
    pipe.vae.to(torch.float16).to(torch.float32)
    exact = pipe.decode(latents, "pt")
    pipe.vae.to(torch.float16)
    kept = {name: tensor.clone() for name, tensor in pipe.vae.state_dict().items()}
    decoded = pipe.decode(latents, "pt")
    assert decoded.dtype == torch.float32 and torch.equal(decoded, exact)
    assert pipe.vae.dtype == torch.float16
    assert all(torch.equal(tensor, kept[name]) for name, tensor in pipe.vae.state_dict().items())
    as_it_is = StableDiffusionXLPipeline.from_pretrained(save_base(tmp_path / "as it is"), torch_dtype=torch.float16)
    assert as_it_is.decode(latents, "pt").dtype == torch.float16  # where the config does not ask for it


# --- what the reference does not have --------------------------------------------------------------------------------


def test_a_picture_depends_on_its_seed_alone(pipes: tuple[Any, Any]) -> None:
    """Also with other sizes for the negative prompt, which the reference deals out wrongly in batches."""
    ours, theirs = pipes
    options = {"num_inference_steps": 3, "output_type": "pt", **CALLS["negative sizes"]}
    batch = ours(PROMPT, num_images_per_prompt=3, seed=20, **options)
    assert batch.seeds == [20, 21, 22]
    for k, seed in enumerate(batch.seeds):
        alone = ours(PROMPT, seeds=[seed], **options)
        torch.testing.assert_close(alone.images[0], batch.images[k], rtol=0, atol=1e-13)  # measured: 2e-16
        expected = theirs(PROMPT, generator=seeded(seed), **options).images
        torch.testing.assert_close(alone.images, expected, rtol=0, atol=2e-7)  # measured: 7e-8


def test_steps_yields_what_a_call_computes(pipes: tuple[Any, Any]) -> None:
    ours, _ = pipes
    arguments = {"num_inference_steps": 5, "guidance_scale": 3.0, "seed": 3, "denoising_end": 0.7}
    steps = list(ours.steps(PROMPT, **arguments))
    called = ours(PROMPT, **arguments, output_type="latent")
    assert [step.index for step in steps] == [0, 1, 2]
    assert [int(step.timestep) for step in steps] == [801, 601, 401]
    assert torch.equal(steps[-1].latents, called.images)


def test_threads_share_one_pipeline(pipes: tuple[Any, Any]) -> None:
    ours, _ = pipes
    calls = [
        {"prompt": PROMPT, "num_inference_steps": 3, "seed": 1},
        {"prompt": ["sky", "hills"], "num_inference_steps": 4, "seed": 3, "height": 16, "width": 40},
        {"prompt": "two cats", "num_inference_steps": 2, "seed": 4, "negative_prompt": "dog", "denoising_end": 0.6},
    ]
    serial = [ours(**call, output_type="np").images for call in calls]
    found: dict[int, np.ndarray] = {}

    def work(k: int) -> None:
        found[k] = ours(**calls[k], output_type="np").images

    threads = [Thread(target=work, args=(k,)) for k in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[k], expected) for k, expected in enumerate(serial))


def test_saved_pipeline_is_loaded_by_the_reference(pipes: tuple[Any, Any], folder: Path, tmp_path: Path) -> None:
    ours = minidiff.DiffusionPipeline.from_pretrained(folder)
    assert type(ours) is StableDiffusionXLPipeline
    ours.save_pretrained(tmp_path, variant="fp16")
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path, variant="fp16")
    assert type(theirs) is diffusers.StableDiffusionXLPipeline
    assert theirs.config.force_zeros_for_empty_prompt is True
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float64)
    options = {"num_inference_steps": 2, "output_type": "np"}
    expected = pipes[0](PROMPT, generator=seeded(), **options).images
    assert np.array_equal(again(PROMPT, generator=seeded(), **options).images, expected)


def test_the_bar_counts_the_steps_that_are_taken(pipes: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pipes
    totals = []
    original = type(ours).progress_bar
    monkeypatch.setattr(
        type(ours), "progress_bar", lambda self, total: totals.append(total) or original(self, total=total)
    )
    ours(PROMPT, num_inference_steps=10, denoising_end=0.8, output_type="latent")
    assert totals == [8]


def test_prompts_for_an_encoder_that_is_absent_are_said(
    pipes: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    ours, _ = pipes
    alone = object.__new__(StableDiffusionXLPipeline)
    alone.__dict__.update({**ours.__dict__, "text_encoder": None, "tokenizer": None})
    with caplog.at_level(logging.WARNING, logger="minidiff"):
        embeds = alone.encode_prompt(PROMPT, "another", do_classifier_free_guidance=False)[0]
    assert embeds.shape[-1] == 16 and "prompt_2" in caplog.text
