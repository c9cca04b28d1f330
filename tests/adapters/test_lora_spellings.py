"""Spellings of LoRA that the reference does not load: the same matrices as in diffusers' spelling, bit for bit."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import minidiff
from minidiff import CLIPTextModel, CLIPTextModelWithProjection, UNet2DConditionModel
from minidiff.adapters.lora import adapters_of
from minidiff.adapters.lora_names import LoraNames
from minidiff.checkpoints.load import OnMeta
from minidiff.cli.main import main
from minidiff.config import read_json
from minidiff.errors import CheckpointError
from tests.loras import Matrices, Tensors, draw, every, hub, outputs, peft
from tests.tiny import save_tiny
from tests.tiny_xl import save_base

CONFIGS = Path(__file__).parents[1] / "data" / "hub_configs"
PUBLISHED = {
    "SD 1.5": "runwayml--stable-diffusion-v1-5",
    "SD 2.1": "stabilityai--stable-diffusion-2-1",
    "SDXL": "stabilityai--stable-diffusion-xl-base-1.0",
}
TEXT = {"text_encoder": "text_encoders.clip_l.transformer", "text_encoder_2": "text_encoders.clip_g.transformer"}
KINDS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
OMI = {"unet": "unet", "text_encoder": "clip_l", "text_encoder_2": "clip_g"}
KOHYA = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


class Spelling(NamedTuple):
    """How a program names a layer, from its component, its name on the Hub and that in an original file."""

    name: Callable[[str, str, str], str]
    down: str = ".lora_A.weight"
    up: str = ".lora_B.weight"


def flat(unet: str) -> Callable[[str, str, str], str]:
    return lambda part, hub_name, _: KOHYA.get(part, unet) + hub_name.replace(".", "_")


def comfy(part: str, hub_name: str, original: str) -> str:
    """ComfyUI's comfy/lora.py, model_lora_keys_unet and _clip: "generic lora format without any weird key names"."""
    return f"diffusion_model.{original}" if part == "unet" else f"{TEXT[part]}.{hub_name}"


def omi(part: str, hub_name: str, original: str) -> str:
    """OneTrainer's modules/util/convert/lora/convert_sdxl_lora.py, the first name of each LoraConversionKeySet."""
    return f"{OMI[part]}.{original if part == 'unet' else hub_name}"


def bare(part: str, hub_name: str, original: str) -> str:
    """OneTrainer's modules/modelSaver/mixin/LoRASaverMixin.py, _save_original: the UNet alone, without a prefix."""
    return original if part == "unet" else f"{part}.{hub_name}"


SPELLINGS = {
    "ComfyUI": Spelling(comfy),
    "ComfyUI, SD 2": Spelling(lambda *name: comfy(*name).replace("clip_l", "clip_h")),
    "ComfyUI, extracted": Spelling(comfy, ".lora_down.weight", ".lora_up.weight"),
    "OneTrainer, OMI": Spelling(omi, ".lora_down.weight", ".lora_up.weight"),
    "OneTrainer, bare": Spelling(bare),
    "SimpleTuner": Spelling(flat("lycoris_"), ".lora_down.weight", ".lora_up.weight"),
    "kohya, original names": Spelling(
        lambda part, hub_name, original: flat("lora_unet_")(part, original if part == "unet" else hub_name, ""),
        ".lora_down.weight",
        ".lora_up.weight",
    ),
    "wrapped by PEFT": Spelling(lambda part, hub_name, _: f"{part}.base_model.model.{hub_name}"),
    "in memory": Spelling(
        lambda part, hub_name, _: f"{part}.{hub_name}", ".lora_A.default_0.weight", ".lora_B.default_0.weight"
    ),
    "in memory, wrapped": Spelling(
        lambda part, hub_name, _: f"{part}.base_model.model.{hub_name}", ".lora_A.my.weight", ".lora_B.my.weight"
    ),
}


# --- every layer of the published models -----------------------------------------------------------------------------


def networks_of(model: str) -> dict[str, Any]:
    classes = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
    if model == "SDXL":
        classes["text_encoder_2"] = CLIPTextModelWithProjection
    with OnMeta():
        return {
            part: cls.from_config(read_json(CONFIGS / PUBLISHED[model] / part / "config.json"))
            for part, cls in classes.items()
        }


def adaptable(part: str, network: Any) -> Iterator[tuple[str, str, str]]:
    """Yield component, Hub name and original name of each layer, from the name table alone."""
    for row in network.rows():
        for k, (ours, hub_name) in enumerate(zip(row.ours, row.hub, strict=True)):
            layer = ours.removesuffix(".weight")
            if layer != ours and isinstance(network.get_submodule(layer), KINDS):
                original = row.ldm[k] if part == "unet" else ours
                yield part, hub_name.removesuffix(".weight"), original.removesuffix(".weight")


