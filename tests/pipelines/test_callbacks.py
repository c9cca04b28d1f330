"""What callbacks see, change and break: the run's grid on the scheduler, the attributes of a call, and rows."""

import copy
import importlib
import pickle
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import minidiff
from minidiff import StableDiffusionPipeline
from minidiff.callbacks import SDCFGCutoffCallback
from minidiff.pipelines.base import DiffusionPipeline
from tests.pictures import quiet
from tests.theirs import diffusers, relative_error
from tests.tiny_xl import save_base

CALL = {"prompt": "red heart", "num_inference_steps": 4, "output_type": "latent", "height": 32, "width": 32}
FACTS = ("guidance_scale", "guidance_rescale", "clip_skip", "num_timesteps", "interrupt", "cross_attention_kwargs")


@pytest.fixture
def pipes(folder: Path) -> tuple[StableDiffusionPipeline, Any]:
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    return quiet(StableDiffusionPipeline.from_pretrained(folder)), quiet(theirs)


@pytest.fixture(scope="module")
def shared(folder: Path) -> StableDiffusionPipeline:
    return quiet(StableDiffusionPipeline.from_pretrained(folder))


def seeded() -> dict[str, Any]:
    return {**CALL, "generator": torch.Generator().manual_seed(0)}


# --- what a callback may break -----------------------------------------------------------------------------------


