"""Whole pictures, seed for seed: StableDiffusionPipeline against the reference's, on one tiny random checkpoint."""

import multiprocessing
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch

import minidiff
from minidiff import StableDiffusionPipeline
from tests.pictures import assert_same, load_both, quiet, seeded
from tests.theirs import diffusers
from tests.tiny import save_tiny

SCHEDULERS = ["DDPMScheduler", "PNDMScheduler", "UniPCMultistepScheduler"]
PROMPT = "a red heart over two cats"


@pytest.fixture(scope="module")
def pipes(folder: Path) -> tuple[Any, Any]:
    """Ours and theirs from the same files, in float64 so that only a wrong formula can make a difference."""
    return load_both("StableDiffusionPipeline", folder)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 20, 50])
def test_every_scheduler(pipes: tuple[Any, Any], name: str, steps: int) -> None:
    ours, theirs = pipes
    results = []
    for pipe, library in ((ours, minidiff), (theirs, diffusers)):
        original = pipe.scheduler
        pipe.scheduler = getattr(library, name).from_config(original.config)
        out = pipe(PROMPT, num_inference_steps=steps, guidance_scale=3.0, generator=seeded(), output_type="np")
        pipe.scheduler = original
        results.append(out.images)
    assert_same(*results)


EMBEDS = torch.randn(2, 77, 24, generator=seeded(5), dtype=torch.float64)
CALLS = {
    "guidance off": {"guidance_scale": 1.0},
    "guidance below one": {"guidance_scale": 0.0},
    "negative prompt": {"negative_prompt": "blue sky"},
    "two pictures": {"num_images_per_prompt": 2},
    "list of prompts": {"prompt": [PROMPT, "a face"], "negative_prompt": ["sky", ""], "num_images_per_prompt": 2},
    "size": {"height": 24, "width": 56},
    "rescaled guidance": {"guidance_rescale": 0.7},
    "latents": {"latents": torch.randn(1, 4, 8, 8, generator=seeded(4), dtype=torch.float64)},
    "embeddings": {"prompt": None, "prompt_embeds": EMBEDS[:1]},
    "embeddings, negative text": {"prompt": None, "prompt_embeds": EMBEDS[:1], "negative_prompt": "sky"},
    "both embeddings": {"prompt": None, "prompt_embeds": EMBEDS, "negative_prompt_embeds": EMBEDS.flip(0)},
    "eta ignored": {"eta": 0.5},
    "long prompt": {"prompt": "cats and dogs " * 40},
    "zero steps of warm-up": {"num_inference_steps": 3},
}