@pytest.mark.parametrize("model", PUBLISHED)
def test_every_layer_of_published_models(model: str) -> None:
    """Each layer under each of its names, both ways: none is lost, none means two."""
    networks = networks_of(model)
    names = LoraNames(networks)
    layers = [layer for part, network in networks.items() for layer in adaptable(part, network)]
    known = {layer for part in names.dotted.values() for layer in part.values()}
    assert len(layers) == len(known) == {"SD 1.5": 488, "SD 2.1": 576, "SDXL": 1405}[model]
    for spelling in SPELLINGS.values():
        for ending, role in ((spelling.down, "down"), (spelling.up, "up")):
            spelled = {spelling.name(*layer) + ending: layer for layer in layers}
            assert len(spelled) == len(layers)
            for key, (part, hub_name, _) in spelled.items():
                found, its_role = names.find(key)
                assert (found.component, found.hub, its_role) == (part, hub_name, role)


def test_names_that_were_read_in_sources() -> None:
    """A few, written out, so that not all names come from the table that they are looked up in."""
    names = {model: LoraNames(networks_of(model)) for model in ("SD 1.5", "SDXL")}
    for model, key, hub_name in (
        ("SD 1.5", "diffusion_model.output_blocks.2.1.conv.lora_A.weight", "up_blocks.0.upsamplers.0.conv"),
        ("SD 1.5", "diffusion_model.input_blocks.3.0.op.lora_A.weight", "down_blocks.0.downsamplers.0.conv"),
        ("SDXL", "unet.output_blocks.5.2.conv.lora_down.weight", "up_blocks.1.upsamplers.0.conv"),
        ("SDXL", "unet.label_emb.0.2.lora_down.weight", "add_embedding.linear_2"),
        ("SDXL", "unet.input_blocks.4.0.skip_connection.lora_down.weight", "down_blocks.1.resnets.0.conv_shortcut"),
        ("SDXL", "middle_block.2.in_layers.2.lora_A.weight", "mid_block.resnets.1.conv1"),
        ("SDXL", "clip_g.text_projection.lora_down.weight", "text_projection"),
        ("SDXL", "lora_te2_text_projection.lora_down.weight", "text_projection"),
    ):
        assert names[model].find(key)[0].hub == hub_name
    key = "text_encoders.clip_l.transformer.text_projection.lora_A.weight"
    assert names["SD 1.5"].find(key) == "for a layer 'text_projection', which text_encoder does not have"


# --- what they load as -----------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    pipe: Any
    theirs: Any  # the layers to draw matrices for
    original: dict[str, str]  # Hub name of a layer of the UNet -> its name in an original file


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    from tests.theirs import diffusers

    found = {}
    for kind, save, name in (
        ("sd", save_tiny, "StableDiffusionPipeline"),
        ("xl", save_base, "StableDiffusionXLPipeline"),
    ):
        folder = save(tmp_path_factory.mktemp(kind))
        pipe = getattr(minidiff, name).from_pretrained(folder).to(torch.float64)
        theirs = getattr(diffusers, name).from_pretrained(folder)
        found[kind] = Kind(pipe, theirs, {hub_name: old for _, hub_name, old in adaptable("unet", pipe.unet)})
    return found


@pytest.fixture(params=["sd", "xl"])
def kind(request: pytest.FixtureRequest, kinds: dict[str, Kind]) -> Iterator[Kind]:
    """A pipeline that comes out as it went in: the same tensors, and no hook or buffer."""
    found = kinds[request.param]
    parts = [
        getattr(found.pipe, name) for name in ("unet", "text_encoder", "text_encoder_2") if hasattr(found.pipe, name)
    ]
    before = [dict(part.named_parameters()) for part in parts]
    yield found
    found.pipe.unload_lora_weights()
    for part, parameters in zip(parts, before, strict=True):
        assert all(now is parameters[name] for name, now in part.named_parameters())
        assert not any(module._forward_hooks or "lora" in str(module._buffers) for module in part.modules())


def spelled(spelling: Spelling, lora: Matrices, original: dict[str, str], alpha: float | None = None) -> Tensors:
    found = {}
    for part, matrices in lora.items():
        for layer, (A, B) in matrices.items():
            name = spelling.name(part, hub(layer), original.get(hub(layer), ""))
            found |= {name + spelling.down: A, name + spelling.up: B}
            if alpha is not None:
                found[f"{name}.alpha"] = torch.tensor(alpha)
    return found


