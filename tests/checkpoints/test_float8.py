"""Weights stored in float8: read exactly, computed in the dtype that is asked for, written where they fit."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minidiff
from minidiff.checkpoints.load import SafetensorsFile, read_header, read_tensor
from minidiff.checkpoints.tools.checkpoint import open_checkpoint
from minidiff.checkpoints.tools.convert import convert
from minidiff.checkpoints.tools.inspect import report
from minidiff.cli.main import main
from minidiff.embedded import embedded_checkpoint
from minidiff.errors import CheckpointError
from tests.single_files import TWINS, Twin, draw, sparse_file, states_equal
from tests.theirs import diffusers, relative_error
from tests.tiny import save_tiny
from tests.vocabulary import load_script

headers = load_script("headers")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def as_float8(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast everything, as the scripts do that make the published files."""
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def rounded(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Round the weights in place to what ``dtype`` holds."""
    network.load_state_dict({name: tensor.to(dtype).float() for name, tensor in network.state_dict().items()})
    return network


def value(code: int, exponent_bits: int, bias: int, top: bool) -> float:
    """Decode a float8 by hand: sign, exponent, mantissa. ``top`` is whether the highest exponent means infinity."""
    bits = 7 - exponent_bits
    sign, exponent, mantissa = code >> 7, (code >> bits) & (2**exponent_bits - 1), code & (2**bits - 1)
    last = exponent == 2**exponent_bits - 1
    if last and (top or mantissa == 2**bits - 1):
        return float("nan") if mantissa or not top else float("inf") * (-1) ** sign
    size = (
        mantissa / 2**bits * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa / 2**bits) * 2.0 ** (exponent - bias)
    )
    return -size if sign else size


@pytest.mark.parametrize("wanted", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dtype", "layout"), [(E4M3, (4, 7, False)), (E5M2, (5, 15, True))])
def test_every_code_is_read_exactly(
    dtype: torch.dtype, layout: tuple[int, int, bool], wanted: torch.dtype, tmp_path: Path
) -> None:
    """All 256, in any dtype that one can compute in: each holds all values of both (bfloat16 has 7 bits to their 3)."""
    path = tmp_path / "codes.safetensors"
    save_file({"w": torch.arange(256, dtype=torch.uint8).view(dtype)}, path)
    (stored,) = read_header(SafetensorsFile(path))
    found = read_tensor(stored, wanted)
    assert found.dtype == wanted
    np.testing.assert_array_equal(found.double().numpy(), [value(code, *layout) for code in range(256)])


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("kind", TWINS)
def test_a_folder_and_a_single_file_with_everything_in_float8(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The picture is that of the rounded weights, bit for bit, whatever the layout."""
    twin = Twin(kind, tmp_path)
    save_file(as_float8(load_file(twin.file), dtype), twin.file)
    for path in twin.folder.glob("*/*.safetensors"):
        save_file(as_float8(load_file(path), dtype), path, {"format": "pt"})
    networks = {name: part for name, part in twin.ours.components.items() if isinstance(part, nn.Module)}
    for network in networks.values():
        rounded(network, dtype)
    expected = draw(twin.ours, **twin.arguments)
    of_file = twin.our_class.from_single_file(twin.file, config=twin.folder)
    of_folder = twin.our_class.from_pretrained(twin.folder)
    for pipe in (of_file, of_folder):
        for name, network in networks.items():
            assert getattr(pipe, name).dtype == torch.float32 and states_equal(getattr(pipe, name), network)
    np.testing.assert_array_equal(draw(of_file, **twin.arguments), expected)


def test_each_tensor_may_be_stored_in_another_dtype(tmp_path: Path) -> None:
    """As in the published files: matrices of the UNet in float8, everything else in float16."""
    folder = save_tiny(tmp_path / "hub")
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    mixed = {name: t.to(E4M3) if t.ndim > 1 else t.half() for name, t in load_file(path).items()}
    save_file(mixed, path, {"format": "pt"})
    unet = minidiff.UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in unet.state_dict().items()} == dict.fromkeys(mixed, torch.bfloat16)
    assert all(torch.equal(tensor, mixed[name].bfloat16()) for name, tensor in unet.state_dict().items())
    options = {"subfolder": "unet", "torch_dtype": torch.bfloat16}
    assert states_equal(unet, diffusers.UNet2DConditionModel.from_pretrained(folder, **options))


