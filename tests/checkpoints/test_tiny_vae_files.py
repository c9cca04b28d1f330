"""Files of the tiny autoencoder in every published spelling: the Hub's, TAESD's two halves, ComfyUI's whole file.

The names of the originals are those of taesd.py (GitHub, madebyollin/taesd), a list of layers for each half, and of
comfy/taesd/taesd.py (GitHub, comfyanonymous/ComfyUI). Both are published as pickles too, which are refused.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minidiff import AutoencoderKL, AutoencoderTiny, AutoModel, DiffusionPipeline
from minidiff.checkpoints.original.configs import PackagedConfigs
from minidiff.checkpoints.tools.checkpoint import open_checkpoint
from minidiff.checkpoints.tools.convert import convert
from minidiff.checkpoints.tools.inspect import keys, report
from minidiff.cli.main import main
from minidiff.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from tests.networks.test_vae_tiny import PUBLISHED, small
from tests.single_files import sparse_file, states_equal
from tests.theirs import diffusers, randomize
from tests.tiny import save_tiny

Tensors = dict[str, Tensor]
FIELDS = small(encoder=4, decoder=4)


def original(tensors: Tensors) -> Tensors:
    """Rename a Hub's tensors as taesd.py has them, whose decoder begins with a layer without weights, its clamp."""

    def rename(name: str) -> str:
        half, _, i, rest = name.split(".", 3)
        return f"{half}.{int(i) + (half == 'decoder')}.{rest}"

    return {rename(name): tensor for name, tensor in tensors.items()}


def halves(tensors: Tensors) -> dict[str, Tensors]:
    named = original(tensors)
    return {
        half: {n.removeprefix(f"{half}."): t for n, t in named.items() if n.startswith(half)}
        for half in ("encoder", "decoder")
    }


def as_halves(tensors: Tensors, folder: Path) -> Path:
    for half, part in halves(tensors).items():
        save_file(part, folder / f"taesd_{half}.safetensors")
    return folder / "taesd_decoder.safetensors"


def as_file(change: Callable[[Tensors], Tensors]) -> Callable[[Tensors, Path], Path]:
    def write(tensors: Tensors, folder: Path) -> Path:
        save_file(change(tensors), folder / "taesd_combined.safetensors")
        return folder / "taesd_combined.safetensors"

    return write


def comfy(tensors: Tensors) -> Tensors:
    return {f"taesd_{name}": t for name, t in original(tensors).items()} | {"vae_scale": torch.tensor(0.18215)}


