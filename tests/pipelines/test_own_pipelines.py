"""Pipelines that users write: on top of DiffusionPipeline, or with a loop of their own on top of a built-in one.

Each is written once, for either library, and gives the same numbers with both.
"""

import inspect
import json
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import minidiff
from minidiff.errors import ConfigError
from tests.pictures import load, seeded
from tests.theirs import diffusers, relative_error
from tests.tiny import save_tiny
from tests.tiny_xl import POOLED, save_base, save_refiner

PROMPT, NEGATIVE = ["a red heart", "two cats"], ["blue sky", ""]
SD = "pipelines.stable_diffusion.pipeline_stable_diffusion"


PICTURE = torch.rand(1, 3, 32, 32, generator=seeded(6), dtype=torch.float64)
MASK = (torch.rand(1, 1, 32, 32, generator=seeded(7), dtype=torch.float64) > 0.5).double()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    make = tmp_path_factory.mktemp
    return {
        "sd": save_tiny(make("sd")),
        "inpaint": save_tiny(make("inpaint"), unet={"in_channels": 9}),
        "edit": save_tiny(make("edit"), unet={"in_channels": 8}),
        "xl": save_base(make("xl")),
        "refiner": save_refiner(make("refiner")),
    }


def both(make: Any, folder: Path, **options: Any) -> tuple[Any, Any]:
    return tuple(load(make(library), folder, **options) for library in (minidiff, diffusers))


def assert_same(ours: Any, theirs: Any, bound: float = 1e-12) -> None:
    """Compare float64 runs: measured at most 5e-16, and 2.7e-8 with Euler, where the reference rounds to float32."""
    ours, theirs = (torch.as_tensor(one) for one in (ours, theirs))
    assert theirs.double().std() > 0.05
    assert relative_error(ours, theirs) < bound


# --- a built-in pipeline with a loop of one's own --------------------------------------------------------------------


def hand_written(library: ModuleType) -> Any:
    """The loop of the reference's text-to-image pipelines, with its names, in the user's class."""
    module = import_module(f"{library.__name__}.{SD}")
    randn_tensor = import_module(f"{library.__name__}.utils.torch_utils").randn_tensor

    class Mine(module.StableDiffusionPipeline):
        @torch.no_grad()
        def __call__(self, prompt, negative_prompt, scale=7.5, rescale=0.7, eta=0.3, generator=None, timesteps=None):
            height = self.unet.config.sample_size * self.vae_scale_factor
            self.check_inputs(prompt, height, height, 1, negative_prompt, None, None, None, None, ["latents"])
            self._guidance_scale, self._guidance_rescale, self._clip_skip = scale, rescale, None
            self._cross_attention_kwargs, self._interrupt = None, False
            device = self._execution_device
            positive, negative = self.encode_prompt(
                prompt, device, 1, self.do_classifier_free_guidance, negative_prompt, clip_skip=self.clip_skip
            )
            embeds = torch.cat([negative, positive])
            timesteps, steps = module.retrieve_timesteps(self.scheduler, 4, device, timesteps)
            shape = (len(prompt), self.unet.config.in_channels, height, height, embeds.dtype, device, generator)
            latents = self.prepare_latents(*shape, None)
            latents = latents + 0.0 * randn_tensor(latents.shape, generator=generator, dtype=latents.dtype)
            extra = self.prepare_extra_step_kwargs(generator, eta)
            self._num_timesteps = len(timesteps)
            with self.progress_bar(total=steps) as bar:
                for t in timesteps:
                    if self.interrupt:
                        continue
                    double = torch.cat([latents] * 2) if self.do_classifier_free_guidance else latents
                    double = self.scheduler.scale_model_input(double, t)
                    out = self.unet(double, t, encoder_hidden_states=embeds, return_dict=False)[0]
                    uncond, text = out.chunk(2)
                    out = uncond + self.guidance_scale * (text - uncond)
                    out = module.rescale_noise_cfg(out, text, guidance_rescale=self.guidance_rescale)
                    latents = self.scheduler.step(out, t, latents, **extra, return_dict=False)[0]
                    bar.update()
            image = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
            image, has_nsfw_concept = self.run_safety_checker(image, device, embeds.dtype)
            pictures = self.image_processor.postprocess(image, output_type="np", do_denormalize=[True] * len(image))
            self.maybe_free_model_hooks()
            old = self.decode_latents(latents)
            output = module.StableDiffusionPipelineOutput(pictures, has_nsfw_concept)
            return (
                output.images,
                old,
                self.numpy_to_pil(old),
                self._encode_prompt(prompt, device, 1, True, negative_prompt),
            )

    return Mine


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler"])
def test_the_loop_of_the_reference_in_a_derived_class(folders: dict[str, Path], name: str) -> None:
    results = []
    for pipe, library in zip(
        both(hand_written, folders["sd"], safety_checker=None), (minidiff, diffusers), strict=True
    ):
        pipe.scheduler = getattr(library, name).from_config(pipe.scheduler.config)
        custom = {"timesteps": [901, 500, 77]} if name == "DDPMScheduler" else {}
        results.append(pipe(PROMPT, NEGATIVE, generator=seeded(), **custom))
        assert pipe.num_timesteps == len(pipe.scheduler.timesteps) and pipe.guidance_scale == 7.5
    for ours, theirs in zip(*results, strict=True):
        if isinstance(ours[0], Image.Image):
            ours, theirs = (
                np.stack([np.asarray(one, dtype=np.float64) / 255 for one in side]) for side in (ours, theirs)
            )
        assert_same(ours, theirs, 2e-7 if "Euler" in name else 1e-12)


