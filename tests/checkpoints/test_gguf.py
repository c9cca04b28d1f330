"""GGUF files: blocks as ggml's own package unpacks them, files as it and ComfyUI-GGUF write them, and damaged ones."""

import re
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import minidiff
from minidiff.checkpoints.gguf import read_gguf
from minidiff.checkpoints.gguf_blocks import BLOCKS
from minidiff.checkpoints.load import read_tensor
from minidiff.checkpoints.original.prefixes import UNET
from minidiff.checkpoints.remap import translate
from minidiff.checkpoints.tools.checkpoint import open_checkpoint
from minidiff.checkpoints.tools.convert import convert
from minidiff.checkpoints.tools.inspect import report
from minidiff.cli.main import main
from minidiff.errors import CheckpointError
from tests.theirs import randomize
from tests.tiny import UNET as TINY
from tests.vocabulary import load_script

headers = load_script("headers")
KINDS = gguf.GGMLQuantizationType
WIDE = TINY | {"block_out_channels": [32, 64], "cross_attention_dim": 64, "attention_head_dim": 8}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_unpacked_as_ggml_does(name: str, tmp_path: Path) -> None:
    """Random bytes, bit for bit: 20,000 blocks are more than are read at a time."""
    block, kind = BLOCKS[name], KINDS[name]
    assert (block.number, (block.values, block.size)) == (kind.value, gguf.GGML_QUANT_SIZES[kind])
    raw = np.random.default_rng(0).integers(0, 256, (20_000, block.size), dtype=np.uint8)
    with np.errstate(all="ignore"):  # some scales are infinite or no numbers
        expected = gguf.quants.dequantize(raw, kind)
    np.testing.assert_array_equal(block.unpack(torch.from_numpy(raw)).reshape(expected.shape).numpy(), expected)
    write(tmp_path / "x.gguf", {"w": (raw, kind)})
    ((stored,), _) = read_gguf(tmp_path / "x.gguf")
    assert stored.shape == expected.shape
    np.testing.assert_array_equal(read_tensor(stored, torch.float32).numpy(), expected)


def write(path: Path, tensors: dict[str, tuple[np.ndarray, Any]], **metadata: Any) -> Path:
    """Write a file with ggml's package."""
    writer = gguf.GGUFWriter(path, "sd1")
    for key, value in metadata.items():
        writer.add_array(key, value) if isinstance(value, list) else writer.add_string(key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def packed(tensor: Tensor, kind: Any) -> tuple[np.ndarray, Any]:
    """Quantise as the tools do: matrices, and the rest in float32 or float16."""
    data = tensor.detach().numpy()
    if kind == KINDS.F16:
        return data.astype(np.float16), kind
    if kind == KINDS.F32 or data.ndim != 2 or data.shape[-1] % 32:
        return data, KINDS.F32
    return gguf.quants.quantize(data, kind), kind


@pytest.fixture(scope="module")
def unet() -> minidiff.UNet2DConditionModel:
    return randomize(minidiff.UNet2DConditionModel(**WIDE))


def spelled(unet: nn.Module, spelling: Any, prefix: str = "") -> dict[str, Tensor]:
    found = translate(nn.Module.state_dict(unet), unet.rows(), "ours", spelling)
    return {prefix + name: tensor for name, tensor in found.items()}


def values(name: str, data: tuple[np.ndarray, Any]) -> Tensor:
    array, kind = data
    return torch.from_numpy(gguf.quants.dequantize(array, kind).copy())


@pytest.fixture
def config(unet: minidiff.UNet2DConditionModel, tmp_path: Path) -> Path:
    unet.save_config(tmp_path / "config")
    return tmp_path / "config"


FILES = [(KINDS.Q8_0, UNET, "ldm"), (KINDS.Q4_0, "", "ldm"), (KINDS.Q5_1, "", "hub"), (KINDS.BF16, UNET, "ldm")]
FILES += [(KINDS.F16, "", "ldm"), (KINDS.F32, UNET, "ldm")]


@pytest.mark.parametrize(("kind", "prefix", "spelling"), FILES, ids=str)
def test_a_unet_in_every_spelling(
    unet: minidiff.UNet2DConditionModel, config: Path, tmp_path: Path, kind: Any, prefix: str, spelling: Any
) -> None:
    """stable-diffusion.cpp writes the prefix, ComfyUI-GGUF none, diffusers' converter the Hub's spelling."""
    tensors = {name: packed(tensor, kind) for name, tensor in spelled(unet, spelling, prefix).items()}
    assert kind in {k for _, k in tensors.values()}
    path = write(tmp_path / "unet.gguf", tensors)
    for dtype in (torch.float32, torch.bfloat16):
        found = minidiff.UNet2DConditionModel.from_single_file(path, config=config, torch_dtype=dtype)
        assert found.dtype == dtype and not found.training
        mine = spelled(found, spelling, prefix)
        for name, data in tensors.items():
            assert torch.equal(mine[name], values(name, data).reshape(mine[name].shape).to(dtype)), name


def test_the_reference_s_way_to_ask(unet: minidiff.UNet2DConditionModel, config: Path, tmp_path: Path) -> None:
    """``GGUFQuantizationConfig`` asks for what is done anyway, if its dtype is that of the call."""
    path = write(tmp_path / "unet.gguf", {n: packed(t, KINDS.Q8_0) for n, t in spelled(unet, "ldm").items()})
    load, asked = minidiff.UNet2DConditionModel.from_single_file, minidiff.GGUFQuantizationConfig
    plain = load(path, config=config, torch_dtype=torch.bfloat16)
    found = load(path, config=config, torch_dtype=torch.bfloat16, quantization_config=asked(torch.bfloat16))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), found.parameters(), strict=True))
    assert load(path, config=config, quantization_config=asked()).dtype == torch.float32
    with pytest.raises(TypeError, match="pass torch_dtype=torch.bfloat16"):
        load(path, config=config, quantization_config=asked(torch.bfloat16))
    with pytest.raises(TypeError, match="is for .gguf files"):
        load(tmp_path / "unet.safetensors", quantization_config=asked())