@pytest.mark.parametrize("name", CALLS)
def test_every_argument(pipes: tuple[Any, Any], name: str) -> None:
    arguments = {"prompt": PROMPT, "num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "np"} | CALLS[name]
    assert_same(*(pipe(**arguments, generator=seeded()).images for pipe in pipes))


def test_a_list_of_generators(pipes: tuple[Any, Any]) -> None:
    ours, theirs = (
        pipe(
            PROMPT,
            num_images_per_prompt=3,
            num_inference_steps=3,
            generator=[seeded(s) for s in (7, 8, 9)],
            output_type="np",
        ).images
        for pipe in pipes
    )
    assert_same(ours, theirs)


def test_the_global_generator(pipes: tuple[Any, Any]) -> None:
    results = []
    for pipe in pipes:
        torch.manual_seed(11)
        results.append(pipe(PROMPT, num_inference_steps=3, output_type="np").images)
    assert_same(*results)


def test_custom_timesteps(pipes: tuple[Any, Any]) -> None:
    results = []
    for pipe, library in zip(pipes, (minidiff, diffusers), strict=True):
        original = pipe.scheduler
        pipe.scheduler = library.DDPMScheduler.from_config(original.config)
        arguments = {"timesteps": [999, 600, 300, 10], "output_type": "np"}
        results.append(pipe(PROMPT, generator=seeded(), **arguments).images)
        pipe.scheduler = original
        with pytest.raises(ValueError, match="timesteps|custom"):  # PNDM has no custom timesteps
            pipe(PROMPT, **arguments)
    assert_same(*results)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_output_types(pipes: tuple[Any, Any], output_type: str) -> None:
    results = [pipe(PROMPT, num_inference_steps=2, generator=seeded(), output_type=output_type) for pipe in pipes]
    assert type(results[0].images) is type(results[1].images)
    ours, theirs = (np.stack([np.asarray(x, dtype=np.float64) for x in out.images]) for out in results)
    bound = 1 if output_type == "pil" else 2e-7  # measured: 0 and 4e-8
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= bound


def test_the_tuple_form(pipes: tuple[Any, Any]) -> None:
    ours, theirs = (
        pipe(PROMPT, num_inference_steps=2, generator=seeded(), output_type="np", return_dict=False) for pipe in pipes
    )
    assert len(ours) == len(theirs) == 2
    assert ours[1] is theirs[1] is None
    assert_same(ours[0], theirs[0])


def test_clip_skip_is_the_state_before_the_last_layers(pipes: tuple[Any, Any]) -> None:
    """The reference's own clip_skip fails with transformers 5, so its text encoder is asked directly."""
    ours, theirs = pipes
    ids = theirs.tokenizer(PROMPT, padding="max_length", max_length=77, return_tensors="pt").input_ids
    states = theirs.text_encoder(ids, output_hidden_states=True).hidden_states
    for skip in (0, 1, 2):
        expected = theirs.text_encoder.final_layer_norm(states[-(skip + 1)])
        found, _ = ours.encode_prompt(PROMPT, "cpu", 1, False, clip_skip=skip)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(states[-1], states[-2])
    skipped, plain = (
        ours(PROMPT, num_inference_steps=2, clip_skip=s, generator=seeded(), output_type="np").images for s in (1, None)
    )
    assert np.abs(skipped - plain).max() > 1e-3


def test_callbacks_see_and_change_the_run(pipes: tuple[Any, Any]) -> None:
    """Dynamic guidance as in the reference's documentation, then an interrupt."""
    results, seen = [], []
    for pipe in pipes:
        log = []

        def callback(pipe: Any, i: int, t: torch.Tensor, tensors: dict[str, Any], log: list = log) -> dict[str, Any]:
            log.append((i, int(t), tensors["latents"].clone(), pipe.guidance_scale))
            if i == 2:
                tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
                pipe._guidance_scale = 0.0
            if i == 4:
                tensors["latents"] = tensors["latents"] * 0.9
                pipe._interrupt = True
            return tensors

        out = pipe(
            PROMPT,
            num_inference_steps=8,
            generator=seeded(),
            output_type="np",
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        )
        results.append(out.images)
        seen.append(log)
    assert [step[:2] for step in seen[0]] == [step[:2] for step in seen[1]]
    assert [step[3] for step in seen[0]] == [step[3] for step in seen[1]] == [7.5, 7.5, 7.5, 0.0, 0.0]
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours[2], theirs[2], rtol=1e-9, atol=1e-9)
    assert_same(*results)


def test_an_outdated_scheduler_config_is_corrected(tmp_path: Path) -> None:
    """Wrong steps_offset and clip_sample in old files are corrected when the pipeline is built, and only then."""
    folder = save_tiny(tmp_path, scheduler={"steps_offset": 0})
    ours = StableDiffusionPipeline.from_pretrained(folder)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert ours.scheduler.config.steps_offset == theirs.scheduler.config.steps_offset == 1
    old = minidiff.DDPMScheduler(clip_sample=True)
    built = StableDiffusionPipeline(ours.vae, ours.text_encoder, ours.tokenizer, ours.unet, old)
    assert built.scheduler is old and old.config.clip_sample is False
    built.scheduler = minidiff.DDPMScheduler(clip_sample=True)
    assert built.scheduler.config.clip_sample is True


def test_an_old_unet_config_means_64(pipes: tuple[Any, Any]) -> None:
    """Published configs from before 0.9 say sample_size 32 by mistake."""
    ours, _ = pipes
    for version, expected in (("0.6.0", 64), ("0.8.1.dev0", 64), ("0.9.0.dev0", 8), ("0.42.1", 8)):
        unet = minidiff.UNet2DConditionModel.from_config(ours.unet.config, _diffusers_version=version)
        pipe = StableDiffusionPipeline(ours.vae, ours.text_encoder, ours.tokenizer, unet, ours.scheduler)
        theirs = diffusers.UNet2DConditionModel.from_config({**unet.config, "_class_name": "UNet2DConditionModel"})
        theirs.register_to_config(_diffusers_version=version)
        reference = diffusers.StableDiffusionPipeline(
            pipes[1].vae, pipes[1].text_encoder, pipes[1].tokenizer, theirs, pipes[1].scheduler, None, None,
            requires_safety_checker=False,
        )  # fmt: skip
        assert pipe._latent_size(None, None) == (expected, expected) == (reference.unet.config.sample_size,) * 2