def from_image(library: ModuleType) -> Any:
    """Image to image and inpainting by hand: what comes before and after the loop."""

    class Mine(library.StableDiffusionInpaintPipeline):
        @torch.no_grad()
        def __call__(self, strength):
            generator, dtype, device = seeded(), torch.float64, self._execution_device
            pure = strength == 1
            self.scheduler.set_timesteps(6, device=device)
            timesteps, steps = self.get_timesteps(6, strength, device)
            image = self.image_processor.preprocess(PICTURE.numpy().transpose(0, 2, 3, 1), 32, 32)
            mask = self.mask_processor.preprocess(MASK, 32, 32)
            size = (2, 4, 32, 32, dtype, device, generator, None)
            given = {"image": image, "timestep": timesteps[:1].repeat(2), "is_strength_max": pure}
            latents, noise, x0 = self.prepare_latents(*size, **given, return_noise=True, return_image_latents=True)
            size = (2, 32, 32, dtype, device, generator, True)
            mask, masked = self.prepare_mask_latents(mask, image * (mask < 0.5), *size)
            self.check_inputs("p", PICTURE, MASK, 32, 32, strength, 1, "np", None, None, None, None, None, ["mask"])
            x0 = torch.cat([x0, self._encode_vae_image(image, seeded(5)), self._encode_vae_image(image, [seeded(6)])])
            return latents, noise, x0, mask, masked, timesteps.double(), torch.tensor([float(steps), 0.0])

    return Mine


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_what_inpainting_by_hand_calls(folders: dict[str, Path], strength: float) -> None:
    pipes = both(from_image, folders["inpaint"], safety_checker=None)
    for ours, theirs in zip(*(pipe(strength) for pipe in pipes), strict=True):
        assert_same(ours, theirs)


def other_calls(library: ModuleType, folders: dict[str, Path]) -> list[torch.Tensor]:
    """What loops by hand call on the other pipelines."""
    f64, cpu, sizes = torch.float64, torch.device("cpu"), ((32, 48), (0, 4), (40, 32))
    found = []
    pipe = load(library.StableDiffusionImg2ImgPipeline, folders["sd"], safety_checker=None)
    for scheduler in ("EulerDiscreteScheduler", "HeunDiscreteScheduler"):
        pipe.scheduler = getattr(library, scheduler).from_config(pipe.scheduler.config)
        pipe.scheduler.set_timesteps(10)
        timesteps, steps = pipe.get_timesteps(10, 0.58, None)
        found += [timesteps, torch.arange(float(steps))]
        found.append(pipe.prepare_latents(PICTURE, timesteps[:1].repeat(4), 2, 2, f64, cpu, seeded()))
        found.append(pipe.prepare_latents(PICTURE[:, :1].repeat(1, 4, 1, 1), timesteps[:1], 1, 1, f64, cpu, seeded()))
    pipe.check_inputs("p", 0.5, 1)
    edit = load(library.StableDiffusionInstructPix2PixPipeline, folders["edit"], safety_checker=None)
    found += [edit.prepare_image_latents(PICTURE, 2, 1, f64, cpu, guided) for guided in (True, False)]
    found += [edit._encode_prompt(PROMPT, cpu, 2, True, NEGATIVE), edit._encode_prompt(PROMPT, cpu, 1, False)]
    edit.check_inputs("p", 1)
    xl = load(library.StableDiffusionXLPipeline, folders["xl"])
    xl.check_inputs("p", None, 32, 32, 1)
    found.append(xl._get_add_time_ids(*sizes, f64, text_encoder_projection_dim=POOLED))
    found.append(xl.prepare_latents(2, 4, 32, 40, f64, cpu, [seeded(1), seeded(2)]))
    found += [xl.get_guidance_scale_embedding(torch.tensor([6.5, 0.0]), n, dtype=f64) for n in (256, 31)]
    found.append(xl.get_guidance_scale_embedding(torch.tensor([6.5, 0.0]), 256))
    assert xl.watermark is None and xl.default_sample_size == 8
    xl.vae.half()
    xl.upcast_vae()
    assert xl.vae.dtype is torch.float32
    image = load(library.StableDiffusionXLImg2ImgPipeline, folders["refiner"])
    for scheduler in ("EulerDiscreteScheduler", "HeunDiscreteScheduler"):
        image.scheduler = getattr(library, scheduler).from_config(image.scheduler.config)
        image.scheduler.set_timesteps(12)
        found += [image.get_timesteps(12, 0.3, None, start)[0] for start in (None, 0.75)]
    found.append(image.prepare_latents(PICTURE, timesteps, 2, 1, f64, cpu, [seeded(3), seeded(4)], add_noise=False))
    sizes = (*sizes, 6.0, 2.5, (32, 32), (1, 2), (48, 48))
    found.append(torch.cat(image._get_add_time_ids(*sizes, f64, text_encoder_projection_dim=POOLED)))
    image.check_inputs("p", None, 0.5, 10, 1)
    return found


