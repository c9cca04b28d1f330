"""Damaged and foreign single files: every error names the tensors, and a file is never taken for what it is not."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minidiff import StableDiffusionPipeline, UNet2DConditionModel
from minidiff.checkpoints.original.read import SingleFile
from minidiff.checkpoints.stream import Group, write_stream
from minidiff.checkpoints.tools.checkpoint import open_checkpoint
from minidiff.errors import CheckpointError
from tests.single_files import sparse_file, states_equal
from tests.tiny import save_tiny
from tests.vocabulary import load_script

headers = load_script("headers")
NETWORKS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "hub")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def tensors(folder: Path, pipe: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    pipe.save_single_file(folder.parent / "whole.safetensors")
    return load_file(folder.parent / "whole.safetensors")


def reshaped(tensor: torch.Tensor, how: int) -> torch.Tensor:
    if how == 0:
        return tensor[None].clone()
    if how == 1:
        return torch.cat([tensor, tensor])
    return tensor.flatten()[:-1].clone()


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_wrong_is_named_at_once(
    seed: int, tensors: dict[str, torch.Tensor], folder: Path, tmp_path: Path
) -> None:
    """Drop two tensors, rename two, reshape three, and swap two of unlike shapes."""
    rng = random.Random(seed)
    a, b, c, d, *shaped, e = rng.sample(sorted(tensors), 8)
    f = rng.choice([name for name in tensors if tensors[name].shape != tensors[e].shape and name not in (a, b, c, d)])
    shaped = [name for name in shaped if name != f]
    new = {c: f"{c}.x", d: d.replace(".", "._", 1)}
    damaged = {new.get(name, name): tensor for name, tensor in tensors.items() if name not in (a, b)}
    damaged |= {name: reshaped(tensors[name], rng.randrange(3)) for name in shaped}
    damaged |= {e: tensors[f].clone(), f: tensors[e].clone()}
    save_file(damaged, tmp_path / "damaged.safetensors")
    with pytest.raises(CheckpointError) as caught:
        StableDiffusionPipeline.from_single_file(tmp_path / "damaged.safetensors", config=folder)
    kind, lines = "", {kind: set() for kind in ("missing", "unexpected", "of a wrong shape")}
    for line in str(caught.value).splitlines()[1:]:
        if line.startswith("  "):
            lines[kind].add(line.split()[0])
        else:
            kind = line.split(" ", 1)[1].removesuffix(":")
    assert lines == {
        "missing": {a, b, c, d},
        "unexpected": set(new.values()),
        "of a wrong shape": {e, f, *shaped},
    }


def test_order_of_the_tensors_means_nothing(
    tensors: dict[str, torch.Tensor], folder: Path, pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    names = list(tensors)
    random.Random(0).shuffle(names)
    groups = [Group([(n, tensors[n].dtype, tuple(tensors[n].shape))], lambda n=n: [tensors[n]]) for n in names]
    write_stream(tmp_path / "shuffled.safetensors", groups, {})
    assert [tensor.name for tensor in SingleFile.of(tmp_path / "shuffled.safetensors").stored] == names
    loaded = StableDiffusionPipeline.from_single_file(tmp_path / "shuffled.safetensors", config=folder)
    assert all(states_equal(getattr(loaded, name), getattr(pipe, name)) for name in NETWORKS)


def test_same_tensor_in_two_spellings_and_wrong_dtypes(
    tensors: dict[str, torch.Tensor], folder: Path, tmp_path: Path
) -> None:
    name = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    integers = "first_stage_model.quant_conv.bias"
    more = {name.replace("text_model.", ""): tensors[name].clone(), integers: tensors[integers].long()}
    save_file(tensors | more, tmp_path / "twice.safetensors")
    with pytest.raises(CheckpointError) as caught:
        StableDiffusionPipeline.from_single_file(tmp_path / "twice.safetensors", config=folder)
    assert "1 stored twice:" in str(caught.value) and "final_layer_norm.bias in twice.safetensors and" in str(
        caught.value
    )
    assert f"1 of a wrong dtype:\n  {integers} in twice.safetensors is I64" in str(caught.value)


def test_a_damaged_file_is_still_recognised(tmp_path: Path) -> None:
    """Family and error do not hang on any one tensor: without its first and its telling ones it is the same family."""
    whole = headers.read_list(headers.HERE / "v1-5-pruned-emaonly.json")
    unet = "model.diffusion_model."
    gone = [f"{unet}input_blocks.0.0.weight", f"{unet}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"]
    gone.append("first_stage_model.encoder.mid.block_1.norm1.weight")
    damaged = {name: entry for name, entry in whole.items() if name not in gone} | {"stranger": ["F32", [3]]}
    path = sparse_file(tmp_path / "damaged.safetensors", damaged)
    checkpoint = open_checkpoint(path)
    assert checkpoint.title == "Stable Diffusion 1.x" and checkpoint.wrong.keys() == {"missing", "unexpected"}
    assert sorted(line.split()[0] for line in checkpoint.wrong["missing"]) == sorted(gone)
    assert checkpoint.wrong["unexpected"] == ["stranger (3,) in damaged.safetensors"]
    with pytest.raises(CheckpointError, match=r"does not fit the configuration of stable-diffusion-v1-5") as caught:
        checkpoint.check()
    assert all(name in str(caught.value) for name in gone)


KEY = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
FOREIGN = {
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight": ([4, 4], "is a LoRA: .*load_lora_weights"),
    "unet.down_blocks.0.attentions.0.to_q.lora_A.weight": ([4, 4], "is a LoRA"),
    "emb_params": ([2, 768], "is a textual inversion: .*load_textual_inversion"),
    "control_model.input_blocks.0.0.weight": ([320, 4, 3, 3], "is a ControlNet"),
    "edm_mean": ([1, 4, 1, 1], r"no checkpoint that minidiff knows: .*Known are Playground 2.5 .*config="),
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (
        [4, 4],
        "is Stable Diffusion 3, which minidiff does not",
    ),
    "single_transformer_blocks.0.attn.to_q.weight": ([4, 4], "is Flux, which minidiff does not"),
    "down_blocks.0.resnets.0.conv1.weight": ([4, 4, 3, 3], "is in the Hub's spelling .*from_pretrained.*config="),
    "a.weight": ([4, 4], "holds no network in the original spelling: 1 tensors such as a.weight"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_kinds_of_files_are_named(name: str, folder: Path, tmp_path: Path) -> None:
    shape, message = FOREIGN[name]
    path = sparse_file(tmp_path / "foreign.safetensors", {name: ["F32", shape]})
    for kind in (StableDiffusionPipeline, UNet2DConditionModel):
        with pytest.raises(CheckpointError, match=message):
            kind.from_single_file(path)
        if "config=" not in message and "no network" not in message:  # a configuration does not make it another
            with pytest.raises(CheckpointError, match=message):
                kind.from_single_file(path, config=folder)


@pytest.mark.parametrize(
    ("ctx", "channels", "what"),
    [(1024, 5, "SD 2 depth"), (1024, 8, "Stable Video Diffusion"), (640, 4, "nothing")],
)
def test_unknown_families_are_refused_with_what_was_found(ctx: int, channels: int, what: str, tmp_path: Path) -> None:
    tensors: dict[str, list[Any]] = {KEY: ["F32", [320, ctx]], FIRST: ["F32", [320, channels, 3, 3]]}
    path = sparse_file(tmp_path / "unknown.safetensors", tensors)
    with pytest.raises(CheckpointError, match=rf"text of width {ctx} .* and {channels} channels .* pass config="):
        StableDiffusionPipeline.from_single_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04rest", "is a ZIP archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!doctype html><html></html>", "is a web page"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "is not a complete safetensors file"),
    ],
)
def test_files_that_are_no_safetensors(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        StableDiffusionPipeline.from_single_file(tmp_path / "x.safetensors")


def test_a_file_cut_short(tensors: dict[str, torch.Tensor], folder: Path, tmp_path: Path) -> None:
    data = (folder.parent / "whole.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=r"short\.safetensors is not a complete safetensors file"):
        StableDiffusionPipeline.from_single_file(tmp_path / "short.safetensors", config=folder)