def loaded(pipe: Any) -> dict[str, Any]:
    """Return all that adapters are in memory: each matrix and each scale, by network and layer."""
    found: dict[str, Any] = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        adapters = adapters_of(getattr(pipe, part, None))
        for name, layer in adapters.layers.items() if adapters else ():
            found[f"{part}.{name}"] = layer.update("default_0")
    return found


@pytest.mark.parametrize(
    ("name", "alpha"), [*((name, None) for name in SPELLINGS), ("ComfyUI", 3.0), ("SimpleTuner", 3.0)]
)
def test_the_same_weights_as_in_diffusers_spelling(kind: Kind, name: str, alpha: float | None) -> None:
    lora = draw(kind.theirs, rank=lambda k: 1 + k % 3)
    tensors = peft(lora)
    if alpha is not None:
        tensors |= {key.replace("lora_A.weight", "alpha"): torch.tensor(alpha) for key in tensors if "lora_A" in key}
    kind.pipe.load_lora_weights(tensors)
    expected = loaded(kind.pipe)
    kind.pipe.unload_lora_weights()
    kind.pipe.load_lora_weights(spelled(SPELLINGS[name], lora, kind.original, alpha))
    found = loaded(kind.pipe)
    assert found.keys() == expected.keys() and len(found) == sum(map(len, lora.values()))
    for key, update in found.items():
        assert (update.form, update.scale) == ("LoRA", expected[key].scale)
        assert update.parts.keys() == expected[key].parts.keys() == {"down", "up"}
        assert all(torch.equal(part, expected[key].parts[role]) for role, part in update.parts.items())


def test_what_the_networks_compute(kind: Kind) -> None:
    """Not only are the matrices those: they work, and unloading takes them away to the bit."""
    plain = outputs(kind.pipe)
    lora = draw(kind.theirs, only=every(5))
    kind.pipe.load_lora_weights(peft(lora))
    expected = outputs(kind.pipe)
    assert not torch.equal(expected[0], plain[0])
    for name in ("ComfyUI", "OneTrainer, OMI"):
        kind.pipe.unload_lora_weights()
        assert all(map(torch.equal, outputs(kind.pipe), plain))
        kind.pipe.load_lora_weights(spelled(SPELLINGS[name], lora, kind.original))
        assert all(map(torch.equal, outputs(kind.pipe), expected))


# --- what does not fit -----------------------------------------------------------------------------------------------

WRONG = {
    "an unknown block": (
        "diffusion_model.input_blocks.77.0.op.lora_A.weight",
        "input_blocks.77.0.op', which unet does",
    ),
    "another model's encoder": (
        "text_encoders.t5xxl.transformer.x.lora_A.weight",
        "text_encoders.t5xxl.*which unet does",
    ),
    "the second encoder": (
        "clip_g.text_model.x.lora_A.weight",
        "for text_encoder_2, which this pipeline does not have",
    ),
    "no LoRA": ("diffusion_model.input_blocks.0.0.weight", "no part of a LoRA layer in any spelling"),
}


@pytest.mark.parametrize("name", WRONG)
def test_keys_that_nothing_explains_are_named(kinds: dict[str, Kind], name: str) -> None:
    key, message = WRONG[name]
    kind = kinds["sd"]
    tensors = spelled(SPELLINGS["ComfyUI"], draw(kind.theirs, only=every(9)), kind.original)
    with pytest.raises(CheckpointError, match=message) as error:
        kind.pipe.load_lora_weights(tensors | {key: torch.ones(2, 2)})
    assert key in str(error.value) and kind.pipe.get_list_adapters() == {}


def test_two_adapters_in_one_dump(kinds: dict[str, Kind]) -> None:
    kind = kinds["sd"]
    tensors = {}
    for name, seed in (("default", 4), ("other", 7)):
        for key, tensor in peft(draw(kind.theirs, only=every(seed))).items():
            tensors[key.replace(".weight", f".{name}.weight")] = tensor
    with pytest.raises(CheckpointError, match="it holds the adapters default, other: give one of them alone"):
        kind.pipe.load_lora_weights(tensors)


def test_one_layer_in_two_spellings(kinds: dict[str, Kind]) -> None:
    kind = kinds["sd"]
    lora = draw(kind.theirs, only=every(9))
    tensors = spelled(SPELLINGS["ComfyUI"], lora, kind.original) | spelled(SPELLINGS["SimpleTuner"], lora, {})
    with pytest.raises(CheckpointError, match="lycoris_.*: the same tensor as diffusion_model"):
        kind.pipe.load_lora_weights(tensors)


# --- minidiff inspect ------------------------------------------------------------------------------------------------