def halve(name: str) -> Any:
    return lambda pipe, i, t, tensors: {name: tensors[name][: len(tensors[name]) // 2]}


def unguide(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._guidance_scale = 0.0
    return {}


def guide(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._guidance_scale = 5.0
    return {}


BREAKING = {
    "guidance off": (unguide, {}, "prompt_embeds has 2 rows for 1 pictures"),
    "guidance off, two pictures": (unguide, {"num_images_per_prompt": 2}, "prompt_embeds has 4 rows for 2 pictures"),
    "guidance on": (guide, {"guidance_scale": 1.0}, "prompt_embeds has 1 rows for 1 pictures.*2 each"),
    "embeddings cut": (halve("prompt_embeds"), {}, "prompt_embeds has 1 rows for 1 pictures.*2 each"),
    "latents cut": (halve("latents"), {"num_images_per_prompt": 2}, "prompt_embeds has 4 rows for 1 pictures"),
}


@pytest.mark.parametrize("name", BREAKING)
def test_rows_that_do_not_fit_are_an_error(shared: StableDiffusionPipeline, name: str) -> None:
    callback, options, message = BREAKING[name]
    handling = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    with pytest.raises(ValueError, match=message):
        shared(**seeded(), **options, **handling)


def test_a_solver_that_remembers_other_pictures_is_an_error(folder: Path) -> None:
    pipe = quiet(StableDiffusionPipeline.from_pretrained(folder))
    pipe.scheduler = minidiff.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)

    def drop(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if i != 1:
            return {}
        return {"latents": tensors["latents"][:1], "prompt_embeds": tensors["prompt_embeds"][[0, 2]]}

    handling = {"callback_on_step_end": drop, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    with pytest.raises(ValueError, match=r"latents became \(2, 4, 8, 8\).*\(1, 4, 8, 8\)"):
        pipe(**seeded(), num_images_per_prompt=2, **handling)


def test_a_picture_may_be_dropped_where_nothing_remembers_it(pipes: tuple[Any, Any]) -> None:
    found = []
    for pipe, module in zip(pipes, (minidiff, diffusers), strict=True):
        pipe.scheduler = module.EulerDiscreteScheduler.from_config(pipe.scheduler.config)

        def drop(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if i != 1:
                return {}
            return {"latents": tensors["latents"][:1], "prompt_embeds": tensors["prompt_embeds"][[0, 2]]}

        handling = {"callback_on_step_end": drop, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
        found.append(pipe(**seeded(), num_images_per_prompt=2, **handling).images)
    assert found[0].shape == (1, 4, 8, 8)
    torch.testing.assert_close(*found, rtol=0, atol=2e-5)  # measured 3e-6


# --- what a callback sees ------------------------------------------------------------------------------------------

SOLVERS = ["PNDM", "DDIM", "EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep", "UniPCMultistep", "LMSDiscrete"]


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_scheduler_shows_the_run(pipes: tuple[Any, Any], solver: str) -> None:
    seen: list[list[Any]] = [[], []]
    for pipe, module, log in zip(pipes, (minidiff, diffusers), seen, strict=True):
        pipe.scheduler = getattr(module, f"{solver}Scheduler").from_config(pipe.scheduler.config)

        def look(pipe: Any, log: list[Any] = log) -> None:
            scheduler = pipe.scheduler
            index = getattr(scheduler, "step_index", None) if solver not in ("PNDM", "DDIM") else None
            sigmas = scheduler.sigmas if solver not in ("PNDM", "DDIM") else torch.zeros(1)
            log.append((scheduler.timesteps.tolist(), sigmas.tolist(), index, scheduler.num_inference_steps))

        def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any], look: Any = look) -> dict[str, Any]:
            look(pipe)
            return {}

        pipe(**seeded(), callback_on_step_end=callback)
        look(pipe)  # and after the call
    assert seen[0] == seen[1]
    assert len(seen[0]) > 4


def test_set_timesteps_ends_what_a_call_has_shown(shared: StableDiffusionPipeline) -> None:
    shared(**seeded())
    shared.scheduler.set_timesteps(7)
    assert shared.scheduler.num_inference_steps == 7
    assert shared.scheduler.step_index is None


def test_what_a_call_shows_belongs_to_its_thread(shared: StableDiffusionPipeline) -> None:
    def call(steps: int, log: list[Any]) -> None:
        def look(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            both.wait()
            log.append((pipe.scheduler.num_inference_steps, pipe.scheduler.step_index, pipe.num_timesteps))
            return {}

        shared(**{**seeded(), "num_inference_steps": steps}, callback_on_step_end=look)
        log.append((pipe_after := shared).guidance_scale + pipe_after.scheduler.num_inference_steps)

    shared.scheduler.set_timesteps(9)
    both, logs = threading.Barrier(2), ([], [])
    threads = [threading.Thread(target=call, args=(steps, log)) for steps, log in zip((3, 3), logs, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [(3, i + 1, 4) for i in range(4)]  # PNDM evaluates once more than it takes steps
    assert logs[0] == logs[1] == [*expected, 10.5]
    assert shared.scheduler.num_inference_steps == 9  # this thread has seen neither


def test_a_loop_by_hand_may_be_begun_in_one_thread_and_stepped_in_another(shared: StableDiffusionPipeline) -> None:
    scheduler = minidiff.EulerDiscreteScheduler()
    pipe = quiet(StableDiffusionPipeline(**{**shared.components, "scheduler": scheduler}))
    seen = []

    def worker() -> None:
        pipe(**seeded())
        ready.set()
        begun.wait()
        x = torch.ones(1, 4, 8, 8)
        scheduler.scale_model_input(x, scheduler.timesteps[0])
        scheduler.step(x, scheduler.timesteps[0], x)
        seen.append((len(scheduler.timesteps), scheduler.step_index))

    ready, begun = threading.Event(), threading.Event()
    thread = threading.Thread(target=worker)
    thread.start()
    ready.wait()
    scheduler.set_timesteps(6)
    begun.set()
    thread.join()
    assert seen == [(6, 1)]
    assert scheduler.step_index == 1


def test_the_facts_of_a_call_are_there_during_and_after_it(pipes: tuple[Any, Any]) -> None:
    seen: list[list[Any]] = [[], []]
    for pipe, log in zip(pipes, seen, strict=True):

        def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any], log: list[Any] = log) -> dict[str, Any]:
            log.append({name: getattr(pipe, name) for name in (*FACTS, "do_classifier_free_guidance")})
            pipe._guidance_scale += 1.0
            return {}

        pipe(**seeded(), guidance_rescale=0.5, callback_on_step_end=callback)
        log.append({name: getattr(pipe, name) for name in (*FACTS, "do_classifier_free_guidance")})
    assert seen[0] == seen[1]
    assert seen[0][-1]["guidance_scale"] == 12.5


def test_before_a_call_there_are_no_facts(pipes: tuple[Any, Any]) -> None:
    for pipe in pipes:
        assert not hasattr(pipe, "guidance_scale")
        pipe._guidance_scale = 3.0  # as a subclass with a __call__ of its own does
        assert pipe.guidance_scale == 3.0
        assert pipe.do_classifier_free_guidance
        with pytest.raises(AttributeError):
            pipe.guidance_scale = 4.0


def test_a_call_keeps_no_tensors(shared: StableDiffusionPipeline) -> None:
    from minidiff.pipelines.callbacks import RUNS

    shared(**seeded())
    run = RUNS.get(shared)
    assert run.guidance_scale == 7.5
    assert run.latents is run.tensors is run.conditions is run.generator is None


def test_another_thread_may_interrupt(shared: StableDiffusionPipeline) -> None:
    steps, begun, go_on = [], threading.Event(), threading.Event()

    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(i)
        begun.set()
        go_on.wait()
        return {}

    thread = threading.Thread(target=lambda: shared(**seeded(), callback_on_step_end=callback))
    thread.start()
    begun.wait()
    shared._interrupt = True
    go_on.set()
    thread.join()
    assert steps == [0]
    assert len(shared(**seeded()).images) == 1
    assert not shared.interrupt  # the next call begins anew


def test_lora_scale_may_change_on_the_way(pipes: tuple[Any, Any]) -> None:
    seen = []

    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._cross_attention_kwargs = {"scale": 0.5}
        seen.append(pipe.cross_attention_kwargs)
        return {}

    pipes[0](**seeded(), callback_on_step_end=callback)
    assert seen[-1] == {"scale": 0.5}


# --- the old callback ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["PNDM", "HeunDiscrete"])
def test_the_old_callback(pipes: tuple[Any, Any], solver: str) -> None:
    seen: list[list[Any]] = [[], []]
    for pipe, module, log in zip(pipes, (minidiff, diffusers), seen, strict=True):
        pipe.scheduler = getattr(module, f"{solver}Scheduler").from_config(pipe.scheduler.config)

        def callback(step: int, t: Any, latents: torch.Tensor, log: list[Any] = log) -> None:
            log.append((step, float(t), tuple(latents.shape)))

        with pytest.warns(FutureWarning, match="callback"):
            pipe(**seeded(), callback=callback, callback_steps=2)
    assert seen[0] == seen[1]
    assert seen[0]


def test_the_old_callback_and_wrong_steps(shared: StableDiffusionPipeline) -> None:
    for wrong in (0, -1, 1.5, "1"):
        with pytest.raises((TypeError, ValueError), match="callback_steps"), pytest.warns(FutureWarning):
            shared(**seeded(), callback=print, callback_steps=wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shared(**seeded(), callback=None, callback_steps=None)
    with pytest.raises(TypeError, match="callback should be a function, found 3"), pytest.warns(FutureWarning):
        shared(**seeded(), callback=3)


def test_a_callback_may_name_its_tensors(shared: StableDiffusionPipeline) -> None:
    class Cut:
        tensor_inputs = ("prompt_embeds",)

        def __call__(self, pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            assert set(tensors) == {"prompt_embeds"}
            if i == 1:
                pipe._guidance_scale = 0.0
                tensors["prompt_embeds"] = tensors["prompt_embeds"][-1:]
            return tensors

    assert shared(**seeded(), callback_on_step_end=Cut()).images.shape == (1, 4, 8, 8)


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["plain", "called", "optimized"])
def test_pipelines_can_be_copied_and_pickled(folder: Path, state: str) -> None:
    pipe = quiet(StableDiffusionPipeline.from_pretrained(folder))
    if state == "optimized":
        pipe.optimize()
    expected = pipe(**seeded()).images
    if state == "plain":
        pipe = quiet(StableDiffusionPipeline.from_pretrained(folder))
    for twin in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert isinstance(twin, DiffusionPipeline)
        assert torch.equal(twin(**seeded()).images, expected)


@pytest.mark.parametrize("kind", [np.int64, np.int32, lambda n: torch.tensor(n)])
def test_numbers_of_numpy_and_torch(shared: StableDiffusionPipeline, kind: Any) -> None:
    expected = shared(**CALL, num_images_per_prompt=2, seed=3, guidance_scale=2.5, clip_skip=1, eta=0.5).images
    real = np.float32 if kind in (np.int64, np.int32) else lambda x: torch.tensor(x)
    call = {**CALL, "num_inference_steps": kind(4), "height": kind(32), "width": kind(32)}
    numbers = {"num_images_per_prompt": kind(2), "seed": kind(3), "clip_skip": kind(1)}
    found = shared(**call, **numbers, guidance_scale=real(2.5), eta=real(0.5)).images
    assert torch.equal(found, expected)


# --- ready-made callbacks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(0.5,), (None, 1), (1.0,), (None, 7)], ids=str)
@pytest.mark.parametrize("several", [False, True])
def test_guidance_ends_at_the_cutoff(pipes: Any, arguments: tuple[Any, ...], several: bool) -> None:
    pictures = []
    for pipe, library in zip(pipes, (minidiff, diffusers), strict=True):
        module = importlib.import_module(f"{library.__name__}.callbacks")
        callback = module.SDCFGCutoffCallback(*arguments)
        if several:
            watch = type("Watch", (module.PipelineCallback,), {"tensor_inputs": ["latents"], "callback_fn": watched})()
            callback = module.MultiPipelineCallbacks([watch, callback])
            assert list(callback.tensor_inputs) == ["latents", "prompt_embeds"]
        pictures.append(pipe(**seeded(), callback_on_step_end=callback).images)
    guided = pipes[0](**seeded()).images
    assert torch.equal(*pictures)
    assert torch.equal(pictures[0], guided) == (arguments in ((1.0,), (None, 7)))


def watched(self: Any, pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    assert set(tensors) == {"latents", "prompt_embeds"}
    return tensors


def test_guidance_ends_for_every_picture_of_a_batch(shared: StableDiffusionPipeline) -> None:
    """The reference keeps one row of the embeddings, which fits one picture."""
    callback = SDCFGCutoffCallback(None, 1)
    call = {**CALL, "prompt": ["red heart", "two cats"], "seed": 3, "callback_on_step_end": callback}
    second = shared(**{**call, "prompt": "two cats", "seed": 4}).images
    assert relative_error(shared(**call).images[1:], second) < 1e-5  # measured: 1.3e-6; with one row 1


def test_guidance_ends_for_sdxl(tmp_path: Path) -> None:
    save_base(tmp_path)
    pictures = []
    for library in (minidiff, diffusers):
        pipe = quiet(library.StableDiffusionXLPipeline.from_pretrained(tmp_path))
        callback = importlib.import_module(f"{library.__name__}.callbacks").SDXLCFGCutoffCallback(0.25)
        pictures.append(pipe(**seeded(), callback_on_step_end=callback).images)
    assert torch.equal(*pictures)


@pytest.mark.parametrize("arguments", [(None, None), (0.5, 1), (2.0,), (1,), (-0.1,)], ids=str)
def test_a_cutoff_is_a_step_or_a_share(arguments: tuple[Any, ...]) -> None:
    for module in (minidiff.callbacks, importlib.import_module("diffusers.callbacks")):
        with pytest.raises(ValueError, match="cutoff_step_ratio"):
            module.PipelineCallback(*arguments)
    with pytest.raises(NotImplementedError, match="PipelineCallback has no callback_fn"):
        minidiff.callbacks.PipelineCallback()(None, 0, None, {})


def test_a_call_that_a_callback_ends_with_an_error_is_over(shared: StableDiffusionPipeline) -> None:
    """Also while the error, and with it every frame of the call, is still held."""
    from minidiff.pipelines.callbacks import RUNS, _under_way

    def callback(*arguments: Any) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as held:
        shared(**seeded(), callback_on_step_end=callback)
    assert held.value.__traceback__ is not None
    assert not _under_way[shared]
    assert RUNS.get(shared).latents is RUNS.get(shared).tensors is None


def test_facts_may_be_set_after_a_call(pipes: tuple[Any, Any]) -> None:
    """As by a loop of one's own after one of the pipeline's; the next call has its own facts."""
    for pipe in pipes:
        pipe(**seeded())
        steps = pipe.num_timesteps
        pipe._num_timesteps, pipe._guidance_scale = 123, 1.0
        assert pipe.num_timesteps == 123 and not pipe.do_classifier_free_guidance
        pipe(**seeded())
        assert pipe.num_timesteps == steps and pipe.do_classifier_free_guidance
