"""What is wrong with a checkpoint is said, all of it, before any weight is read."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minidiff
from minidiff import AutoencoderKL
from minidiff.checkpoints import load
from minidiff.checkpoints.load import as_dtype
from minidiff.checkpoints.save import parse_size, save_json, split
from minidiff.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from tests.tiny import save_tiny
from tests.tiny_xl import save_base

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = {
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 2,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny autoencoder, saved."""
    AutoencoderKL(**CONFIG).save_pretrained(tmp_path)
    return tmp_path


def change(path: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def message(folder: Path, **arguments: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        AutoencoderKL.from_pretrained(folder, **arguments)
    return str(caught.value)


def test_more_shards_than_files_may_be_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, framework: str) -> None:
        raise RuntimeError(f"unable to open file <{path}> in read-only mode: Too many open files (24)")

    monkeypatch.setattr(load, "safe_open", refused)
    found = message(folder)
    assert f"{folder / WEIGHTS} could not be opened: " in found and "Too many open files" in found


# --- tensors ---------------------------------------------------------------------------------------------------------


def test_everything_wrong_is_one_error(folder: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors["encoder.conv_in.weight"], tensors["decoder.conv_out.bias"]
        tensors["surplus.one"] = torch.zeros(1)
        tensors["surplus.two"] = torch.zeros(2, 3)
        tensors["quant_conv.bias"] = torch.zeros(5)
        tensors["quant_conv.weight"] = torch.zeros(8, 8, 1, 1, dtype=torch.int8)

    change(folder / WEIGHTS, edit)
    found = message(folder)
    assert f"{WEIGHTS} in {folder} do not fit AutoencoderKL" in found
    assert "2 missing:\n  encoder.conv_in.weight (4, 3, 3, 3)\n  decoder.conv_out.bias (3,)" in found
    assert "2 unexpected:" in found
    assert f"  surplus.one (1,) in {WEIGHTS}" in found and f"  surplus.two (2, 3) in {WEIGHTS}" in found
    assert f"1 of a wrong shape:\n  quant_conv.bias is (5,) in {WEIGHTS}, expected (8,)" in found
    assert f"1 of a wrong dtype:\n  quant_conv.weight in {WEIGHTS} is I8, not F64, F32, F16, BF16" in found


def test_nothing_is_read_before_everything_is_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise AssertionError("weights were read")

    change(folder / WEIGHTS, lambda tensors: tensors.pop("quant_conv.bias"))
    monkeypatch.setattr("minidiff.checkpoints.load._read", fail)
    assert "1 missing:\n  quant_conv.bias" in message(folder)


def test_a_tensor_under_two_spellings(folder: Path) -> None:
    new, old = "decoder.mid_block.attentions.0.to_q.weight", "decoder.mid_block.attentions.0.query.weight"
    change(folder / WEIGHTS, lambda tensors: tensors.update({old: tensors[new].clone()}))
    assert "1 stored twice:" in message(folder)
    change(folder / WEIGHTS, lambda tensors: tensors.pop(new))
    AutoencoderKL.from_pretrained(folder)  # the older spelling alone is fine


def test_index_and_shards_disagree(folder: Path) -> None:
    vae = AutoencoderKL.from_pretrained(folder)
    vae.save_pretrained(folder, max_shard_size="4KB")
    path = folder / f"{WEIGHTS}.index.json"
    index = json.loads(path.read_text())
    name = "quant_conv.bias"
    shard = index["weight_map"].pop(name)
    index["weight_map"]["ghost.weight"] = shard
    save_json(index, path)
    found = message(folder)
    assert "2 where the index and the shards disagree:" in found
    assert f"  ghost.weight: {shard} in {path.name}, in no shard" in found
    assert f"  {name}: not listed in {path.name}, {shard}" in found


def test_missing_shard(folder: Path) -> None:
    AutoencoderKL.from_pretrained(folder).save_pretrained(folder, max_shard_size="4KB")
    shards = sorted(folder.glob("*-of-*.safetensors"))
    shards[1].unlink()
    assert f"lists {len(shards)} shards, and {folder} lacks {shards[1].name}" in message(folder)


# --- files -----------------------------------------------------------------------------------------------------------

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "it is empty"),
        (LFS, "it is a Git LFS pointer, not the file itself; run `git lfs pull`"),
        (b"<!DOCTYPE html><html>not found</html>", "it is a web page"),
        (b"PK\x03\x04" + bytes(26) + b"archive/data.pkl", "it is a pickle with another name"),
        (b"PK\x03\x04" + bytes(26) + b"model.safetensors", "it is a ZIP archive: unpack it"),
        (b"GGUF\x03\x00\x00\x00" + bytes(100), "it is a GGUF file: UNet2DConditionModel.from_single_file reads"),
        (
            b'{"error":"Repository not found"}',
            "it is a server's answer instead of the file: '{\"error\":",
        ),
        (b"Entry not found", "it is a server's answer instead of the file: 'Entry not found'"),
        (b"\x80\x02}q\x00." + bytes(100), "it is a pickle with another name"),
        (b"\x00\x01", "if it was cut short, download"),
        ((99).to_bytes(8, "little") + b"{" + bytes(200), "if it was cut short, download"),
        ((2**40).to_bytes(8, "little") + b"{}", "if it was cut short, download"),
    ],
    ids=[
        "empty",
        "lfs",
        "html",
        "torch",
        "zip",
        "gguf",
        "error",
        "not found",
        "pickle",
        "two bytes",
        "not json",
        "endless header",
    ],
)
def test_not_a_safetensors_file(folder: Path, content: bytes, expected: str) -> None:
    (folder / WEIGHTS).write_bytes(content)
    found = message(folder)
    assert f"{folder / WEIGHTS} is not a complete safetensors file: " in found and expected in found


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_truncated_file(folder: Path, keep: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])
    found = message(folder)
    assert f"{folder / WEIGHTS} is not a complete safetensors file: " in found and "cut short" in found