TITLES = {
    "ComfyUI": "ComfyUI (OneTrainer writes it too)",
    "ComfyUI, SD 2": "ComfyUI (OneTrainer writes it too)",
    "ComfyUI, extracted": "ComfyUI (OneTrainer writes it too)",
    "OneTrainer, OMI": "OMI (OneTrainer)",
    "OneTrainer, bare": "OneTrainer, with the names of original files, PEFT, as diffusers writes it",
    "SimpleTuner": "SimpleTuner, kohya",
    "kohya, original names": "kohya, with the names of original files, kohya",
    "wrapped by PEFT": "PEFT",
    "in memory": "PEFT in memory, with the name of an adapter",
    "in memory, wrapped": "PEFT",
    "kohya": "kohya",
    "diffusers": "diffusers",
    "diffusers, with PEFT": "PEFT, as diffusers writes it",
    "LyCORIS": "the Hub's names",
}
MORE = {
    "kohya": Spelling(flat("lora_unet_"), ".lora_down.weight", ".lora_up.weight"),
    "diffusers": Spelling(lambda part, hub_name, _: f"{part}.{hub_name}", ".lora.down.weight", ".lora.up.weight"),
    "diffusers, with PEFT": Spelling(lambda part, hub_name, _: f"{part}.{hub_name}"),
    "LyCORIS": Spelling(lambda part, hub_name, _: f"{part}.{hub_name}", ".lora_down.weight", ".lora_up.weight"),
}


@pytest.mark.parametrize("name", TITLES)
def test_inspect_says_whose_spelling_it_is(
    kinds: dict[str, Kind], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    kind, path = kinds["xl"], tmp_path / "x.safetensors"
    lora = draw(kind.theirs)
    save_file(spelled((SPELLINGS | MORE)[name], lora, kind.original), path)
    assert main(["inspect", str(path)]) == 0
    page = capsys.readouterr().out
    assert re.search(rf"^  spelling +{re.escape(TITLES[name])}\n", page, re.MULTILINE)
    for part, layers in lora.items():
        assert re.search(rf"^  {part} +{len(layers)} layers: {len(layers)} LoRA of rank 2\n", page, re.MULTILINE)
    assert re.search(r"^  unexpected +nothing\n", page, re.MULTILINE)


def test_inspect_names_the_words_in_a_lora(
    kinds: dict[str, Kind], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, path = kinds["sd"], tmp_path / "x.safetensors"
    words = {f"bundle_emb.<cat>.{name}": torch.ones(1, 24) for name in ("clip_l", "clip_l_out")}
    save_file(spelled(SPELLINGS["OneTrainer, OMI"], draw(kind.theirs, only=every(9)), kind.original) | words, path)
    assert main(["inspect", str(path)]) == 0
    assert re.search(r"  embeddings +<cat>.clip_l, <cat>.clip_l_out\n  unexpected +nothing", capsys.readouterr().out)


def test_inspect_reads_a_folder_of_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = {"unet": "mid_block.resnets.0.conv1", "text_encoder": "encoder.layers.0.mlp.fc1"}
    for part, name in layer.items():
        (tmp_path / part).mkdir()
        tensors = {f"base_model.model.{name}.lora_{letter}.weight": torch.ones(2, 2) for letter in "AB"}
        save_file(tensors, tmp_path / part / "adapter_model.safetensors")
        (tmp_path / part / "adapter_config.json").write_text('{"auto_mapping": null}')
    assert main(["inspect", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    assert "load_lora_weights(folder)" in page and re.search(r"  spelling +PEFT\n", page)
    assert all(re.search(rf"  {part} +1 layers: 1 LoRA of rank 2\n", page) for part in layer)
    assert main(["inspect", str(tmp_path / "unet" / "adapter_model.safetensors")]) == 0
    assert "  unet " in capsys.readouterr().out
    save_file({f"foo.lora_{letter}.weight": torch.ones(2, 2) for letter in "AB"}, tmp_path / "x.safetensors")
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 0
    assert re.search(r"  spelling +unknown\n", capsys.readouterr().out)


def test_inspect_leaves_other_families_to_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "transformer.single_transformer_blocks.0.attn.to_q"
    save_file({f"{name}.lora_{letter}.weight": torch.ones(2, 2) for letter in "AB"}, tmp_path / "flux.safetensors")
    main(["inspect", str(tmp_path / "flux.safetensors")])
    said = capsys.readouterr()
    assert "Flux" in said.out + said.err and "load_lora_weights" not in said.out


@pytest.mark.parametrize("keys", [["emp_params", "emp_params_out"], ["clip_l", "clip_l_out"], ["text_encoders_0"]])
def test_embeddings_are_told_from_lora(kinds: dict[str, Kind], keys: list[str]) -> None:
    with pytest.raises(CheckpointError, match=r"\(it is a textual inversion: .*load_textual_inversion\(file\)"):
        kinds["sd"].pipe.load_lora_weights({key: torch.ones(2, 24) for key in keys})