def test_what_other_loops_by_hand_call(folders: dict[str, Path]) -> None:
    ours, theirs = (other_calls(library, folders) for library in (minidiff, diffusers))
    assert len(ours) == len(theirs) == 23
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert_same(one, other)


BY_HAND = (
    "prepare_latents prepare_extra_step_kwargs decode_latents get_timesteps get_guidance_scale_embedding upcast_vae "
    "_get_add_time_ids run_safety_checker prepare_mask_latents prepare_image_latents _encode_prompt _encode_vae_image"
).split()


@pytest.mark.parametrize("name", [name for name in minidiff.__all__ if re.fullmatch("StableDiffusion.*Pipeline", name)])
def test_methods_for_loops_by_hand_have_the_signatures_of_the_reference(name: str) -> None:
    ours, theirs = (getattr(library, name) for library in (minidiff, diffusers))
    for method in [method for method in BY_HAND if hasattr(theirs, method)]:
        expected = list(inspect.signature(getattr(theirs, method)).parameters)
        takes = inspect.signature(getattr(ours, method)).parameters
        positional = [one for one, kind in takes.items() if kind.kind is kind.POSITIONAL_OR_KEYWORD]
        open_ended = any(kind.kind is kind.VAR_KEYWORD for kind in takes.values())
        assert set(expected) <= set(takes) or open_ended, method
        assert positional[: len(expected)] == expected[: len(positional)], method
        for one in set(expected) & set(takes):
            default = inspect.signature(getattr(theirs, method)).parameters[one].default
            assert takes[one].default == default or default is inspect.Parameter.empty, (method, one)
    assert ["self", "prompt", *ours._checked()] == list(inspect.signature(theirs.check_inputs).parameters)


@pytest.mark.parametrize(
    ("arguments", "error", "expected"),
    [
        (("p", 32, 33, 1), ValueError, "width should be divisible by 4, found 33"),
        (("p", 32, 32, 0), ValueError, "callback_steps should be at least 1"),
        ((None, 32, 32, 1), ValueError, "give either prompt or prompt_embeds"),
        ((7, 32, 32, 1), ValueError, "prompt should be a str or a list"),
        (("p", 32, 32, 1, None, None, None, "image"), TypeError, "does not implement the argument.s. ip_adapter_image"),
        (("p", 32, 32, 1, None, None, None, None, None, ["mask"]), ValueError, "found mask"),
        (("p", *[None] * 10), TypeError, "check_inputs takes prompt, height"),
    ],
)
def test_check_inputs_says_what_is_wrong(folders: dict[str, Path], arguments: Any, error: Any, expected: str) -> None:
    pipe = load(minidiff.StableDiffusionPipeline, folders["sd"])
    with pytest.raises(error, match=expected):
        pipe.check_inputs(*arguments)
    with pytest.raises(TypeError, match="check_inputs takes prompt"):
        pipe.check_inputs("p", 32, 32, 1, prompt_2="q")


# --- a pipeline of one's own -----------------------------------------------------------------------------------------