SPELLINGS: dict[str, Callable[[Tensors, Path], Path]] = {
    "two halves": as_halves,
    "both halves": as_file(original),
    "ComfyUI": as_file(comfy),
    "ComfyUI, in a checkpoint": as_file(
        lambda t: {f"first_stage_model.{n}": v for n, v in comfy(t).items() if "." in n}
    ),
    "a tool's": as_file(lambda t: {f"vae.{n}": v for n, v in original(t).items()}),
    "Hub, without its folder": as_file(dict),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow network that the reference has written in Hub layout."""
    path = tmp_path_factory.mktemp("taesd")
    randomize(diffusers.AutoencoderTiny(**FIELDS)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def hub(folder: Path) -> Tensors:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_hub_layout_in_both_directions(folder: Path, hub: Tensors, tmp_path: Path) -> None:
    ours = AutoencoderTiny.from_pretrained(folder)
    assert isinstance(AutoModel.from_pretrained(folder), AutoencoderTiny)
    assert ours.config.block_out_channels == [4] * 4
    assert {n: t.tolist() for n, t in ours.state_dict().items()} == {n: t.tolist() for n, t in hub.items()}
    ours.save_pretrained(tmp_path)
    theirs, info = diffusers.AutoencoderTiny.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert states_equal(ours, theirs)
    kept = {name: value for name, value in ours.config.items() if name[0] != "_"}
    assert {name: theirs.config[name] for name in kept} == kept


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_single_file(spelling: str, folder: Path, hub: Tensors, tmp_path: Path) -> None:
    path = SPELLINGS[spelling](hub, tmp_path)
    ours = AutoencoderTiny.from_single_file(path, **FIELDS)
    assert states_equal(ours, AutoencoderTiny.from_pretrained(folder))
    half = AutoencoderTiny.from_single_file(path, config=folder, torch_dtype="float16")
    assert all(torch.equal(tensor, hub[name].half()) for name, tensor in half.state_dict().items())


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_conversions_are_bit_exact_both_ways(spelling: str, folder: Path, hub: Tensors, tmp_path: Path) -> None:
    path = SPELLINGS[spelling](hub, tmp_path)
    convert(path, tmp_path / "hub", config=folder)
    back = load_file(tmp_path / "hub" / "diffusion_pytorch_model.safetensors")
    assert {n: t.tolist() for n, t in back.items()} == {n: t.tolist() for n, t in hub.items()}
    convert(tmp_path / "hub", tmp_path / "whole.safetensors")
    whole = load_file(tmp_path / "whole.safetensors")
    expected = {f"taesd_{name}": tensor for name, tensor in original(hub).items()}  # what ComfyUI reads
    assert {n: t.tolist() for n, t in whole.items()} == {n: t.tolist() for n, t in expected.items()}
    assert states_equal(
        AutoencoderTiny.from_single_file(tmp_path / "whole.safetensors"),  # its header says the configuration
        AutoencoderTiny.from_pretrained(folder),
    )


def test_published_size_in_every_spelling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The published networks by name and shape; without a configuration they are recognised and described."""
    with torch.device("meta"):
        theirs = diffusers.AutoencoderTiny.from_config(PUBLISHED)
    named: dict[str, Any] = {name: ["F32", list(tensor.shape)] for name, tensor in theirs.state_dict().items()}
    for half, part in halves(named).items():
        sparse_file(tmp_path / f"taesdxl_{half}.safetensors", part)
    scale = {"vae_scale": ["F32", []]}
    paths = [
        tmp_path / "taesdxl_encoder.safetensors",
        tmp_path / "taesdxl_decoder.safetensors",
        sparse_file(tmp_path / "a.safetensors", {f"taesd_{n}": t for n, t in original(named).items()} | scale),
        sparse_file(tmp_path / "b.safetensors", named),
    ]
    for path in paths:
        checkpoint = open_checkpoint(path)
        assert checkpoint.check().title == "tiny autoencoder of Stable Diffusion (TAESD)"
        assert len(checkpoint.parts[0].found) == len(named) == 134
        assert "AutoencoderTiny" in report(checkpoint) and "2,445,063" in report(checkpoint)
        assert "encoder.layers.1.conv.0.weight" in keys(checkpoint)
        assert [reason.split(";")[0] for _, reason in checkpoint.dropped] == ["the factor of ComfyUI's latents"] * (
            path.name == "a.safetensors"
        )
        assert main(["inspect", str(path)]) == 0
        assert "tiny autoencoder" in capsys.readouterr().out
    fields = {n: v for n, v in PackagedConfigs("taesd").read("vae/config.json").items() if n[0] != "_"}
    assert fields.items() <= PUBLISHED.items()
    assert AutoencoderTiny(**fields).config == AutoencoderTiny().config


def test_in_the_single_file_of_a_pipeline(folder: Path, tmp_path: Path) -> None:
    """Saved with a pipeline it stands where an autoencoder does, under ComfyUI's names; the header says what it is."""
    pipe = DiffusionPipeline.from_pretrained(save_tiny(tmp_path / "sd"))
    pipe.vae = AutoencoderTiny.from_pretrained(folder)
    pipe.save_single_file(tmp_path / "whole.safetensors")
    assert "first_stage_model.taesd_decoder.1.weight" in load_file(tmp_path / "whole.safetensors")
    pipe.save_pretrained(tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "converted.safetensors")
    for name in ("whole", "converted"):
        path = tmp_path / f"{name}.safetensors"
        assert "AutoencoderTiny" in report(open_checkpoint(path).check())
        for back in (DiffusionPipeline.from_single_file(path).vae, AutoencoderTiny.from_single_file(path)):
            assert type(back) is AutoencoderTiny and states_equal(back, pipe.vae)


def test_a_half_alone(hub: Tensors, tmp_path: Path) -> None:
    path = as_halves(hub, tmp_path)
    (tmp_path / "taesd_encoder.safetensors").unlink()
    words = r"taesd_decoder.safetensors is the decoder of a tiny autoencoder; expected the encoder beside it"
    with pytest.raises(CheckpointNotFoundError, match=words):
        AutoencoderTiny.from_single_file(path)
    path.rename(tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointNotFoundError, match="is the decoder of a tiny autoencoder"):
        AutoencoderTiny.from_single_file(tmp_path / "weights.safetensors")


def test_what_does_not_fit_is_named(folder: Path, hub: Tensors, tmp_path: Path) -> None:
    path = as_file(comfy)({n: t for n, t in hub.items() if n != "encoder.layers.0.bias"}, tmp_path)
    with pytest.raises(CheckpointError, match=r"1 missing:\n  taesd_encoder.0.bias \(4,\)"):
        AutoencoderTiny.from_single_file(path, config=folder)
    with pytest.raises(
        CheckpointError, match="taesd_combined.safetensors holds a AutoencoderTiny, not a AutoencoderKL"
    ):
        AutoencoderKL.from_single_file(path)
    kl = AutoencoderKL(norm_num_groups=8, block_out_channels=[8])
    kl.save_pretrained(tmp_path / "kl")
    with pytest.raises(ConfigError, match="describes a AutoencoderKL, not a AutoencoderTiny"):
        AutoencoderTiny.from_pretrained(tmp_path / "kl")
    convert(tmp_path / "kl", tmp_path / "kl.safetensors")
    with pytest.raises(CheckpointError, match="holds a AutoencoderKL, not a AutoencoderTiny"):
        AutoencoderTiny.from_single_file(tmp_path / "kl.safetensors")
    with pytest.raises(CheckpointError, match="is a pickle"):
        AutoencoderTiny.from_single_file(tmp_path / "taesd_encoder.pth")


def test_weights_of_any_spelling_are_taken_by_load_state_dict(folder: Path, hub: Tensors) -> None:
    ours, fresh = AutoencoderTiny.from_pretrained(folder), AutoencoderTiny(**FIELDS)
    for tensors in (hub, {n: t for n, t in comfy(hub).items() if "." in n}):
        fresh = AutoencoderTiny(**FIELDS)
        fresh.load_state_dict(tensors)
        assert states_equal(fresh, ours)


@pytest.mark.parametrize(
    "names",
    [
        ["0.weight", "head.bias"],  # not numbers alone
        ["encoder.layers.0.self_attn.q_proj.weight", "encoder.layers.0.mlp.fc1.bias"],  # CLIP's, by transformers 5
        ["text_model.encoder.layers.0.self_attn.q_proj.weight"],
    ],
)
def test_no_name_of_another_file_is_taken_for_its(names: list[str], tmp_path: Path) -> None:
    save_file({name: torch.ones(1) for name in names}, tmp_path / "encoder.safetensors")
    with pytest.raises(CheckpointError, match=re.escape("holds no network in the original spelling")):
        AutoencoderTiny.from_single_file(tmp_path / "encoder.safetensors")