@pytest.mark.parametrize("asked", [E4M3, E5M2, "float8_e4m3fn"], ids=str)
def test_float8_is_no_dtype_to_compute_in(asked: object, folder: Path) -> None:
    for load in (minidiff.UNet2DConditionModel.from_pretrained, minidiff.DiffusionPipeline.from_pretrained):
        where = {"subfolder": "unet"} if load.__self__ is minidiff.UNet2DConditionModel else {}
        with pytest.raises(ValueError, match="is for storage only.*enable_layerwise_casting"):
            load(folder, torch_dtype=asked, **where)


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_convert_to_float8_and_on(dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    """To a single file and back; gains and biases stay as they are stored."""
    single, hub = tmp_path / "small.safetensors", tmp_path / "hub"
    assert main(["convert", str(folder), str(single), "--dtype", str(dtype).removeprefix("torch.")]) == 0
    stored = load_file(single)
    assert {tensor.dtype for tensor in stored.values() if tensor.ndim > 1} == {dtype}
    assert {tensor.dtype for tensor in stored.values() if tensor.ndim == 1} == {torch.float32}
    text = report(open_checkpoint(single))
    assert re.search(rf"unet .*{str(dtype)[6:]} \(\d+\)", text) and "float32 (" in text
    convert(single, hub)  # in what is stored
    first, second = (
        minidiff.DiffusionPipeline.from_single_file(single),
        minidiff.DiffusionPipeline.from_pretrained(hub),
    )
    original = minidiff.DiffusionPipeline.from_pretrained(folder)
    for name in ("unet", "vae", "text_encoder"):
        assert states_equal(getattr(first, name), getattr(second, name))
        assert getattr(first, name).dtype == torch.float32
        weights = getattr(original, name).state_dict()
        expected = {key: t.to(dtype).float() if t.ndim > 1 else t for key, t in weights.items()}
        assert all(torch.equal(t, expected[key]) for key, t in getattr(second, name).state_dict().items())
    assert not np.array_equal(draw(first), draw(original))
    assert '"torch_dtype": "float32"' in (hub / "text_encoder/config.json").read_text()  # transformers computes in it


@pytest.mark.parametrize(("dtype", "limit"), [(E4M3, 448), (E5M2, 57344), (torch.float16, 65504)])
def test_values_beyond_the_largest_are_refused(dtype: torch.dtype, limit: float, folder: Path, tmp_path: Path) -> None:
    """torch would store 448 or infinity."""
    vae = minidiff.AutoencoderKL.from_pretrained(folder, subfolder="vae")
    for size, fits in ((limit, True), (limit * 1.2, False)):
        vae.decoder.conv_in.weight.data[0, 0, 0, 0] = size
        vae.save_pretrained(tmp_path / "vae")
        if fits:
            convert(tmp_path / "vae", tmp_path / f"{fits}", dtype=dtype)
            continue
        with pytest.raises(CheckpointError, match=rf"decoder.conv_in.weight has values up to .*ends at {limit}"):
            convert(tmp_path / "vae", tmp_path / f"{fits}", dtype=dtype)
        assert not (tmp_path / f"{fits}").exists()


def test_a_single_file_of_two_float8(tmp_path: Path, folder: Path) -> None:
    """q, k and v in one each: stacked in the original spelling, they take the dtype that holds the values of both."""
    pipe = minidiff.DiffusionPipeline.from_pretrained(folder)
    state = {
        name: tensor.to(E4M3 if ".q_proj" in name else E5M2) for name, tensor in pipe.text_encoder.state_dict().items()
    }
    path = folder / "text_encoder/model.safetensors"
    before = path.read_bytes()
    try:
        save_file(state, path, {"format": "pt"})
        convert(folder, tmp_path / "both.safetensors")
        again = minidiff.DiffusionPipeline.from_single_file(tmp_path / "both.safetensors")
    finally:
        path.write_bytes(before)
    assert all(torch.equal(t, state[name].float()) for name, t in again.text_encoder.state_dict().items())


def test_sdxl_at_full_size(tmp_path: Path) -> None:
    """As scripts publish it: matrices of the UNet in float8, the rest in float16. The header alone is read."""
    listed = headers.read_list(headers.HERE / "sd_xl_base_1.0.json")
    for name, (_, shape) in listed.items():
        if name.startswith("model.diffusion_model.") and len(shape) > 1:
            listed[name] = ["F8_E4M3", shape]
    checkpoint = open_checkpoint(sparse_file(tmp_path / "sdxl_fp8.safetensors", listed), ask=False)
    assert checkpoint.wrong == {} and checkpoint.title == "Stable Diffusion XL"
    assert re.search(r"unet .* 2,567,463,684 +2\.57 GB  float16 \(\d+\), float8_e4m3fn \(\d+\)", report(checkpoint))


@torch.no_grad()
def test_the_error_of_float8_is_what_the_documentation_says() -> None:
    """The embedded checkpoint, the UNet in float8 as ``minidiff convert`` writes it; docs/checkpoints.md."""
    pipe = minidiff.DiffusionPipeline.from_pretrained(embedded_checkpoint("emoji64"))
    unet, weights = pipe.unet, {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    text, _ = pipe.encode_prompt(["red apple", "a dog face", "pizza", "blue car"], "cpu", 1, False)
    side = unet.config.sample_size
    x = torch.randn(4, unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    expected = unet(x, 500, text).sample
    for dtype, largest, of_output in ((E4M3, 0.028, 0.065), (E5M2, 0.059, 0.130)):
        small = {name: tensor.to(dtype).float() for name, tensor in weights.items() if tensor.ndim > 1}
        errors = sorted(relative_error(tensor, weights[name]) for name, tensor in small.items())
        assert 0.9 * largest < errors[-1] < largest  # measured: 0.0279, 0.0586; the median 0.0265, 0.0527
        unet.load_state_dict(weights | small)
        error = relative_error(unet(x, 500, text).sample, expected)
        assert 0.9 * of_output < error < of_output  # measured: 0.0643, 0.1289
