"""Checkpoints go both ways: what the reference saves we load, what we save it loads, bit for bit."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import minidiff
from minidiff.checkpoints.remap import translate
from tests.hub_server import HubServer, Repository, run_with
from tests.theirs import diffusers, transformers

NETWORKS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}


def stem(name: str) -> str:
    return "model" if name == "text_encoder" else "diffusion_pytorch_model"


def ours(name: str) -> Any:
    return getattr(minidiff, NETWORKS[name])


def theirs(name: str) -> Any:
    return getattr(transformers if name == "text_encoder" else diffusers, NETWORKS[name])


def modern(network: nn.Module) -> dict[str, Tensor]:
    """Return our weights under the names, and in the layout, that we save."""
    return translate(nn.Module.state_dict(network), network.rows(), "ours", "hub")


def assert_same_weights(our: nn.Module, their: nn.Module) -> None:
    """Compare every tensor; transformers' prefix `text_model.` is the only difference of spelling allowed."""
    expected = {key.removeprefix("text_model."): tensor for key, tensor in their.state_dict().items()}
    found = {key.removeprefix("text_model."): tensor for key, tensor in modern(our).items()}
    assert found.keys() == expected.keys()
    different = [key for key in found if found[key].dtype != expected[key].dtype or not found[key].equal(expected[key])]
    assert different == []


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_theirs_loads_into_ours(folder: Path, name: str, dtype: torch.dtype | None) -> None:
    our = ours(name).from_pretrained(folder, subfolder=name, torch_dtype=dtype)
    their = theirs(name).from_pretrained(folder, subfolder=name).to(dtype)
    assert our.dtype == (dtype or torch.float32) and not our.training and our.device.type == "cpu"
    assert our.num_parameters() == their.num_parameters()
    assert_same_weights(our, their)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
def test_both_ways_with_variants_and_shards(
    folder: Path, tmp_path: Path, name: str, variant: str | None, max_shard_size: str
) -> None:
    their = theirs(name).from_pretrained(folder / name)
    their.save_pretrained(tmp_path / "theirs", variant=variant, max_shard_size=max_shard_size)
    our = ours(name).from_pretrained(tmp_path / "theirs", variant=variant)
    assert_same_weights(our, their)
    our.save_pretrained(tmp_path / "ours", variant=variant, max_shard_size=max_shard_size)
    dotted = f".{variant}" if variant else ""
    index = tmp_path / "ours" / f"{stem(name)}.safetensors.index{dotted}.json"
    assert index.exists() == (tmp_path / "theirs" / index.name).exists() == (max_shard_size == "20KB")
    again = theirs(name).from_pretrained(tmp_path / "ours", variant=variant)
    assert_same_weights(our, again)
    assert_same_weights(ours(name).from_pretrained(tmp_path / "ours", variant=variant), their)


