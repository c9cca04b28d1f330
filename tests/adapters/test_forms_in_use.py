"""Forms of adapters in other company: matrices in other shapes, changed layers, stored weights, saved files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import minidiff
from minidiff.adapters.report import report_adapter
from minidiff.checkpoints.casting import apply_layerwise_casting
from minidiff.errors import CheckpointError
from tests.adapters.test_forms import BOUND, KINDS, LAYERS, adapted, change, make_layer
from tests.adapters.test_forms_errors import CONV, LOHA, WRONG, parts
from tests.loras import Tensors
from tests.pictures import seeded
from tests.theirs import relative_error
from tests.tiny import save_tiny

PROJ = "down_blocks.0.attentions.0.proj_in"  # (16, 16, 1, 1) on the Hub, a linear layer here
D = 24  # of the text encoder
FF = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"  # (16, 64), with a bias


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("sd"))


@pytest.fixture
def pipe(folder: Path) -> Any:
    return minidiff.StableDiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_matrices_stored_as_convolutions(name: str, kind: str) -> None:
    """Every matrix as (O, I, 1, 1), of whatever layer: the same layer, bit for bit."""
    found = []
    for convolved in (False, True):
        layer, x = make_layer(name)
        tensors = change(layer, kind)[1]
        as_conv = {key: one[..., None, None] if one.ndim == 2 else one for key, one in tensors.items()}
        adapted(layer, as_conv if convolved else tensors)
        found.append(layer(x))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["LoRA", "LoHa"])
@torch.no_grad()
def test_padding_that_was_changed(kind: str) -> None:
    """Pictures that tile set ``padding_mode`` of all convolutions: A pads as its layer does, as if it were fused."""
    layer, x = make_layer("conv 3x3")
    plain = layer(x)
    adapters = adapted(layer, change(layer, kind)[1])
    zeros = layer(x)
    layer.padding_mode = "circular"
    found = layer(x)
    adapters.fuse(1.0, safe=True)
    assert relative_error(found, layer(x)) < BOUND  # measured: 4e-16
    assert relative_error(found, zeros) > 0.1 < relative_error(zeros, plain)


@pytest.mark.parametrize("kind", ["LoRA", "LoHa"])
@pytest.mark.parametrize("loaded_first", [True, False])
@torch.no_grad()
def test_a_layer_cast_to_another_dtype(loaded_first: bool, kind: str) -> None:
    """What an adapter adds is computed in the dtype of its layer, whatever its tensors were converted to since."""
    layer, x = make_layer("linear")
    tensors = change(layer, kind)[1]
    layer.float()
    if loaded_first:
        adapted(layer, tensors)
    apply_layerwise_casting(layer, torch.float8_e4m3fn, torch.bfloat16)
    if not loaded_first:
        adapted(layer, tensors)
        for name, buffer in layer._buffers.items():
            layer._buffers[name] = buffer.float()  # as a network's ``to`` does
    found, (exact, _) = layer(x.bfloat16()), make_layer("linear")
    exact.weight.copy_(layer.weight), exact.bias.copy_(layer.bias)
    adapted(exact, tensors)
    assert found.dtype == torch.bfloat16 and relative_error(found, exact(x)) < 0.02  # measured: 0.005


SAVED = ["DoRA", "LoHa", "LoHa with DoRA", "LoKr", "LoKr of four", "LoKr with DoRA", "difference"]
SAVED = [(layer, kind) for layer in (PROJ, CONV) for kind in SAVED]
SAVED += [(CONV, f"{form} (Tucker)") for form in ("LoRA", "LoHa", "LoKr")]


@pytest.mark.parametrize(("layer", "kind"), SAVED)
def test_saved_as_others_read_it(pipe: Any, tmp_path: Path, layer: str, kind: str) -> None:
    """Under the names, in the shapes and with the alphas that LyCORIS wrote: it looks into no header, nor do others."""
    module = nn.Conv2d(16, 16, 1) if layer == PROJ else nn.Conv2d(16, 32, 3, padding=1)
    given = {f"{layer}.{part}": one.float() for part, one in change(module, kind)[1].items()}
    pipe.unet.load_lora_adapter(given, prefix=None, adapter_name="one")
    pipe.unet.save_lora_adapter(tmp_path, "one")
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert saved.keys() == given.keys() and all(torch.allclose(one, saved[key]) for key, one in given.items())
    assert all(one.shape == saved[key].shape for key, one in given.items())
    scales = [one.forms["one"].scale for one in pipe.unet._lora.layers.values()]
    pipe.unload_lora_weights()
    pipe.unet.load_lora_adapter(tmp_path, prefix=None, adapter_name="one")
    assert scales == [one.forms["one"].scale for one in pipe.unet._lora.layers.values()]


def test_fusing_changes_all_networks_or_none(pipe: Any) -> None:
    """The UNet is fused before it turns out that the text encoder cannot be."""
    q = "text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {f"unet.{FF}.diff": torch.ones(16, 64), f"text_encoder.{q}.diff": torch.full((D, D), 1e38)}
    before = dict(pipe.unet.named_parameters())
    pipe.load_lora_weights(tensors)
    with pytest.raises(ValueError, match="weights that are not finite, in .*layers.0.*; nothing was changed"):
        pipe.fuse_lora(lora_scale=10.0, safe_fusing=True)
    assert pipe.fused_loras == set() and all(now is before[name] for name, now in pipe.unet.named_parameters())


def test_a_text_encoder_saved_and_loaded(pipe: Any, tmp_path: Path) -> None:
    """Its queries, keys and values, which are one matrix in some files."""
    names = [f"text_model.encoder.layers.0.self_attn.{x}_proj" for x in ("q", "k", "v", "out")]
    tensors = {f"{name}.lora_{AB}.weight": torch.ones(s) for name in names for AB, s in (("A", (2, D)), ("B", (D, 2)))}
    pipe.text_encoder.load_lora_adapter(tensors, prefix=None, adapter_name="one")
    pipe.text_encoder.save_lora_adapter(tmp_path, "one")
    assert load_file(tmp_path / "pytorch_lora_weights.safetensors").keys() == tensors.keys()


def test_an_adapter_that_left_a_network(pipe: Any, tmp_path: Path) -> None:
    """One for the text encoder takes the place of one for the UNet, which keeps the name alone."""
    pipe.load_lora_weights(parts(FF, lora_down__weight=(2, 64), lora_up__weight=(16, 2)), adapter_name="a")
    pipe.load_lora_weights(
        {
            f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{part}.weight": torch.ones(shape)
            for part, shape in (("A", (2, D)), ("B", (D, 2)))
        },
        adapter_name="a",
        hotswap=True,
    )
    assert pipe.unet.peft_config["a"].target_modules == [] and "use_dora" not in pipe.unet.peft_config["a"]
    with pytest.raises(CheckpointError, match="'a' changes no layer of this UNet2DConditionModel"):
        pipe.unet.save_lora_adapter(tmp_path, "a")
    assert not list(tmp_path.iterdir())


def test_an_alpha_that_does_not_count(pipe: Any) -> None:
    """LyCORIS asks for whole matrices with a rank beyond all, which stands as alpha in the file: in half, infinity."""
    whole = parts(PROJ, lokr_w1=(4, 4), lokr_w2=(4, 4, 1, 1))
    stem = next(iter(whole)).partition(".")[0]
    pipe.load_lora_weights(whole | {f"{stem}.alpha": torch.tensor(1e5).half()})
    assert [one.forms["default_0"].scale for one in pipe.unet._lora.layers.values()] == [1.0]


def test_the_name_of_an_adapter_inside_that_of_a_bias(pipe: Any) -> None:
    tensors = {f"unet.{FF}.lora_A.weight": torch.ones(2, 64), f"unet.{FF}.lora_B.weight": torch.ones(16, 2)}
    tensors[f"unet.{FF}.lora_B.bias"] = torch.randn(16, generator=seeded(0))
    x, t, found = torch.ones(1, 4, 8, 8), 7, []
    for inside in ("", ".default"):
        given: Tensors = {f"{inside}.".join(key.rsplit(".", 1)): one for key, one in tensors.items()}
        pipe.load_lora_weights(given)
        with torch.no_grad():
            found.append(pipe.unet(x, t, torch.ones(1, 5, 24)).sample)
        pipe.unload_lora_weights()
    assert torch.equal(*found)


TOO_FLAT = {
    "vectors": (parts(FF, **LOHA | {"hada_w1_a": (3,)}), r"hada_w1_a is \(3,\), expected \(16, r\)"),
    "numbers": (parts(FF, lora_down__weight=(), lora_up__weight=(16, 2)), r"down.weight is \(\), expected \(r, 64\)"),
}


@pytest.mark.parametrize("name", TOO_FLAT)
def test_tensors_of_too_few_axes(pipe: Any, name: str) -> None:
    with pytest.raises(CheckpointError, match=TOO_FLAT[name][1]):
        pipe.load_lora_weights(TOO_FLAT[name][0])


def test_inspecting_what_fits_nowhere(tmp_path: Path) -> None:
    """There is a page about every file, without its model."""
    for tensors, _ in (WRONG | TOO_FLAT).values():
        save_file(tensors, tmp_path / "x.safetensors")
        page = report_adapter(tmp_path / "x.safetensors")
        assert page is None or "an adapter" in page