def test_shapes_that_ggml_does_not_keep(unet: minidiff.UNet2DConditionModel, config: Path, tmp_path: Path) -> None:
    """ComfyUI-GGUF says the shape of kernels that it lays out in rows; stable-diffusion.cpp adds axes of length 1."""
    names = spelled(unet, "ldm")
    tensors, shapes = {name: packed(tensor, KINDS.F32) for name, tensor in names.items()}, {}
    kernel = "input_blocks.1.0.in_layers.2.weight"
    assert tuple(names[kernel].shape) == (32, 32, 3, 3)
    tensors[kernel] = (gguf.quants.quantize(names[kernel].numpy().reshape(-1, 32), KINDS.Q8_0), KINDS.Q8_0)
    shapes[f"comfy.gguf.orig_shape.{kernel}"] = [32, 32, 3, 3]
    matrix, conv = "time_embed.0.weight", "input_blocks.1.1.proj_in.weight"
    tensors[matrix] = (names[matrix].numpy()[..., None, None], KINDS.F32)
    tensors[conv] = (names[conv].numpy()[..., 0, 0], KINDS.F32)
    path = write(tmp_path / "unet.gguf", tensors, **shapes)
    found = spelled(minidiff.UNet2DConditionModel.from_single_file(path, config=config), "ldm")
    for name, tensor in names.items():
        expected = values(name, tensors[name]).reshape(tensor.shape) if name == kernel else tensor
        assert torch.equal(found[name], expected), name


def test_inspected_and_converted(
    unet: minidiff.UNet2DConditionModel, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "x.gguf", {n: packed(t, KINDS.Q8_0) for n, t in spelled(unet, "ldm").items()})
    text = report(open_checkpoint(path, config=config, ask=False))
    assert re.search(r"UNet2DConditionModel +\d+ +[\d,]+ +[\d.]+ \w+ +float32 \(\d+\), Q8_0 \(\d+\)", text)
    convert(path, tmp_path / "hub", config=config)
    again = minidiff.UNet2DConditionModel.from_pretrained(tmp_path / "hub")
    first = minidiff.UNet2DConditionModel.from_single_file(path, config=config)
    assert all(torch.equal(t, first.state_dict()[name]) for name, t in again.state_dict().items())
    write(path, {"double_blocks.0.img_attn.qkv.weight": (np.ones((2, 2), "f"), KINDS.F32)})
    assert main(["inspect", str(path)]) == 0
    assert "kind        Flux, which minidiff does not implement" in capsys.readouterr().out


def test_a_family_is_recognised_by_its_names(tmp_path: Path) -> None:
    """Nothing but what is missing is wrong with a file of SDXL that has two tensors."""
    key = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    path = write(tmp_path / "xl.gguf", {key: (np.ones((640, 2048), "e"), KINDS.F16)})
    with pytest.raises(CheckpointError, match=r"does not fit .* the configuration of stable-diffusion-xl-base-1.0"):
        minidiff.UNet2DConditionModel.from_single_file(path)
    with pytest.raises(TypeError, match="quantization_config=.*GGUF files are unpacked in torch_dtype"):
        minidiff.UNet2DConditionModel.from_single_file(path, quantization_config=object())