@pytest.mark.parametrize(("content", "expected"), [(LFS, "LFS pointer"), (b'{"error": "x"}', "server's answer")])
def test_a_configuration_that_is_none(folder: Path, content: bytes, expected: str) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"config.json is no configuration.*it is a .*{expected}"):
        AutoencoderKL.from_pretrained(folder)


def test_no_false_advice_about_variants(folder: Path) -> None:
    """A link of the cache whose file is gone, and shards without their index, are no weights of no variant."""
    AutoencoderKL.from_pretrained(folder).save_pretrained(folder, max_shard_size="4KB", variant="fp16")
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / "blobs" / "gone")
    found = message(folder)
    assert "safetensors is a link to" in found and "gone, which is not there: download it again" in found
    (folder / WEIGHTS).unlink()
    next(folder.glob("*.index.fp16.json")).unlink()
    for variant in ("fp16", None):
        found = message(folder, variant=variant)
        shards = [f"diffusion_pytorch_model.fp16-0000{k}-of-" for k in (1, 2)]
        if variant:
            assert f"has shards {shards[0]}" in found and shards[1] in found and "but no index" in found
        assert ("ask for that" in found) == (variant is None)


def test_config_problems(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    deep, long = f'{{"a": {"[" * 100_000}{"]" * 100_000}}}', f'{{"a": {"1" * 10_000}}}'
    for text in (b"{", b'{"a": "\xff"}', deep.encode(), long.encode()):
        (folder / "config.json").write_bytes(text)
        with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
            AutoencoderKL.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DConditionModel"}))
    with pytest.raises(ConfigError, match="describes a UNet2DConditionModel, not a AutoencoderKL; is subfolder= right"):
        AutoencoderKL.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointNotFoundError, match=rf"has no config\.json; it holds {WEIGHTS}"):
        AutoencoderKL.from_pretrained(folder)
    with pytest.raises(OSError, match="has no config"):  # what code written for diffusers catches
        AutoencoderKL.from_pretrained(folder)


# --- arguments -------------------------------------------------------------------------------------------------------


def test_dtype_arguments() -> None:
    assert as_dtype(None) == torch.float32
    assert as_dtype("float16") == as_dtype("torch.float16") == as_dtype(None, torch.float16) == torch.float16
    assert as_dtype("bfloat16", torch.bfloat16) == torch.bfloat16
    with pytest.raises(ValueError, match="two names of one argument"):
        as_dtype(torch.float16, torch.bfloat16)
    for wrong in ("auto", "fp16", torch.int8, 16, {"unet": torch.float16}):
        with pytest.raises(ValueError, match=re.escape(f"torch_dtype={wrong!r} is not one of float64, float32")):
            as_dtype(wrong)


@pytest.mark.parametrize("kind", ["network", "pipeline"])
def test_pickles_are_never_read_or_written(folder: Path, kind: str) -> None:
    loader = AutoencoderKL if kind == "network" else minidiff.DiffusionPipeline
    with pytest.raises(CheckpointError, match=r"use_safetensors=False asks for pickled weights: .* runs whatever code"):
        loader.from_pretrained(folder, use_safetensors=False)
    with pytest.raises(CheckpointError, match="minidiff writes only safetensors"):
        AutoencoderKL(**CONFIG).save_pretrained(folder / "new", safe_serialization=False)
    assert not (folder / "new").exists()
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    assert "has only diffusion_pytorch_model.bin" in message(folder)


