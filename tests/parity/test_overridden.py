"""What a program overrides, patches or replaces is called by pipelines as the reference calls it, or refused."""

import functools
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from theirs import diffusers
from tiny import save_tiny
from torch import Tensor, nn

import minidiff

CALL = {"prompt": "red heart", "num_inference_steps": 4, "output_type": "latent", "height": 32, "width": 32}
PICTURE = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
MASK = Image.linear_gradient("L").resize((32, 32))
TASKS = {
    "text": ("StableDiffusionPipeline", CALL),
    "image": (
        "StableDiffusionImg2ImgPipeline",
        {"prompt": "a cat", "image": PICTURE, "strength": 0.8, "num_inference_steps": 5},
    ),
    "mask": (
        "StableDiffusionInpaintPipeline",
        {**CALL, "image": PICTURE, "mask_image": MASK, "strength": 0.75},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def pair(folder: Path, task: str = "text", scheduler: str = "EulerDiscreteScheduler", **fields: Any) -> list[Any]:
    made = []
    for module in (minidiff, diffusers):
        pipe = getattr(module, TASKS[task][0]).from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = getattr(module, scheduler).from_config(pipe.scheduler.config, **fields)
        made.append(pipe)
    return made


def both(pipes: list[Any], task: str = "text", **arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the latents of ours and theirs; each must differ from those without what the test has changed."""
    call = {**TASKS[task][1], "output_type": "latent", **arguments}
    return tuple(pipe(**call, generator=torch.Generator().manual_seed(0)).images for pipe in pipes)


def check(pipes: list[Any], task: str = "text", **arguments: Any) -> None:
    ours, theirs = both(pipes, task, **arguments)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-5)  # measured: at most 8e-6


def patch(owner: Any, name: str, change: Any) -> None:
    """Put over ``owner.name`` a function that hands the original's result to ``change``."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return change(original(*args, **kwargs))

    setattr(owner, name, patched)


def scaled(factor: float) -> Any:
    return lambda out: type(out)((out[0] * factor, *out[1:])) if isinstance(out, tuple) else out * factor


# --- schedulers ------------------------------------------------------------------------------------------------------

METHODS = {"step": scaled(0.9), "scale_model_input": scaled(1.1)}


@pytest.mark.parametrize("solver", ["EulerDiscrete", "DDIM", "PNDM", "DPMSolverMultistep", "HeunDiscrete"])
@pytest.mark.parametrize("method", METHODS)
def test_a_patched_method_of_a_scheduler(folder: Path, method: str, solver: str) -> None:
    pipes = pair(folder, scheduler=f"{solver}Scheduler")
    plain = both(pipes)[0]
    for pipe in pipes:
        patch(pipe.scheduler, method, METHODS[method])
    check(pipes)
    assert not torch.equal(both(pipes)[0], plain)


def test_a_subclass_of_a_scheduler(folder: Path) -> None:
    pipes = pair(folder)
    for pipe in pipes:

        class Mine(type(pipe.scheduler)):
            def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
                super().set_timesteps(*args, **kwargs)
                self.seen = self.num_inference_steps

            def step(self, out: Tensor, t: Any, x: Tensor, **kwargs: Any) -> Any:
                return super().step(out, t, 0.95 * x, **kwargs)

        pipe.scheduler = Mine.from_config(pipe.scheduler.config)
    check(pipes)
    assert [pipe.scheduler.seen for pipe in pipes] == [4, 4]
    assert pipes[0].scheduler.step_index == pipes[1].scheduler.step_index


def test_a_patched_class(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (minidiff, diffusers):
        kind = module.DDIMScheduler

        def step(self: Any, out: Tensor, *args: Any, original: Any = kind.step, **kwargs: Any) -> Any:
            return original(self, 0.5 * out, *args, **kwargs)

        monkeypatch.setattr(kind, "step", functools.wraps(kind.step)(step))
    check(pair(folder, scheduler="DDIMScheduler"), eta=0.0)


@pytest.mark.parametrize("task", ["image", "mask"])
def test_a_patched_add_noise(folder: Path, task: str) -> None:
    pipes = pair(folder, task, "PNDMScheduler")
    for pipe in pipes:
        patch(pipe.scheduler, "add_noise", lambda x: x + 0.1)
    check(pipes, task)


def test_arguments_of_step(folder: Path) -> None:
    pipes = pair(folder, scheduler="DDIMScheduler")
    for pipe in pipes:
        patch(pipe.scheduler, "step", scaled(0.9))
    check(pipes, eta=0.7)  # the patched step takes eta and generator, by the signature that it keeps


class Duck:
    """A scheduler that is no relative of anybody's."""

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, config: Any) -> None:
        self.config = config

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.timesteps = torch.linspace(999, 0, num_inference_steps, device=device).long()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample / (1 + timestep / 1000)

    def step(self, out: Tensor, t: Any, x: Tensor, return_dict: bool = True) -> Any:
        return (x - 0.1 * out,)


def test_a_scheduler_of_ones_own(folder: Path) -> None:
    pipes = pair(folder)
    for pipe in pipes:
        pipe.scheduler = Duck(pipe.scheduler.config)
    check(pipes)


def test_previews_of_an_overridden_scheduler(folder: Path) -> None:
    pipe = pair(folder)[0]
    patch(pipe.scheduler, "step", scaled(0.9))
    step = next(pipe.steps("a cat", num_inference_steps=2, seed=0))
    assert step.denoised.shape == step.latents.shape
    pipe.scheduler = Duck(pipe.scheduler.config)
    with pytest.raises(TypeError, match="Duck.*clean latents"):
        next(pipe.steps("a cat", num_inference_steps=2, seed=0))


# --- methods of pipelines --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_a_patched_encode_prompt(folder: Path, task: str) -> None:
    pipes = pair(folder, task)
    for pipe in pipes:
        patch(pipe, "encode_prompt", lambda out: (out[0] * 0.5, out[1]))
    check(pipes, task)


def test_a_subclass_with_latents_of_its_own(folder: Path) -> None:
    pipes = pair(folder)
    made = []
    for pipe in pipes:

        class Mine(type(pipe)):
            def prepare_latents(
                self, B: int, C: int, height: int, width: int, dtype: Any, device: Any, generator: Any, latents: Any
            ) -> Tensor:
                f = self.vae_scale_factor
                noise = torch.randn((B, C, height // f, width // f), generator=generator).to(device, dtype)
                assert self.do_classifier_free_guidance
                return noise.flip(-1) * self.scheduler.init_noise_sigma

        made.append(Mine(**pipe.components))
        made[-1].set_progress_bar_config(disable=True)
    check(made)


def test_patched_arguments_of_step(folder: Path) -> None:
    pipes = pair(folder, scheduler="DDIMScheduler")
    for pipe in pipes:
        pipe.prepare_extra_step_kwargs = lambda generator, eta: {"eta": 0.5, "generator": generator}
    check(pipes)


def test_encode_prompt_of_sdxl(tmp_path: Path) -> None:
    from tiny_xl import save_base

    folder, made = save_base(tmp_path), []
    for module in (minidiff, diffusers):
        pipe = module.StableDiffusionXLPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        patch(pipe, "encode_prompt", lambda out: (out[0] * 0.5, *out[1:]))
        made.append(pipe)
    check(made, height=32, width=32)


@pytest.mark.parametrize("name", ["check_inputs", "run_safety_checker"])
def test_what_no_call_would_reach_is_refused(folder: Path, name: str) -> None:
    pipe = pair(folder)[0]
    setattr(pipe, name, lambda *args, **kwargs: None)
    with pytest.raises(TypeError, match=f"StableDiffusionPipeline.{name} is overridden"):
        pipe(**CALL)
    pipe = pair(folder)[0]
    pipe.safety_checker = lambda images, clip_input: (images, [False])
    with pytest.raises(TypeError, match="safety_checker"):
        pipe(**CALL)


# --- networks of one's own -------------------------------------------------------------------------------------------


def test_a_patched_forward(folder: Path) -> None:
    pipes = pair(folder)
    for pipe in pipes:
        original = pipe.unet.forward

        def forward(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            return (out[0] * 0.5,)

        pipe.unet.forward = forward
    check(pipes)


class Traced(nn.Module):
    """A traced UNet as documentation shows it."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.config, self.in_channels, self.dtype = unet.config, unet.config.in_channels, torch.float32
        unet.forward = functools.partial(unet.forward, return_dict=False)
        example = (torch.zeros(2, 4, 8, 8), torch.tensor(1), torch.zeros(2, 77, 24))
        self.traced = torch.jit.trace(unet, example, check_trace=False)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(self, sample: Tensor, t: Tensor, encoder_hidden_states: Tensor, **others: Any) -> tuple[Tensor]:
        return (self.traced(sample, t, encoder_hidden_states)[0],)


@pytest.mark.filterwarnings("ignore")
def test_a_traced_unet(folder: Path) -> None:
    pipes = pair(folder)
    expected = both(pipes)[0]
    pipes[0].unet = Traced(pipes[0].unet)
    torch.testing.assert_close(both(pipes[:1])[0], expected, rtol=0, atol=1e-5)
    rebuilt = minidiff.StableDiffusionPipeline(**pipes[0].components)  # a network of another class fits too
    rebuilt.set_progress_bar_config(disable=True)
    torch.testing.assert_close(both([rebuilt])[0], expected, rtol=0, atol=1e-5)


def test_compiled_networks(folder: Path) -> None:
    pipes = pair(folder)
    expected = both(pipes)[0]
    pipes[0].unet = torch.compile(pipes[0].unet, backend="eager")
    pipes[0].vae.decode = torch.compile(pipes[0].vae.decode, backend="eager")
    torch.testing.assert_close(both(pipes[:1])[0], expected, rtol=0, atol=1e-5)
    assert pipes[0](**{**CALL, "output_type": "np"}).images.shape == (1, 32, 32, 3)


class TupleVae:
    """An autoencoder that is no module, and answers with tuples where it may."""

    def __init__(self, vae: Any) -> None:
        self.vae, self.config, self.dtype, self.device = vae, vae.config, vae.dtype, torch.device("cpu")

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> tuple[Tensor]:
        return (self.vae.decode(z)[0] * 0.5,)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        return self.vae.encode(x)


@pytest.mark.parametrize("task", ["text", "image"])
def test_an_autoencoder_of_ones_own(folder: Path, task: str) -> None:
    pipes = pair(folder, task)
    for pipe in pipes:
        pipe.vae = TupleVae(pipe.vae)
    check(pipes, task, output_type="pt")


def test_the_methods_that_are_refused_are_those_the_reference_calls() -> None:
    from minidiff.pipelines.foreign import STEPS

    called = "".join(inspect.getsource(getattr(diffusers, name).__call__) for name, _ in TASKS.values())
    for name in (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionInstructPix2PixPipeline",
    ):
        called += inspect.getsource(getattr(diffusers, name).__call__)
    methods = set(re.findall(r"self\.([a-z_]+)\(", called))
    known = {"unet", "progress_bar", "maybe_free_model_hooks", "prepare_ip_adapter_image_embeds"}
    assert methods - known <= {*STEPS, "upcast_vae", "watermark", "denoising_value_valid"}