def own(library: ModuleType) -> Any:
    class Mine(library.DiffusionPipeline):
        model_cpu_offload_seq = "unet->vae"
        _optional_components = ["vae"]  # noqa: RUF012

        def __init__(
            self,
            unet: library.UNet2DConditionModel,
            scheduler: library.DDIMScheduler,
            vae: library.AutoencoderKL = None,
            clip: bool = True,
        ):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
            self.register_to_config(clip=clip)

        @torch.no_grad()
        def __call__(self, generator):
            unet = self.unet.config
            x = torch.randn((1, unet.in_channels, 8, 8), generator=generator, dtype=self.dtype)
            ctx = torch.ones(1, 5, unet.cross_attention_dim, device=self._execution_device, dtype=self.dtype)
            self.scheduler.set_timesteps(5)
            for t in self.progress_bar(self.scheduler.timesteps):
                x = self.scheduler.step(self.unet(x, t, ctx).sample, t, x).prev_sample
            return x.clamp(-1, 1) if self.config.clip else x

    return Mine


def test_a_pipeline_of_ones_own(folders: dict[str, Path], tmp_path: Path) -> None:
    results = []
    for library in (minidiff, diffusers):
        pipe = load(own(library), folders["sd"])
        assert set(pipe.components) == {"unet", "scheduler", "vae"} and pipe.device.type == "cpu"
        results.append(pipe(generator=seeded()))
        pipe.save_pretrained(tmp_path / library.__name__)
        index = json.loads((tmp_path / library.__name__ / "model_index.json").read_text())
        assert index["_class_name"] == "Mine" and index["clip"] is True
        assert index["unet"] == ["diffusers", "UNet2DConditionModel"] and index["vae"] == ["diffusers", "AutoencoderKL"]
        raw = own(library).from_pipe(pipe, clip=False)
        assert raw.unet is pipe.unet and not torch.equal(raw(generator=seeded()), results[-1])
        alone = own(library)(pipe.unet, pipe.scheduler)
        assert alone.vae is None and alone.components["vae"] is None
    assert_same(*results)
    for library in (minidiff, diffusers):  # each reads the other's folder
        for folder in ("minidiff", "diffusers"):
            again = load(own(library), tmp_path / folder, vae=None)
            assert again.config.clip is True and again.vae is None
            assert_same(again(generator=seeded()), results[1])


def test_a_pipeline_of_ones_own_takes_what_it_needs_of_a_checkpoint(folders: dict[str, Path], caplog: Any) -> None:
    pipe = own(minidiff).from_pretrained(folders["sd"])
    assert list(pipe.components) == ["unet", "scheduler", "vae"]
    assert "Mine has no place for its text_encoder, tokenizer; not loaded" in caplog.text.replace("\n", " ")