# --- what the reference does not have --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DDPMScheduler", "UniPCMultistepScheduler"])
def test_a_picture_depends_on_its_seed_alone(pipes: tuple[Any, Any], folder: Path, name: str) -> None:
    """DDPM draws at every step too. In float64 a batch computes each picture to the last bits; measured 2e-16."""
    ours = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float64)
    ours.set_progress_bar_config(disable=True)
    ours.scheduler = getattr(minidiff, name).from_config(ours.scheduler.config)
    options = {"num_inference_steps": 4, "output_type": "pt"}
    batch = ours(PROMPT, num_images_per_prompt=3, seed=20, **options)
    assert batch.seeds == [20, 21, 22]
    for k, seed in enumerate(batch.seeds):
        alone = ours(PROMPT, seeds=[seed], **options)
        assert alone.seeds == [seed]
        torch.testing.assert_close(alone.images[0], batch.images[k], rtol=0, atol=1e-13)
    assert not torch.equal(batch.images[0], batch.images[1])
    zero = ours(PROMPT, seed=0, **options)
    assert torch.equal(zero.images, ours(PROMPT, generator=seeded(0), **options).images)
    assert ours(PROMPT, generator=seeded(0), **options).seeds is None


def test_steps_yields_what_a_call_computes(pipes: tuple[Any, Any]) -> None:
    ours, _ = pipes
    arguments = {"num_inference_steps": 5, "guidance_scale": 3.0, "seed": 3}
    steps = list(ours.steps(PROMPT, **arguments))
    called = ours(PROMPT, **arguments, output_type="latent")
    assert [step.index for step in steps] == list(range(6))  # PNDM repeats its second step
    assert [int(step.timestep) for step in steps] == [801, 601, 601, 401, 201, 1]
    assert torch.equal(steps[-1].latents, called.images)
    assert np.array_equal(ours.decode(steps[-1].latents, "np"), ours(PROMPT, **arguments, output_type="np").images)
    # Near t = 0 the predicted x0 is nearly the latent itself: they differ by the noise that is left, sigma_1 = 0.03.
    last = steps[-1]
    assert (last.denoised - last.latents).std() < 0.1 * last.latents.std()


def test_steps_can_be_left_early_and_interleaved(pipes: tuple[Any, Any]) -> None:
    ours, _ = pipes
    first, second = (ours.steps(PROMPT, num_inference_steps=4, seed=s) for s in (1, 2))
    mixed = [(next(first), next(second)) for _ in range(3)]
    first.close()
    alone = list(ours.steps(PROMPT, num_inference_steps=4, seed=2))
    for (_, step), expected in zip(mixed, alone, strict=False):
        assert torch.equal(step.latents, expected.latents)
    assert not mixed[0][0].latents.requires_grad


def test_threads_share_one_pipeline(pipes: tuple[Any, Any]) -> None:
    """Different arguments at once, some with more steps than others: results equal the serial ones bit for bit."""
    ours, _ = pipes
    calls = [
        {"prompt": PROMPT, "num_inference_steps": 3, "seed": 1},
        {"prompt": "a face", "num_inference_steps": 7, "seed": 2, "guidance_scale": 1.0},
        {"prompt": ["sky", "hills"], "num_inference_steps": 5, "seed": 3, "height": 16, "width": 40},
        {"prompt": "two cats", "num_inference_steps": 4, "seed": 4, "guidance_scale": 9.0, "negative_prompt": "dog"},
    ]
    serial = [ours(**call, output_type="np").images for call in calls]
    found: dict[int, list[np.ndarray]] = {}

    def work(k: int) -> None:
        found[k] = [ours(**calls[k], output_type="np").images for _ in range(3)]

    threads = [Thread(target=work, args=(k,)) for k in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, expected in enumerate(serial):
        assert len(found[k]) == 3
        assert all(np.array_equal(images, expected) for images in found[k])


def test_a_pipeline_is_sent_to_another_process(folder: Path) -> None:
    """A worker that is spawned, as web servers and loaders of data do it, gets the pipeline itself."""
    pipe = quiet(StableDiffusionPipeline.from_pretrained(folder))
    call = {"num_inference_steps": 2, "seed": 3, "output_type": "np"}
    spawned = multiprocessing.get_context("spawn").Pool(1, initializer=torch.set_num_threads, initargs=(1,))
    with spawned as pool:
        there = pool.apply(pipe, (PROMPT,), call).images
    assert np.array_equal(there, pipe(PROMPT, **call).images)


def test_loading_by_the_class_in_the_index(folder: Path) -> None:
    pipe = minidiff.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert type(pipe) is StableDiffusionPipeline
    assert pipe.vae_scale_factor == 4
