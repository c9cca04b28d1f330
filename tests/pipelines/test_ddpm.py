"""Whole pictures, seed for seed: ``DDPMPipeline`` and ``DDIMPipeline`` against the reference's, in float64."""

import functools
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import minidiff
from minidiff import DDIMPipeline, DDPMPipeline, DiffusionPipeline, UNet2DModel
from minidiff.errors import ConfigError
from tests.hub_server import HubServer, Repository, run_with
from tests.pictures import seeded
from tests.theirs import diffusers, relative_error
from tests.tiny_ddpm import save_tiny

BOUND = 1e-10  # measured: at most 2e-14


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("ddpm"))


def load(folder: Path, name: str) -> tuple[Any, Any]:
    """Load ours and theirs from the same files, in float64."""
    pipes = tuple(
        getattr(library, name).from_pretrained(folder, dtype=torch.float64) for library in (minidiff, diffusers)
    )
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


@pytest.fixture(scope="module")
def ddpm(folder: Path) -> tuple[Any, Any]:
    return load(folder, "DDPMPipeline")


@pytest.fixture(scope="module")
def ddim(folder: Path) -> tuple[Any, Any]:
    return load(folder, "DDIMPipeline")


def assert_same_call(pipes: tuple[Any, Any], make: Callable[[], dict[str, Any]]) -> None:
    """Call both with the arguments that ``make`` makes anew, and compare the pictures."""
    ours, theirs = (pipe(output_type="pt", **make()).images for pipe in pipes)
    assert theirs.std() > 0.05  # not a flat picture
    assert relative_error(ours, theirs) <= BOUND


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_ddpm(ddpm: tuple[Any, Any], steps: int) -> None:
    assert_same_call(ddpm, lambda: {"num_inference_steps": steps, "generator": seeded(), "batch_size": 2})


@pytest.mark.parametrize("name", ["DDPMPipeline", "DDIMPipeline"])
def test_signature(name: str) -> None:
    ours, theirs = (
        inspect.signature(getattr(library, name).__call__).parameters.values() for library in (minidiff, diffusers)
    )
    assert [(p.name, p.default) for p in ours if p.kind is not p.KEYWORD_ONLY] == [(p.name, p.default) for p in theirs]


DDIM_CALLS = {
    "defaults": {},
    "eta": {"eta": 0.6},
    "DDPM's variance": {"eta": 1.0, "num_inference_steps": 10},
    "clipped": {"use_clipped_model_output": True},
    "clipped with eta": {"eta": 0.5, "use_clipped_model_output": True, "num_inference_steps": 20},
    "not clipped": {"use_clipped_model_output": False, "num_inference_steps": 7},
    "one step": {"num_inference_steps": 1},
}


@pytest.mark.parametrize("call", DDIM_CALLS)
def test_ddim(ddim: tuple[Any, Any], call: str) -> None:
    assert_same_call(ddim, lambda: {"generator": seeded(), "batch_size": 2} | DDIM_CALLS[call])


def test_positional_arguments(ddpm: tuple[Any, Any], ddim: tuple[Any, Any]) -> None:
    for pipes, arguments in ((ddpm, (2, 3, "np", False)), (ddim, (2, 0.5, 3, True, "np", False))):
        (ours,), (theirs,) = (pipe(arguments[0], seeded(), *arguments[1:]) for pipe in pipes)
        assert ours.shape == theirs.shape == (2, 8, 8, 3)
        np.testing.assert_allclose(ours, theirs, atol=2e-7, rtol=0)  # measured: 3e-8, the rounding to float32


@pytest.mark.parametrize("pipes", ["ddpm", "ddim"])
def test_generators(pipes: str, request: pytest.FixtureRequest) -> None:
    pair = request.getfixturevalue(pipes)
    stochastic = {"eta": 0.5} if pipes == "ddim" else {}
    make = {"num_inference_steps": 3, "batch_size": 3} | stochastic
    assert_same_call(pair, lambda: make | {"generator": [seeded(s) for s in (7, 8, 9)]})
    results = []
    for pipe in pair:  # no generator means torch's global one
        torch.manual_seed(11)
        results.append(pipe(output_type="pt", **make).images)
    assert relative_error(*results) <= BOUND