def test_a_folder_of_ones_own_pipeline_is_not_for_the_base_class(folders: dict[str, Path], tmp_path: Path) -> None:
    load(own(minidiff), folders["sd"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="If Mine is a pipeline of your own, call Mine.from_pretrained"):
        minidiff.DiffusionPipeline.from_pretrained(tmp_path)


class Scale(minidiff.ConfigMixin):
    """A component of one's own, in a module of one's own."""

    def __init__(self, factor):
        self.factor = factor

    def save_pretrained(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "scale.json").write_text(json.dumps(self.factor))

    @classmethod
    def from_pretrained(cls, folder, subfolder=None, **options):
        return cls(json.loads((Path(folder) / subfolder / "scale.json").read_text()))


def test_a_component_of_ones_own(folders: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    class Scaled(minidiff.DiffusionPipeline):
        def __init__(self, unet, scale, other=None):
            super().__init__()
            self.register_modules(unet=unet, scale=scale, other=other)

    monkeypatch.setitem(sys.modules, "my_parts", module := ModuleType("my_parts"))
    monkeypatch.setattr(Scale, "__module__", "my_parts")
    module.Scale = Scale
    unet = minidiff.UNet2DConditionModel.from_pretrained(folders["sd"], subfolder="unet")
    Scaled(unet, Scale(3), Scale(4)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scale"] == ["my_parts", "Scale"]
    again = Scaled.from_pretrained(tmp_path)
    assert again.scale.factor == 3 and again.other.factor == 4  # other has a default: its entry says what it is
    refused = "scale is my_parts.Scale.*a class of your own that is derived from minidiff's, import its module first"
    module.Scale = type("Scale", (), dict(vars(Scale)))  # a file cannot choose among whatever has been imported
    with pytest.raises(ConfigError, match=refused):
        Scaled.from_pretrained(tmp_path)
    monkeypatch.delitem(sys.modules, "my_parts")  # nothing is imported because a file says so
    with pytest.raises(ConfigError, match=refused):
        Scaled.from_pretrained(tmp_path)


def own_parts(library: ModuleType) -> tuple[Any, Any]:
    mixins = import_module(f"{library.__name__}.configuration_utils")

    class Net(library.ModelMixin, library.ConfigMixin):
        __module__ = "my_parts"

        @mixins.register_to_config
        def __init__(self, width: int = 3):
            super().__init__()
            self.layer = torch.nn.Linear(width, width)

        def forward(self, x, t):
            return self.layer(x)

    class Halving(library.SchedulerMixin, library.ConfigMixin):
        __module__ = "my_parts"

        @mixins.register_to_config
        def __init__(self, steps: int = 4):
            pass

        def step(self, out, t, x):
            return (x + out) / 2

    return Net, Halving


@pytest.mark.parametrize("library", [minidiff, diffusers], ids=["minidiff", "diffusers"])
def test_networks_and_schedulers_of_ones_own(library: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "my_parts", module := ModuleType("my_parts"))
    Net, Halving = module.Net, module.Halving = own_parts(library)
    module.ModelMixin, module.SchedulerMixin = library.ModelMixin, library.SchedulerMixin  # theirs looks for them there

    class Mine(library.DiffusionPipeline):
        def __init__(self, net, scheduler):
            super().__init__()
            self.register_modules(net=net, scheduler=scheduler)

        @torch.no_grad()
        def __call__(self, x):
            for t in range(self.scheduler.config.steps):
                x = self.scheduler.step(self.net(x, t), t, x)
            return x

    pipe = Mine(Net(5), Halving(steps=3))
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["net"] == ["my_parts", "Net"] and index["scheduler"] == ["my_parts", "Halving"]
    again = Mine.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert again.dtype is torch.float64 and again.scheduler.config.steps == 3
    x = torch.ones(1, 5)
    assert torch.allclose(again(x.double()), pipe(x).double(), atol=1e-6)


# --- what a pipeline prepares images with ----------------------------------------------------------------------------


def test_an_image_processor_that_is_assigned_is_used(folders: dict[str, Path]) -> None:
    pictures = []
    big = Image.fromarray((PICTURE[0].permute(1, 2, 0) * 255).byte().numpy()).resize((50, 44))
    for library in (minidiff, diffusers):
        pipe = load(library.StableDiffusionInpaintPipeline, folders["sd"], safety_checker=None)
        for _ in range(2):
            call = {"image": big, "mask_image": big.convert("L"), "height": 32, "width": 32, "output_type": "np"}
            pictures.append(pipe("red heart", num_inference_steps=2, generator=seeded(), **call).images)
            pipe.image_processor = (
                library.VaeImageProcessor(vae_scale_factor=4, resample="nearest")
                if library is minidiff
                else diffusers.image_processor.VaeImageProcessor(4, 4, resample="nearest")
            )
            pipe.mask_processor = type(pipe.image_processor)(
                vae_scale_factor=4, resample="nearest", do_normalize=False, do_binarize=True, do_convert_grayscale=True
            )
            pipe.vae_scale_factor = 4
    ours, theirs = pictures[:2], pictures[2:]
    assert abs(theirs[0] - theirs[1]).max() > 1e-3
    for one, other in zip(ours, theirs, strict=True):
        assert_same(one, other)


def test_a_pipeline_may_say_its_components_otherwise(tmp_path: Path) -> None:
    """Published pipelines compute ``components`` from ``config`` to hand them to others."""

    class Mega(minidiff.DiffusionPipeline):
        def __init__(self, scheduler: Any, unet: Any) -> None:
            super().__init__()
            self.register_modules(scheduler=scheduler, unet=unet)
            self.register_to_config(requires_safety_checker=False)

        @property
        def components(self) -> dict[str, Any]:
            return {name: getattr(self, name) for name in self.config if not name.startswith("_")}

    pipe = Mega(minidiff.DDPMScheduler(), minidiff.UNet2DModel(block_out_channels=[32, 32, 32, 32]))
    with pytest.warns(FutureWarning, match=r"write Mega\.config\.requires_safety_checker"):
        assert pipe.components == {"scheduler": pipe.scheduler, "unet": pipe.unet, "requires_safety_checker": False}
    assert pipe.to(torch.float64).dtype == torch.float64
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "unet/config.json").exists()


def test_a_pipeline_derived_from_sdxl_may_name_other_optional_components(folders: dict[str, Path]) -> None:
    class Edited(minidiff.StableDiffusionXLPipeline):
        _optional_components: ClassVar[list[str]] = ["safety_checker", "feature_extractor"]

    base = minidiff.StableDiffusionXLPipeline.from_pretrained(folders["xl"])
    assert Edited(**base.components).unet is base.unet