def header(*parts: bytes, version: int = 3, tensors: int = 1, entries: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + b"".join(parts)


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def tensor(*axes: int, kind: int = 0, place: int = 0) -> bytes:
    return string("w") + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, place)


@pytest.mark.parametrize(
    ("file", "prefix", "family"),
    [("v1-5-pruned-emaonly", UNET, "Stable Diffusion 1.x"), ("sd_xl_base_1.0", "", "Stable Diffusion XL")],
)
def test_published_unets_at_full_size(file: str, prefix: str, family: str, tmp_path: Path) -> None:
    """Names and shapes of the published files, rows of whole blocks as Q4_K; the data is a hole."""
    described, place = [], 0
    for name, (_, shape) in headers.read_list(headers.HERE / f"{file}.json").items():
        if name.startswith(UNET):
            kind = 12 if len(shape) == 2 and shape[-1] % 256 == 0 else 1
            axes = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, place)
            described.append(string(prefix + name.removeprefix(UNET)) + axes)
            size = int(np.prod(shape)) * 144 // 256 if kind == 12 else 2 * int(np.prod(shape))
            place += -(-size // 32) * 32
    content = header(*described, tensors=len(described))
    path = tmp_path / "unet.gguf"
    with path.open("wb") as out:
        out.write(content)
        out.truncate(-(-len(content) // 32) * 32 + place)
    checkpoint = open_checkpoint(path, ask=False)
    assert checkpoint.wrong == {} and checkpoint.title == family
    assert re.search(r"float16 \(\d+\), Q4_K \(\d+\)", report(checkpoint))


HUGE = 2**62
DAMAGED = {
    "empty": (b"", "is no GGUF file: it has 0 bytes"),
    "other": (b"PK\x03\x04" + bytes(60), r"begins with b'PK.*instead of b'GGUF'"),
    "version 1": (header(bytes(64), version=1), "its version is 1; minidiff reads 2 and 3"),
    "big endian": (header(bytes(64), version=3 << 24), "its version is 50331648"),
    "many tensors": (header(bytes(64), tensors=HUGE), f"{HUGE:,} things should follow byte 16"),
    "many entries": (header(bytes(64), entries=HUGE), f"{HUGE:,} things should follow byte 24"),
    "long name": (header(struct.pack("<Q", HUGE), bytes(64)), f"{HUGE:,} bytes should follow byte 32"),
    "long array": (
        header(string("k"), struct.pack("<IIQ", 9, 5, HUGE), bytes(64), entries=1),
        f"{HUGE:,} things should follow",
    ),
    "nested": (
        header(string("k"), struct.pack("<IIQ", 9, 9, 1), bytes(64), entries=1),
        "k in its metadata is of type 9",
    ),
    "unknown value": (header(string("k"), struct.pack("<I", 77), bytes(64), entries=1), "is of type 77, which is none"),
    "alignment": (
        header(string("general.alignment"), struct.pack("<II", 4, 0), tensor(1), bytes(64), entries=1),
        "general.alignment should be from 1 to 1048576, found 0",
    ),
    "axes": (header(string("w"), struct.pack("<I", 5), bytes(64)), "w has 5 axes, not up to 4"),
    "unknown type": (header(tensor(256, kind=16), bytes(900)), r"w is of type 16; minidiff unpacks F32 \(0\).*Q6_K"),
    "no whole blocks": (header(tensor(33, kind=8), bytes(900)), r"shape \(33,\) is not made of blocks of 32 values"),
    "absurd size": (header(tensor(HUGE, HUGE), bytes(64)), r"w should end at byte [\d,]+ of"),
    "absurd place": (header(tensor(4, place=HUGE), bytes(64)), r"w should end at byte [\d,]+ of"),
    "cut short": (header(tensor(64), bytes(100)), r"w should end at byte \d+ of \d+; download it again"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    content, message = DAMAGED[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    for load in (minidiff.UNet2DConditionModel.from_single_file, minidiff.DiffusionPipeline.from_single_file):
        with pytest.raises(CheckpointError, match=message) as caught:
            load(path)
        assert str(path) in str(caught.value)


def test_cut_anywhere(unet: minidiff.UNet2DConditionModel, tmp_path: Path) -> None:
    """Every beginning of a file is an error that says so."""
    whole = write(tmp_path / "whole.gguf", {"a.b": (np.ones((2, 32), "f"), KINDS.F32)}, note="x").read_bytes()
    assert len(read_gguf(tmp_path / "whole.gguf")[0]) == 1
    path = tmp_path / "x.gguf"
    for size in range(0, len(whole) - 32, 7):  # the last tensor is padded
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="GGUF"):
            read_gguf(path)