def test_loading_options_of_the_reference(folder: Path) -> None:
    AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False, device_map=None, ignore_mismatched_sizes=False)
    with pytest.raises(TypeError, match="device_map=.* is not implemented; a network lies on one device"):
        AutoencoderKL.from_pretrained(folder, device_map={"encoder": 0, "decoder": 1})
    with pytest.raises(TypeError, match="ignore_mismatched_sizes=True is not implemented"):
        AutoencoderKL.from_pretrained(folder, ignore_mismatched_sizes=True)
    with pytest.raises(ConfigError, match="surprise"):
        AutoencoderKL.from_pretrained(folder, surprise=1)


def test_missing_variant(folder: Path) -> None:
    assert "(variant='fp16'); it has no variant: ask for that" in message(folder, variant="fp16")


def test_save_arguments(tmp_path: Path) -> None:
    assert [parse_size(s) for s in (5, "5KB", "1.5 MB", "10gb")] == [5, 5000, 1_500_000, 10 * 10**9]
    for wrong in ("", "5", "5GiB", "-1GB", 0, -1, "0KB"):
        with pytest.raises(ValueError, match="max_shard_size"):
            parse_size(wrong)
    tensors = {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(9), "d": torch.zeros(1)}
    assert split(tensors, 16) == [["a", "b"], ["c"], ["d"]]
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file; save_pretrained needs a folder"):
        AutoencoderKL(**CONFIG).save_pretrained(tmp_path / "file")


# --- pipelines -------------------------------------------------------------------------------------------------------

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"_class_name": "FluxPipeline"}, "asks for FluxPipeline, which minidiff does not implement; it has"),
        ({"_class_name": None}, "model_index.json has no _class_name: call from_pretrained on the class"),
        ({"_class_name": ...}, "model_index.json has no _class_name: call from_pretrained on the class"),
        ({"_class_name": "AutoencoderKL"}, "asks for AutoencoderKL, which minidiff does not implement"),
        (
            {"unet": ["diffusers", "UNet3DConditionModel"]},
            "unet is diffusers.UNet3DConditionModel, which minidiff does",
        ),
        (
            {"unet": ["my_code", "UNet2DConditionModel"]},
            "unet is my_code.UNet2DConditionModel, which minidiff does not",
        ),
        ({"unet": "UNet2DConditionModel"}, r"unet should be \[library, class\], found 'UNet2DConditionModel'"),
        ({"prior": ["diffusers", "Prior"]}, "StableDiffusionPipeline has no place for its prior"),
        ({"vae": ...}, "names no vae, which StableDiffusionPipeline needs; pass vae="),
    ],
)
def test_model_index_problems(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    index = {name: value for name, value in {**INDEX, **changes}.items() if value is not ...}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=expected):
        minidiff.DiffusionPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("save", "kind"), [(save_tiny, "StableDiffusionPipeline"), (save_base, "StableDiffusionXLPipeline")]
)
def test_pipelines_that_only_encode_texts(tmp_path: Path, save: Any, kind: str) -> None:
    """As in the reference, any component may be left out; what needs it says so."""
    whole = getattr(minidiff, kind).from_pretrained(save(tmp_path))
    arguments = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    expected = whole.encode_prompt("a", **arguments)[0]
    pipe = getattr(minidiff, kind).from_pretrained(tmp_path, unet=None, vae=None, scheduler=None)
    assert torch.equal(pipe.encode_prompt("a", **arguments)[0], expected)
    with pytest.raises(ValueError, match="this pipeline has no unet and no scheduler: pass them when it is made"):
        pipe("a")
    pipe.save_pretrained(tmp_path / "texts")  # whose index says [null, null]
    again = minidiff.DiffusionPipeline.from_pretrained(tmp_path / "texts")
    assert again.unet is again.scheduler is None
    with pytest.raises(ValueError, match="this pipeline has no unet and no scheduler"):
        next(again.steps("a"))
    with pytest.raises(CheckpointError, match="has no unet, so there is no single file of it"):
        again.save_single_file(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="this pipeline has no scheduler: pass it when it is made"):
        getattr(minidiff, kind)(**{**whole.components, "scheduler": None})("a")


def test_pipeline_arguments(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"has no model_index\.json"):
        minidiff.DiffusionPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps(INDEX))
    with pytest.raises(TypeError, match="unknown arguments surprise; .* components vae, text_encoder"):
        minidiff.StableDiffusionPipeline.from_pretrained(tmp_path, surprise=1)
    with pytest.raises(ValueError, match="device_map='everywhere' is not a device"):
        minidiff.StableDiffusionPipeline.from_pretrained(tmp_path, device_map="everywhere")
    with pytest.raises(CheckpointNotFoundError, match="has no folder"):
        minidiff.StableDiffusionPipeline.from_pretrained(tmp_path)


def test_a_foreign_component_cannot_be_saved(tmp_path: Path) -> None:
    pipe = minidiff.DiffusionPipeline()
    pipe.register_modules(vae=torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="vae is a Linear, which is not one of minidiff's classes"):
        pipe.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
