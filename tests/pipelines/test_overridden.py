"""What a program overrides, patches or replaces is called by pipelines as the reference calls it, or refused."""

import functools
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import minidiff
from tests.theirs import diffusers
from tests.tiny import save_tiny

CALL = {"prompt": "red heart", "num_inference_steps": 4, "output_type": "latent", "height": 32, "width": 32}
PICTURE = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
NOT_STEPS = {"unet", "progress_bar", "maybe_free_model_hooks", "prepare_ip_adapter_image_embeds"}
NOT_STEPS |= {"get_guidance_scale_embedding"}  # of UNets that are told it, see test_lcm_pipelines
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
    from tests.tiny_xl import save_base

    folder, made = save_base(tmp_path), []
    for module in (minidiff, diffusers):
        pipe = module.StableDiffusionXLPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        patch(pipe, "encode_prompt", lambda out: (out[0] * 0.5, *out[1:]))
        made.append(pipe)
    check(made, height=32, width=32)


@pytest.mark.parametrize("name", ["check_inputs", "upcast_vae"])
def test_what_no_call_would_reach_is_refused(folder: Path, name: str) -> None:
    pipe = pair(folder)[0]
    setattr(pipe, name, lambda *args, **kwargs: None)
    with pytest.raises(TypeError, match=f"StableDiffusionPipeline.{name} is overridden"):
        pipe(**CALL)


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return all pipelines over latents, and what each of them is called with besides ``CALL``."""
    from tests.tiny_xl import save_base

    made, made_of = {}, {}
    image, mask = {"image": PICTURE}, {"image": PICTURE, "mask_image": MASK}
    for channels in (4, 8):
        made_of["", channels] = save_tiny(tmp_path_factory.mktemp("sd"), unet={"in_channels": channels})
        made_of["XL", channels] = save_base(tmp_path_factory.mktemp("xl"), unet={"in_channels": channels})
    for task, more in (("", {}), ("Img2Img", image), ("Inpaint", mask), ("InstructPix2Pix", image)):
        for kind in ("", "XL"):
            name = f"StableDiffusion{kind}{task}Pipeline"
            pipe = getattr(minidiff, name).from_pretrained(made_of[kind, 8 if task == "InstructPix2Pix" else 4])
            pipe.set_progress_bar_config(disable=True)
            made[name] = pipe, {**CALL, **more, "strength": 0.9}
            sized = "strength" in inspect.signature(type(pipe).__call__).parameters
            for absent in ("height", "width") if task == "Img2Img" else [] if sized else ["strength"]:
                del made[name][1][absent]
            if name == "StableDiffusionInstructPix2PixPipeline":
                del made[name][1]["height"], made[name][1]["width"]
    return made


@pytest.mark.parametrize("task", ["", "Img2Img", "Inpaint", "InstructPix2Pix"])
@pytest.mark.parametrize("kind", ["", "XL"])
def test_every_method_of_the_references_call_is_called_or_refused(
    eight: dict[str, Any], kind: str, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"StableDiffusion{kind}{task}Pipeline"
    pipe, call = eight[name]
    theirs = getattr(diffusers, name)
    methods = set(re.findall(r"self\.([a-z_]+)\(", inspect.getsource(theirs.__call__)))
    methods = {method for method in methods if hasattr(theirs, method)} - NOT_STEPS
    assert len(methods) >= 5
    for method in methods:
        called = []
        with monkeypatch.context() as patches:
            original = getattr(pipe, method)
            patches.setattr(
                pipe, method, lambda *a, _=(original, called), **k: (_[1].append(1), _[0](*a, **k))[1], raising=False
            )
            try:
                pipe(**{**call, "output_type": "np"})
            except TypeError as error:
                assert f"{name}.{method} is overridden" in str(error)
                called.append(error)
        assert called, f"{name}.{method} is overridden, and nothing happens"


CHECKERS = {
    "nothing is wrong": lambda images, **kwargs: (images, [False] * len(images)),
    "the second": lambda images, clip_input=None: (torch.stack([images[0], images[1] * 0]), [False, True]),
}


class Extractor:
    """Makes features of pictures as a processor of CLIP's does."""

    def __call__(self, pictures: list[Image.Image], return_tensors: str) -> Any:
        assert [picture.size for picture in pictures] == [(32, 32)] * 2
        return self

    def to(self, device: Any) -> "Extractor":
        return self

    pixel_values = torch.ones(2, 3)


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize("output_type", ["np", "latent"])
@pytest.mark.parametrize("task", TASKS)
def test_a_safety_checker_of_ones_own(folder: Path, checker: str, output_type: str, task: str) -> None:
    outs, seen = [], []

    def look(images: Tensor, clip_input: Tensor) -> Any:
        seen.append((images.shape, clip_input.dtype))
        return CHECKERS[checker](images, clip_input=clip_input)

    for pipe in pair(folder, task):
        pipe.safety_checker, pipe.feature_extractor = look, Extractor()
        call = {**TASKS[task][1], "output_type": output_type, "num_images_per_prompt": 2}
        outs.append(pipe(**call, generator=torch.Generator().manual_seed(0)))
    ours, theirs = outs
    torch.testing.assert_close(torch.as_tensor(ours.images), torch.as_tensor(theirs.images), rtol=0, atol=5e-5)
    assert ours.nsfw_content_detected == theirs.nsfw_content_detected
    assert seen == [((2, 3, 32, 32), torch.float32)] * 2 * (output_type == "np")


def test_a_safety_checker_without_features(folder: Path, tmp_path: Path) -> None:
    """The line that most programs write; the reference asks for a feature extractor too."""
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(folder, safety_checker=lambda images, **_: (images, [True]))
    pipe.set_progress_bar_config(disable=True)
    images, flags = pipe(**{**CALL, "output_type": "pil"}, return_dict=False)
    assert len(images) == 1 and flags == [True]
    pipe.save_pretrained(tmp_path)  # without what cannot be saved, as the reference
    assert minidiff.DiffusionPipeline.from_pretrained(tmp_path).safety_checker is None
    pipe.run_safety_checker = lambda image, device, dtype: (image, [False])
    assert pipe(**{**CALL, "output_type": "pil"}).nsfw_content_detected == [False]


@pytest.mark.parametrize("kind", ["", "XL"])
def test_an_image_encoder_is_kept_and_not_asked(eight: dict[str, Any], kind: str) -> None:
    pipe, call = eight[f"StableDiffusion{kind}Pipeline"]
    call = {name: value for name, value in call.items() if name != "strength"} | {"seed": 0}
    encoder = pipe.text_encoder  # any network
    made = type(pipe)(**{**pipe.components, "image_encoder": encoder})
    made.set_progress_bar_config(disable=True)
    assert made.to(torch.float32).components["image_encoder"] is encoder
    assert torch.equal(made(**call).images, pipe(**call).images)
    with pytest.raises(TypeError, match="does not implement the argument.*ip_adapter_image"):
        made(**call, ip_adapter_image=PICTURE)


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
    known = {"unet", "watermark", "denoising_value_valid", "run_safety_checker", "get_guidance_scale_embedding"}
    assert methods - known - NOT_STEPS <= {*STEPS}