SCHEDULERS = {
    "fixed_large": {"variance_type": "fixed_large"},
    "v": {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"},
    "x0, not clipped": {"prediction_type": "sample", "clip_sample": False, "num_train_timesteps": 400},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_configuration_is_used(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, **SCHEDULERS[name])
    for pipeline in ("DDPMPipeline", "DDIMPipeline"):
        assert_same_call(load(tmp_path, pipeline), lambda: {"num_inference_steps": 5, "generator": seeded()})


UNETS = {
    "height and width": {"sample_size": [8, 4]},
    "grey": {"in_channels": 1, "out_channels": 1},
}


@pytest.mark.parametrize("name", UNETS)
def test_size_and_channels(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, UNETS[name])
    pipes = load(tmp_path, "DDPMPipeline")
    assert_same_call(pipes, lambda: {"num_inference_steps": 3, "generator": seeded()})
    ours, theirs = (pipe(num_inference_steps=3, generator=seeded()).images[0] for pipe in pipes)
    assert (ours.size, ours.mode) == (theirs.size, theirs.mode)


def test_learned_variance(tmp_path: Path) -> None:
    save_tiny(tmp_path, {"out_channels": 6}, variance_type="learned_range")
    assert_same_call(load(tmp_path, "DDPMPipeline"), lambda: {"num_inference_steps": 5, "generator": seeded()})


def test_pictures(ddpm: tuple[Any, Any]) -> None:
    ours, theirs = (pipe(2, seeded(), 5).images for pipe in ddpm)
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
        assert isinstance(a, Image.Image) and (a.size, a.mode) == (b.size, b.mode)
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1  # measured: 0


# --- Files ------------------------------------------------------------------------------------------------------------


def test_dispatch_and_files_both_ways(folder: Path, tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is DDPMPipeline and type(pipe.unet) is UNet2DModel
    assert list(pipe.components) == ["unet", "scheduler"]
    pipe.save_pretrained(tmp_path)
    index, original = (json.loads((where / "model_index.json").read_text()) for where in (tmp_path, folder))
    assert index == original
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "DDPMPipeline"
    theirs.set_progress_bar_config(disable=True)
    pipe.set_progress_bar_config(disable=True)
    ours, theirs = (p(num_inference_steps=3, generator=seeded(), output_type="pt").images for p in (pipe, theirs))
    assert relative_error(ours, theirs) <= 1e-5  # float32; measured: 2e-7


def test_ddim_converts_the_scheduler(folder: Path, tmp_path: Path) -> None:
    for library in (minidiff, diffusers):
        pipe = library.DDIMPipeline.from_pretrained(folder)
        assert type(pipe.scheduler).__name__ == "DDIMScheduler"
        pipe.save_pretrained(tmp_path / library.__name__)
    ours, theirs = (
        json.loads((tmp_path / library / "model_index.json").read_text()) for library in ("minidiff", "diffusers")
    )
    assert ours | {"_name_or_path": str(folder)} == theirs
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "diffusers")) is DDIMPipeline


def flat(folder: Path, target: Path) -> Path:
    """Lay the components beside the index, as in the oldest repositories on the Hub."""
    for path in folder.rglob("*"):
        if path.is_file():
            shutil.copy(path, target / path.name)
    return target


def test_flat_folder(folder: Path, tmp_path: Path) -> None:
    flat(folder, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "model_index.json",
        "config.json",
        "scheduler_config.json",
        "diffusion_pytorch_model.safetensors",
    }
    assert_same_call(load(tmp_path, "DDPMPipeline"), lambda: {"num_inference_steps": 3, "generator": seeded()})
    UNet2DModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(minidiff.errors.CheckpointNotFoundError, match="no folder 'unet'"):
        DDPMPipeline.from_pretrained(tmp_path)


def test_flat_repository_on_the_hub(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    names = {path.name for path in flat(folder, tmp_path / "repo").iterdir()}
    load = (
        "from minidiff import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained('some/ddpm')\n"
        "print(type(pipe.unet).__name__, type(pipe.scheduler).__name__)"
    )
    with HubServer({"some/ddpm": Repository({"main": tmp_path / "repo"})}) as hub:
        assert run_with(hub, tmp_path / "cache", load) == "UNet2DModel DDPMScheduler"
        assert sorted(Path(path).name for path in hub.downloaded()) == sorted(names)  # each once
        assert run_with(hub, tmp_path / "cache", load, HF_HUB_OFFLINE="1") == "UNet2DModel DDPMScheduler"
        assert hub.requests == []


# --- What only ours has -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours(ddpm: tuple[Any, Any]) -> DDPMPipeline:
    return ddpm[0]


def test_seeds(ours: DDPMPipeline) -> None:
    out = ours(3, num_inference_steps=4, seed=5, output_type="pt")
    assert out.seeds == [5, 6, 7]
    again = ours(2, num_inference_steps=4, seeds=[7, 0], output_type="pt")
    assert again.seeds == [7, 0]
    assert relative_error(again.images[:1], out.images[2:]) < 1e-12  # whatever batch it is in
    listed = ours(3, num_inference_steps=4, generator=[seeded(s) for s in (5, 6, 7)], output_type="pt")
    assert torch.equal(listed.images, out.images) and listed.seeds is None


def test_steps(ours: DDPMPipeline, ddim: tuple[Any, Any]) -> None:
    for pipe, options in ((ours, {}), (ddim[0], {"eta": 0.3, "use_clipped_model_output": True})):
        steps = list(pipe.steps(2, num_inference_steps=4, seed=1, **options))
        assert [step.index for step in steps] == [0, 1, 2, 3]
        assert [int(step.timestep) for step in steps] == [750, 500, 250, 0]
        images = pipe(2, num_inference_steps=4, seed=1, output_type="pt", **options).images
        assert torch.equal(pipe.decode(steps[-1].latents, "pt"), images)
        assert relative_error(steps[-1].denoised, steps[-1].latents) < 1e-12  # the last step arrives at x0
        assert steps[0].denoised.abs().max() <= 1  # clip_sample
        assert not any(step.latents.requires_grad for step in steps)


def test_any_scheduler(folder: Path) -> None:
    """The reference's loop knows DDPM and DDIM only; this one runs on the core that every scheduler has."""
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet")
    pictures = []
    for name in (
        "DDPMScheduler",
        "DDIMScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
        "EulerDiscreteScheduler",
    ):
        pipe = DDPMPipeline(unet, getattr(minidiff, name)())
        pipe.set_progress_bar_config(disable=True)
        pictures.append(pipe(num_inference_steps=4, seed=0, output_type="pt").images)
        assert pictures[-1].std() > 0.05


def test_a_scheduler_on_unscaled_samples(ddpm: tuple[Any, Any]) -> None:
    """Its noise is scaled up and the network's input down, which the reference's loop forgets: compared with a loop."""
    ours, theirs = (DDPMPipeline(ddpm[0].unet, minidiff.EulerDiscreteScheduler()), ddpm[1].unet)
    ours.set_progress_bar_config(disable=True)
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    x = torch.randn(1, 3, 8, 8, generator=seeded(), dtype=torch.float64) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(theirs(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
    *_, last = ours.steps(num_inference_steps=5, generator=seeded())
    assert relative_error(last.latents, x) <= 1e-6  # the reference's Euler computes in float32; measured: 5e-8


def test_threads_share_a_pipeline(ours: DDPMPipeline) -> None:
    alone = [ours(num_inference_steps=6, seed=s, output_type="pt").images for s in range(3)]
    together: dict[int, torch.Tensor] = {}

    def run(s: int) -> None:
        together[s] = ours(num_inference_steps=6, seed=s, output_type="pt").images

    threads = [Thread(target=run, args=(s,)) for s in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[s], alone[s]) for s in range(3))


def test_progress_bar(ours: DDPMPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    ours.set_progress_bar_config(mininterval=0)
    ours(num_inference_steps=4)
    ours.set_progress_bar_config(disable=True)
    assert "4/4" in capsys.readouterr().err


REFUSED = {
    "batch_size": ({"batch_size": 0}, "batch_size should be at least 1, found 0"),
    "memory": ({"batch_size": 10**9}, "batch_size should be at most 10,000, found 1,000,000,000"),
    "type": ({"batch_size": "2"}, "batch_size should be an integer, found '2'"),
    "steps": ({"num_inference_steps": 0}, "num_inference_steps should be a positive integer, found 0"),
    "many steps": ({"num_inference_steps": 1001}, "1001"),
    "output": ({"output_type": "latent"}, "output_type should be one of pil, np, pt, found 'latent'"),
    "generators": ({"batch_size": 3, "generator": [seeded(), seeded()]}, "list of 2 for 3 pictures"),
    "both": ({"seed": 1, "generator": seeded()}, "give one of generator=, seed= and seeds="),
    "seeds": ({"seeds": [1, 2]}, r"seeds should be a list of 1 integers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_call_that_is_refused(case: str, ours: DDPMPipeline) -> None:
    arguments, message = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=message):
        ours(**{"num_inference_steps": 2} | arguments)


def test_more_that_is_refused(folder: Path, ddim: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eta should be finite and in \[0, 1\], found 1.5"):
        ddim[0](eta=1.5)
    fields = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    fields |= {"norm_num_groups": 4, "layers_per_block": 1}
    with pytest.raises(ValueError, match=r"sample_size should be a number or \(height, width\) .* found None"):
        DDPMPipeline(UNet2DModel(**fields), minidiff.DDPMScheduler())(num_inference_steps=2)
    fourier = UNet2DModel(**fields, sample_size=8, time_embedding_type="fourier")
    with pytest.raises(ValueError, match="DDPMScheduler visits timestep 0, but this UNet takes the logarithm"):
        DDPMPipeline(fourier, minidiff.DDPMScheduler())(num_inference_steps=2)
    broken = DDPMPipeline(UNet2DModel(**fields, sample_size=8), minidiff.DDPMScheduler())
    broken.set_progress_bar_config(disable=True)
    torch.nn.init.constant_(broken.unet.conv_out.bias, float("nan"))
    with pytest.raises(ValueError, match=r"pictures \[0\] of 1 hold NaN"):
        broken(num_inference_steps=2)
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"vqvae": ["diffusers", "VQModel"]}))
    with pytest.raises(ConfigError, match="DDPMPipeline has no place for its vqvae"):
        DiffusionPipeline.from_pretrained(tmp_path)


class Backwards:
    """A scheduler that is no relative of anybody's."""

    def __init__(self, config: Any) -> None:
        self.config, self.init_noise_sigma = config, 1.0

    def set_timesteps(self, steps: int, device: Any = None) -> None:
        self.timesteps = torch.linspace(999, 0, steps, device=device).long()

    def step(self, out: torch.Tensor, t: Any, x: torch.Tensor, generator: Any = None, **options: Any) -> Any:
        return type("Out", (tuple,), {"prev_sample": property(lambda self: self[0])})((0.9 * x - 0.1 * out,))


@pytest.mark.parametrize("name", ["DDPMPipeline", "DDIMPipeline"])
@pytest.mark.parametrize("kind", ["patched", "duck"])
def test_a_scheduler_of_ones_own_takes_the_steps(folder: Path, name: str, kind: str) -> None:
    pipes = load(folder, name)
    more = {"eta": 0.5, "use_clipped_model_output": True} if name == "DDIMPipeline" else {}

    def call() -> dict[str, Any]:
        return {"num_inference_steps": 3, "generator": seeded(), **more}

    plain = pipes[0](output_type="pt", **call()).images
    for pipe in pipes:
        if kind == "duck":
            pipe.scheduler = Backwards(pipe.scheduler.config)
            continue
        original = pipe.scheduler.step

        @functools.wraps(original)
        def step(out: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            return original(0.5 * out, *args, **kwargs)

        pipe.scheduler.step = step
    assert_same_call(pipes, call)
    assert not torch.equal(pipes[0](output_type="pt", **call()).images, plain)