@pytest.mark.parametrize("name", NETWORKS)
def test_saved_files_are_as_the_reference_writes_them(folder: Path, tmp_path: Path, name: str) -> None:
    ours(name).from_pretrained(folder / name).save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["config.json", f"{stem(name)}.safetensors"])
    with safe_open(tmp_path / f"{stem(name)}.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert (tmp_path / f"{stem(name)}.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode
    our, their = (json.loads((path / "config.json").read_text()) for path in (tmp_path, folder / name))
    if name != "text_encoder":
        assert our["_class_name"] == NETWORKS[name]
        assert our["_diffusers_version"] == diffusers.__version__
    assert [key for key in our.keys() & their.keys() if our[key] != their[key] and key != "_name_or_path"] == []


def test_variant_names_a_file_not_a_dtype(folder: Path, tmp_path: Path) -> None:
    their = theirs("unet").from_pretrained(folder / "unet").half()
    their.save_pretrained(tmp_path, variant="fp16")
    assert ours("unet").from_pretrained(tmp_path, variant="fp16").dtype == torch.float32  # as in diffusers
    assert theirs("unet").from_pretrained(tmp_path, variant="fp16").dtype == torch.float32
    half = ours("unet").from_pretrained(tmp_path, variant="fp16", dtype="float16")
    assert_same_weights(half, their)


def test_saving_again_in_fewer_files_leaves_no_stale_ones(folder: Path, tmp_path: Path) -> None:
    unet = ours("unet").from_pretrained(folder / "unet")
    unet.save_pretrained(tmp_path, max_shard_size="20KB")
    unet.save_pretrained(tmp_path, variant="ema", max_shard_size="20KB")
    with torch.no_grad():
        next(unet.parameters()).add_(1)
    unet.save_pretrained(tmp_path)
    plain = [p.name for p in tmp_path.iterdir() if "ema" not in p.name]
    assert sorted(plain) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert_same_weights(ours("unet").from_pretrained(tmp_path), theirs("unet").from_pretrained(tmp_path))
    assert not next(ours("unet").from_pretrained(tmp_path, variant="ema").parameters()).equal(next(unet.parameters()))


def test_weights_are_mapped_privately(folder: Path, tmp_path: Path) -> None:
    """Training a mapped weight leaves the file alone, and a network can be saved over its own file."""
    ours("vae").from_pretrained(folder / "vae").save_pretrained(tmp_path)
    before = (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()
    vae = ours("vae").from_pretrained(tmp_path)
    weight = next(vae.parameters())
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    with torch.no_grad():
        weight.add_(1)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes() == before
    vae.save_pretrained(tmp_path)
    assert next(ours("vae").from_pretrained(tmp_path).parameters()).equal(weight)


def test_tied_weights_are_saved_twice(folder: Path, tmp_path: Path) -> None:
    vae = ours("vae").from_pretrained(folder / "vae")
    vae.encoder.norm_out.weight = vae.encoder.norm_out.bias
    vae.save_pretrained(tmp_path)
    assert_same_weights(vae, theirs("vae").from_pretrained(tmp_path))


def test_config_overrides(folder: Path) -> None:
    assert ours("unet").from_pretrained(folder / "unet", sample_size=16).config.sample_size == 16


# --- pipelines -------------------------------------------------------------------------------------------------------


def test_pipeline_both_ways(folder: Path, tmp_path: Path) -> None:
    pipe = minidiff.DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is minidiff.StableDiffusionPipeline
    pipe.save_pretrained(tmp_path)
    their = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(their) is diffusers.StableDiffusionPipeline
    for name in NETWORKS:
        assert_same_weights(getattr(pipe, name), getattr(their, name))
    assert type(their.scheduler).__name__ == "PNDMScheduler"
    ids = [p.tokenizer(["a red heart"], padding="max_length", max_length=77).input_ids for p in (pipe, their)]
    assert list(ids[0][0]) == list(ids[1][0])
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index.pop("_diffusers_version") == diffusers.__version__
    assert index == {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": pipe.config.requires_safety_checker,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def test_pipeline_with_variant_and_dtype(folder: Path, tmp_path: Path) -> None:
    minidiff.StableDiffusionPipeline.from_pretrained(folder).to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert pipe.dtype == torch.float16
    their = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    for name in NETWORKS:
        assert_same_weights(getattr(pipe, name), getattr(their, name))


def test_components_given_are_not_loaded(folder: Path, tmp_path: Path) -> None:
    pipe = minidiff.DiffusionPipeline.from_pretrained(folder)
    (tmp_path / "model_index.json").write_text((folder / "model_index.json").read_text())  # and nothing else
    again = minidiff.DiffusionPipeline.from_pretrained(tmp_path, **pipe.components)
    assert all(again.components[name] is component for name, component in pipe.components.items())
    scheduler = minidiff.UniPCMultistepScheduler.from_pretrained(folder, subfolder="scheduler")
    pipe.scheduler = scheduler
    assert pipe.components["scheduler"] is scheduler
    assert pipe.config.scheduler == ("diffusers", "UniPCMultistepScheduler")


def test_to_moves_and_converts_every_network(folder: Path) -> None:
    pipe = minidiff.DiffusionPipeline.from_pretrained(folder)
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.float32)
    assert pipe.to(torch.bfloat16) is pipe
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype, pipe.dtype} == {torch.bfloat16}
    assert pipe.to("cpu", torch.float64).dtype == pipe.to(device="cpu").dtype == torch.float64
    assert pipe.to(dtype=torch.float16).to("cpu").to(None).dtype == torch.float16
    pipe.unet.to("meta")
    assert pipe.device.type == "meta"  # the accelerator, where one network is there
    for arguments in [(torch.float16, "cpu"), ("cpu", torch.float16, 1), ("cpu", "float16")]:
        with pytest.raises(ValueError, match=r"to\("):
            pipe.to(*arguments)
    with pytest.raises(ValueError, match="device both"):
        pipe.to("cpu", device="cpu")


def test_an_optional_component_of_another_make_is_left_out_and_said_once(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minidiff.pipelines.index._said", set())
    pipe = minidiff.DiffusionPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "FlaxStableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "ViTImageProcessor"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with caplog.at_level(logging.WARNING, logger="minidiff"):
        pipe = minidiff.DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None, feature_extractor=None)
        assert caplog.messages == []  # the caller knows
        pipe = minidiff.DiffusionPipeline.from_pretrained(tmp_path)
        assert pipe.safety_checker is None and pipe.feature_extractor is None
        assert len(caplog.messages) == 2
        assert "safety_checker (FlaxStableDiffusionSafetyChecker) of the checkpoint is not loaded" in "".join(
            caplog.messages
        )
        minidiff.DiffusionPipeline.from_pretrained(tmp_path)
        assert len(caplog.messages) == 2


def test_progress_bar(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pipe = minidiff.DiffusionPipeline.from_pretrained(folder)
    assert list(pipe.progress_bar(range(3))) == [0, 1, 2]
    assert "3/3" in capfd.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    assert list(pipe.progress_bar(range(3))) == [0, 1, 2]
    assert capfd.readouterr().err == ""
    with pytest.raises(ValueError, match="iterable or a total"):
        pipe.progress_bar()


def test_pipeline_from_the_hub_downloads_only_what_it_uses(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    pipe = minidiff.DiffusionPipeline.from_pretrained(folder)
    pipe.save_pretrained(repository)
    pipe.save_pretrained(repository, variant="fp16")
    for name in ("README.md", "v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.bin", "safety_checker/x.json"):
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("not used")
    code = """
import minidiff
pipe = minidiff.DiffusionPipeline.from_pretrained("some/repo", variant="fp16")
pipe.save_pretrained(OUT)
""".replace("OUT", repr(str(tmp_path / "saved")))
    with HubServer({"some/repo": Repository({"main": repository})}) as hub:
        assert run_with(hub, tmp_path / "cache", code) == ""
        downloaded = [path.split("/", 3)[3] for path in hub.downloaded()]
        assert run_with(hub, tmp_path / "cache", code, HF_HUB_OFFLINE="1") == ""
        assert hub.requests == []
    assert len(downloaded) == len(set(downloaded))
    text = {path for path in downloaded if path.startswith("tokenizer/")}
    assert set(downloaded) - text == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    }
    for name in NETWORKS:
        assert_same_weights(
            ours(name).from_pretrained(tmp_path / "saved" / name), theirs(name).from_pretrained(folder / name)
        )
