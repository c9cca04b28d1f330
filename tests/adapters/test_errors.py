"""Wrong LoRA and embedding files end in an error that names what is wrong, and change nothing."""

import copy
import json
import logging
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from minidiff import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from minidiff.adapters.lora_names import LoraNames
from minidiff.checkpoints.load import OnMeta
from minidiff.config import read_json
from minidiff.errors import CheckpointError, CheckpointNotFoundError
from tests.hub_server import HubServer, Repository, run_with
from tests.tiny import save_tiny
from tests.tiny_xl import save_base

Tensors = dict[str, Tensor]
CONFIGS = Path(__file__).parents[1] / "data" / "hub_configs"
PROMPT = "a red heart"
CALL: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "seed": 0}
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
TEXT = "text_model.encoder.layers.1.self_attn.v_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(save_tiny(tmp_path_factory.mktemp("sd")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(save_base(tmp_path_factory.mktemp("xl")))


@pytest.fixture
def pipe(plain: StableDiffusionPipeline) -> Iterator[StableDiffusionPipeline]:
    """A pipeline that must come out as it went in."""
    parts = [plain.unet, plain.text_encoder]
    before = [dict(part.named_parameters()) for part in parts]
    yield plain
    if plain.fused_loras:
        plain.unfuse_lora()
    plain.unload_lora_weights()
    plain.unload_textual_inversion()
    for part, parameters in zip(parts, before, strict=True):
        assert dict(part.named_parameters()).keys() == parameters.keys()
        assert all(now is parameters[name] for name, now in part.named_parameters())
        assert not any(module._forward_hooks or module._buffers for module in part.modules())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 4


def lora(rank: int = 2, seed: int = 0) -> Tensors:
    """Return a small LoRA in PEFT's spelling: a linear layer, a convolution and a text encoder's layer."""
    shapes = {f"unet.{Q}": (16, 16), f"unet.{CONV}": (16, 16, 3, 3), f"text_encoder.{TEXT}": (24, 24)}
    found = {}
    for k, (name, (rows, columns, *kernel)) in enumerate(shapes.items()):
        found[f"{name}.lora_A.weight"] = draw(rank, columns, *kernel, seed=seed + k)
        found[f"{name}.lora_B.weight"] = draw(rows, rank, *(1 for _ in kernel), seed=seed + k + 10)
    return found


def kohya() -> Tensors:
    """Return the same in kohya's spelling, with alphas."""
    found = {}
    for key, tensor in lora().items():
        name, _, part = key.removesuffix(".weight").rpartition(".lora_")
        component, _, layer = name.partition(".")
        flat = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[component] + layer.replace(".", "_")
        found[f"{flat}.lora_{'down' if part == 'A' else 'up'}.weight"] = tensor
        found[f"{flat}.alpha"] = torch.tensor(1.0)
    return found


# --- names -----------------------------------------------------------------------------------------------------------


def on_meta(cls: Any, path: str) -> Any:
    with OnMeta():
        return cls.from_config(read_json(CONFIGS / path))


def test_layers_of_published_models_are_as_many_as_kohya_counts() -> None:
    """What its trainer prints for SD 1.5: 192 layers of the UNet's transformers, 72 of the text encoder; SDXL: 722, 72
    and 192. And each is found under all its names: one that two layers share would fail an assertion."""
    sd, xl = "runwayml--stable-diffusion-v1-5", "stabilityai--stable-diffusion-xl-base-1.0"
    networks = {
        "unet": on_meta(UNet2DConditionModel, f"{sd}/unet/config.json"),
        "text_encoder": on_meta(CLIPTextModel, f"{sd}/text_encoder/config.json"),
    }
    networks_xl = {
        "unet": on_meta(UNet2DConditionModel, f"{xl}/unet/config.json"),
        "text_encoder": on_meta(CLIPTextModel, f"{xl}/text_encoder/config.json"),
        "text_encoder_2": on_meta(CLIPTextModelWithProjection, f"{xl}/text_encoder_2/config.json"),
    }
    for given, counts in ((networks, (192, 72)), (networks_xl, (722, 72, 192))):
        names = LoraNames(given)
        for (component, found), count in zip(names.dotted.items(), counts, strict=True):
            inside = "attentions" if component == "unet" else "encoder.layers"
            assert sum(inside in name and "norm" not in name for name in found) == count
            assert {layer.ours for layer in names.flat[component].values()} == {layer.ours for layer in found.values()}
    key = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight"
    assert names.find(key)[0].hub == "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


# --- fuzzing ---------------------------------------------------------------------------------------------------------


def drop(tensors: Tensors, key: str, rng: random.Random) -> str:
    """Remove a matrix: the one that is left over is named."""
    del tensors[key]
    swaps = (("lora_A", "lora_B"), ("lora_B", "lora_A"), ("lora_down", "lora_up"), ("lora_up", "lora_down"))
    return next(key.replace(a, b) for a, b in swaps if a in key)


def rename(tensors: Tensors, key: str, rng: random.Random) -> str:
    at = rng.randrange(len(key))
    new = key[:at] + rng.choice("x_.7") + key[at:]
    tensors[new] = tensors.pop(key)
    return new


def reshape(tensors: Tensors, key: str, rng: random.Random) -> str:
    old = tensors[key]
    tensors[key] = rng.choice([old[..., None], old.flatten(), old[:, :-1], old[:-1], torch.cat([old, old], 1), old[:0]])
    return key.rpartition(".lora_")[0]  # of two matrices whose ranks differ, either may be the wrong one


@pytest.mark.parametrize("damage", [drop, rename, reshape])
@pytest.mark.parametrize("make", [lora, kohya])
def test_damaged_loras(pipe: StableDiffusionPipeline, make: Callable[[], Tensors], damage: Callable[..., str]) -> None:
    rng, good = random.Random(0), make()
    for _ in range(40):
        tensors = dict(good)
        key = rng.choice([key for key in tensors if ".lora_" in key])
        named = damage(tensors, key, rng)
        items = list(tensors.items())
        rng.shuffle(items)
        with pytest.raises(CheckpointError) as error:
            pipe.load_lora_weights(dict(items))
        assert named in str(error.value), (key, named, str(error.value))
        assert pipe.get_list_adapters() == {}
    assert pipe.load_lora_weights(good).layers["unet"] == {Q: 2, CONV: 2}


# --- LoRA files ------------------------------------------------------------------------------------------------------

HEADER = "lora_adapter_metadata"
FILES = {
    "OFT": ({"lora_unet_a.oft_blocks": draw(2, 2)}, "oft_blocks: OFT"),
    "unknown part": ({"unet.alphas": draw(1)}, "unet.alphas: no part of a LoRA layer in any spelling"),
    "unknown layer": ({"unet.x.lora_A.weight": draw(2, 2)}, "unet.x.lora_A.weight: for a layer 'x', which unet"),
    "second encoder": (
        {"lora_te2_text_projection.lora_up.weight": draw(2, 2)},
        "lora_te2_.*for text_encoder_2, which this pipeline does not have",
    ),
    "twice": (
        {f"lora_unet_{Q.replace('.', '_')}.lora_down.weight": draw(2, 16)},
        f"lora_unet_.*: the same tensor as unet.{Q}",
    ),
    "alpha of no layer": (
        {"lora_unet_mid_block_resnets_0_conv1.alpha": draw(1)},
        "conv1.alpha: its layer lacks the matrix down .A. and up",
    ),
    "alpha of several numbers": ({f"unet.{Q}.alpha": draw(3)}, "to_q.alpha should be one finite number"),
    "alpha that is none": ({f"unet.{Q}.alpha": torch.tensor(float("nan"))}, "to_q.alpha should be one finite.*nan"),
    "integers": ({f"unet.{Q}.lora_A.weight": torch.ones(2, 16, dtype=torch.int8)}, "lora_A.weight is torch.int8"),
    "no tensor": ({"unet.b": [1.0]}, "unet.b is list"),
    "not a number": (
        {f"unet.{Q}.lora_A.weight": torch.full((2, 16), float("nan"))},
        f"the given state dict: unet.{Q}.lora_A.weight holds values that are not finite",
    ),
    "infinite": ({f"unet.{Q}.lora_B.weight": draw(16, 2) / 0}, f"unet.{Q}.lora_B.weight holds values that are not fin"),
    "of SDXL": (
        {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": draw(4, 2048)},
        r"no LoRA for this pipeline \(its UNet reads a text of width 2048, as Stable Diffusion XL does, this one 24\)",
    ),
    "of SD 2": ({f"unet.{Q.replace('attn1.to_q', 'attn2.to_v')}.lora_A.weight": draw(2, 1024)}, "Stable Diffusion 2.x"),
    "of Flux": (
        {"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": draw(2, 8)},
        "is a LoRA for Flux, which minidiff does not implement",
    ),
    "of Flux, kohya": (
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": draw(2, 8)},
        "is a LoRA for Flux or Hunyuan Video",
    ),
    "a checkpoint": (
        {"model.diffusion_model.out.2.weight": draw(4, 16, 3, 3)},
        r"\(it is a checkpoint: load it with from_single_file\)",
    ),
    "a network": ({"down_blocks.0.resnets.0.conv1.weight": draw(4, 4)}, r"\(it is a network.*from_pretrained"),
    "a textual inversion": ({"emb_params": draw(2, 24)}, r"\(it is a textual inversion: .*load_textual_inversion"),
}


@pytest.mark.parametrize("name", FILES)
def test_lora_that_does_not_fit(pipe: StableDiffusionPipeline, name: str) -> None:
    tensors, message = FILES[name]
    with pytest.raises(CheckpointError, match=message):
        pipe.load_lora_weights(lora() | tensors)
    assert pipe.get_list_adapters() == {}


def test_the_header_says_whose_lora_it_is(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    for field, value in (("ss_base_model_version", "sdxl_base_v1-0"), ("modelspec.architecture", "flux-1-dev/lora")):
        save_file({"lora_unet_x.lora_up.weight": draw(2, 2)}, tmp_path / "x.safetensors", {field: value})
        with pytest.raises(CheckpointError, match=rf"\({field} in its header is '{value}'\)"):
            pipe.load_lora_weights(tmp_path / "x.safetensors")


def test_integer_alphas(pipe: StableDiffusionPipeline) -> None:
    pipe.load_lora_weights(kohya())
    expected = pipe(PROMPT, **CALL).images
    pipe.unload_lora_weights()
    whole = {key: value.long() if key.endswith(".alpha") else value for key, value in kohya().items()}
    pipe.load_lora_weights(whole)
    assert torch.equal(pipe(PROMPT, **CALL).images, expected)


def test_wrappers_in_the_names(pipe: StableDiffusionPipeline) -> None:
    tensors = {key.replace("unet.", "unet._orig_mod.module."): value for key, value in lora().items()}
    assert pipe.load_lora_weights(tensors).layers["unet"] == {Q: 2, CONV: 2}


def test_what_overflows_in_half_precision(plain: StableDiffusionPipeline) -> None:
    pipe = StableDiffusionPipeline(**{name: copy.deepcopy(part) for name, part in plain.components.items()})
    pipe.to(torch.float16)
    with pytest.raises(
        CheckpointError, match=rf"unet.{Q}.lora_A.weight is not finite in torch.float16, the dtype of its"
    ):
        pipe.load_lora_weights(lora() | {f"unet.{Q}.lora_A.weight": draw(2, 16) * 1e6})
    assert pipe.get_list_adapters() == {}


def test_long_lists_are_cut(pipe: StableDiffusionPipeline) -> None:
    tensors = {f"unet.left.{k}.lora_A.weight": draw(2, 2) for k in range(50)}
    with pytest.raises(CheckpointError) as error:
        pipe.load_lora_weights(lora() | tensors)
    lines = str(error.value).splitlines()
    assert len(lines) == 1 + 20 + 1 and lines[-1] == "  ... and 30 more, which begin with 'unet.left.'"


def test_all_that_is_wrong_is_said_at_once(pipe: StableDiffusionPipeline) -> None:
    tensors = lora()
    tensors["unet.first"] = tensors.pop(f"unet.{Q}.lora_A.weight")
    tensors[f"unet.{CONV}.lora_B.weight"] = draw(16, 5, 1, 1)
    with pytest.raises(CheckpointError) as error:
        pipe.load_lora_weights(tensors)
    message = str(error.value)
    assert "unet.first" in message and f"unet.{Q}.lora_B.weight: its layer lacks the matrix down (A)" in message
    assert f"unet.{CONV}.lora_B.weight is (16, 5, 1, 1), expected (16, r, 1, 1) with the rank r = 2 of" in message


HEADERS = {
    "not JSON": ("{", "is not JSON"),
    "not an object": ("[1]", "should be an object, found list"),
    "of another pipeline": ({"transformer.r": 2}, "has 'transformer.r', but this pipeline has only unet, text_encoder"),
    "another rank": ({"unet.r": 3}, f"{Q} has rank 2, but the file's header says r = 3"),
    "no number": ({"unet.lora_alpha": "x"}, "lora_alpha in the file's header should be a number, found 'x'"),
    "DoRA": ({"unet.use_dora": True}, f"header says that {Q} is DoRA, but it has no lora_magnitude_vector"),
    "bias": ({"unet.bias": "all"}, "asks for unet.bias = 'all'"),
    "other weights": ({"unet.init_lora_weights": "pissa"}, "asks for unet.init_lora_weights = 'pissa'"),
    "whole layers": ({"unet.modules_to_save": ["conv_in"]}, "asks for unet.modules_to_save"),
    "from the future": ({"unet.use_xyz": 1}, "asks for unet.use_xyz = 1"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_header_that_asks_for_what_is_not_there(pipe: StableDiffusionPipeline, tmp_path: Path, name: str) -> None:
    header, message = HEADERS[name]
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(lora(), tmp_path / "lora.safetensors", {HEADER: text})
    with pytest.raises(CheckpointError, match=message):
        pipe.load_lora_weights(tmp_path / "lora.safetensors")
    assert pipe.get_list_adapters() == {}


def test_alpha_in_the_header_and_in_a_tensor(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    tensors = lora() | {f"unet.{Q}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "lora.safetensors", {HEADER: json.dumps({"unet.r": 2, "unet.lora_alpha": 2})})
    with pytest.raises(CheckpointError, match="to_q.alpha is 1, but the file's header gives an alpha of 2"):
        pipe.load_lora_weights(tmp_path / "lora.safetensors")


def test_where_files_are_looked_for(pipe: StableDiffusionPipeline, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="there is no folder"):
        pipe.load_lora_weights(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointNotFoundError, match="no pytorch_lora_weights.safetensors and no other.*nothing"):
        pipe.load_lora_weights(tmp_path)
    (tmp_path / "lora.bin").write_bytes(b"\x80\x02")
    for arguments in ({}, {"weight_name": "lora.bin"}):
        with pytest.raises(CheckpointError, match=r"lora.bin.*minidiff reads only safetensors"):
            pipe.load_lora_weights(tmp_path, **arguments)
    with pytest.raises(CheckpointError, match=r"lora.bin is a pickle.*only safetensors"):
        pipe.load_lora_weights(tmp_path / "lora.bin")
    save_file(lora(), tmp_path / "a.safetensors")
    pipe.load_lora_weights(tmp_path, adapter_name="the only one")
    save_file(lora(seed=5), tmp_path / "b.safetensors")
    with pytest.raises(CheckpointNotFoundError, match="several safetensors files .a.safetensors, b.safetensors.: pass"):
        pipe.load_lora_weights(tmp_path)
    pipe.load_lora_weights(tmp_path, weight_name="b.safetensors")
    assert pipe.get_list_adapters()["unet"] == ["the only one", "default_0"]
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="empty.safetensors is not a complete safetensors file: it is empty"):
        pipe.load_lora_weights(tmp_path, weight_name="empty.safetensors")
    with pytest.raises(CheckpointError, match="the given state dict holds no tensors"):
        pipe.load_lora_weights({})


def test_files_on_the_hub(tmp_path: Path) -> None:
    """Only the file that is meant is downloaded: that of the usual name, or the only one."""
    for name in ("one/pytorch_lora_weights", "one/other", "two/pixel-art"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file(lora(), tmp_path / f"{name}.safetensors")
    (tmp_path / "two" / "pixel-art.bin").write_bytes(b"\x80\x02")
    code = (
        "from minidiff.adapters.source import read_adapter\n"
        "print([len(read_adapter(f'a/{n}', 'pytorch_lora_weights.safetensors').tensors) for n in ('one', 'two')])"
    )
    with HubServer({f"a/{name}": Repository({"main": tmp_path / name}) for name in ("one", "two")}) as hub:
        assert run_with(hub, tmp_path / "cache", code) == "[6, 6]"
        assert hub.downloaded() == ["a/one/main/pytorch_lora_weights.safetensors", "a/two/main/pixel-art.safetensors"]


# --- LoRA methods ----------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, tuple[Any, ...], type[Exception], str]] = {
    "name taken": ("load_lora_weights", (lora(), "one"), ValueError, "adapter 'one' already"),
    "name with a dot": ("load_lora_weights", (lora(), "a.b"), ValueError, "without '.', found 'a.b'"),
    "hotswap": (
        "load_lora_weights",
        (lora(), "two", True),
        ValueError,
        r"hotswap=True replaces.*\['one'\]; found 'two'",
    ),
    "hotswap of none": ("load_lora_weights", (lora(), None, True), ValueError, "hotswap=True replaces.*found None"),
    "unknown adapter": ("set_adapters", (["one", "x"],), ValueError, r"adapters \['one'\]; found \['one', 'x'\]"),
    "adapter twice": ("set_adapters", (["one", "one"],), ValueError, r"found \['one', 'one'\]"),
    "weights too many": ("set_adapters", ("one", [1, 2]), ValueError, "2 entries for 1 adapters"),
    "weight no number": ("set_adapters", ("one", "x"), TypeError, "adapter_weights should be a number.*'x'"),
    "weight not finite": ("set_adapters", ("one", float("nan")), ValueError, "should be finite, found nan"),
    "unknown component": ("set_adapters", ("one", {"vae": 1}), ValueError, "has unet, text_encoder, no vae"),
    "unknown side": ("set_adapters", ("one", {"unet": {"left": 1}}), ValueError, "left; expected down, mid, up"),
    "unknown block": (
        "set_adapters",
        ("one", {"unet": {"down": {"block_1": 1}}}),
        ValueError,
        "block_1; expected block_0",
    ),
    "weights of a block": (
        "set_adapters",
        ("one", {"unet": {"up": {"block_1": [1] * 3}}}),
        ValueError,
        "3 weights for 2",
    ),
    "fused elsewhere": ("fuse_lora", (["vae"],), ValueError, r"some of unet, text_encoder; found \['vae'\]"),
    "fused nowhere": ("fuse_lora", ([],), ValueError, "components should be a list"),
    "fused by a text": ("fuse_lora", (None, "x"), TypeError, "lora_scale should be a number, found 'x'"),
    "fused unknown": ("fuse_lora", (None, 1.0, False, ["x"]), ValueError, r"found \['x'\]"),
    "fused to infinity": ("fuse_lora", (None, 1e39, True), ValueError, "not finite, in .*; nothing was changed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(pipe: StableDiffusionPipeline, name: str) -> None:
    method, arguments, kind, message = WRONG[name]
    pipe.load_lora_weights(lora(), "one")
    with pytest.raises(kind, match=message):
        getattr(pipe, method)(*arguments)
    assert pipe.get_active_adapters() == ["one"] and not pipe.fused_loras


def test_there_may_be_nothing_to_undo(pipe: StableDiffusionPipeline, caplog: pytest.LogCaptureFixture) -> None:
    pipe.load_lora_weights(lora(), "one")
    pipe.unfuse_lora()
    pipe.delete_adapters(["x", "one"])
    pipe.delete_adapters("one")
    pipe.unfuse_lora()
    assert [record.message.partition(";")[0] for record in caplog.records if record.levelname == "WARNING"] == [
        "no adapter is fused",
        "there is no adapter 'x' to delete",
        "there is no adapter 'one' to delete",
        "no adapter is fused",
    ]
    assert pipe.get_list_adapters() == {}


def test_what_fused_adapters_refuse(pipe: StableDiffusionPipeline) -> None:
    pipe.load_lora_weights(lora(), "one")
    pipe.load_lora_weights(lora(seed=5), "two")
    with pytest.raises(ValueError, match=r"adapter_names=\['one'\], but \['two'\] are active"):
        pipe.fuse_lora(adapter_names=["one"])
    pipe.fuse_lora(adapter_names=["two"])
    for call in (
        lambda: pipe.set_adapters("one"),
        lambda: pipe.delete_adapters("one"),
        lambda: pipe.load_lora_weights(lora(), "one", hotswap=True),
    ):
        with pytest.raises(ValueError, match="while two is fused: call unfuse_lora"):
            call()
    with pytest.raises(ValueError, match="unet, text_encoder are fused already"):
        pipe.fuse_lora()
    pipe.unfuse_lora()
    with pytest.raises(ValueError, match="no active adapter to fuse"):
        pipe.disable_lora()
        pipe.fuse_lora()
    with pytest.raises(TypeError, match="unknown arguments speed"):
        pipe.load_lora_weights(lora(), speed=1)


def test_scale_of_a_call(pipe: StableDiffusionPipeline, caplog: pytest.LogCaptureFixture) -> None:
    for value, kind, message in (
        ({"scale": 1, "gligen": {}}, TypeError, "gligen is not implemented, only scale"),
        ({"scale": "x"}, TypeError, "'scale'.* should be a number, found 'x'"),
        (0.5, TypeError, "should be a dict such as"),
    ):
        with pytest.raises(kind, match=message):
            pipe(PROMPT, cross_attention_kwargs=value, **CALL)
    pipe(PROMPT, cross_attention_kwargs={"scale": 1.0}, **CALL)
    assert not caplog.records
    pipe(PROMPT, cross_attention_kwargs={"scale": 0.5}, **CALL)
    assert "has no effect: no LoRA is loaded" in caplog.text
    pipe.load_lora_weights(lora(), "one")
    pipe.fuse_lora()
    pipe(PROMPT, cross_attention_kwargs={"scale": 0.5}, **CALL)
    assert "has no effect: one is fused" in caplog.text


def test_what_is_loaded_while_others_are_disabled_or_fused(
    pipe: StableDiffusionPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    pipe.load_lora_weights(lora(), "one")
    pipe.fuse_lora()
    pipe.load_lora_weights(lora(seed=5), "two")
    assert "one of unet is no longer fused: 'two' takes its place" in caplog.text and not pipe.fused_loras
    pipe.disable_lora()
    pipe.load_lora_weights(lora(seed=6), "three")
    assert "the adapters of unet are disabled, 'three' too: call enable_lora()" in caplog.text
    disabled = pipe(PROMPT, **CALL).images
    pipe.enable_lora()
    assert (pipe(PROMPT, **CALL).images - disabled).abs().max() > 1e-3
    pipe.unload_lora_weights()
    assert torch.equal(pipe(PROMPT, **CALL).images, disabled)


def test_what_was_patched_is_said(pipe: StableDiffusionPipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="minidiff"):
        loaded = pipe.load_lora_weights(lora(), "one")
    assert (
        str(loaded)
        == "LoRA 'one' adapts 2 layers of unet (2 LoRA of rank 2), 1 layers of text_encoder (1 LoRA of rank 2)"
    )
    assert loaded.layers == {"unet": {Q: 2, CONV: 2}, "text_encoder": {TEXT: 2}}
    assert caplog.messages == [str(loaded)]


def test_threads_with_scales_of_their_own(pipe: StableDiffusionPipeline) -> None:
    pipe.load_lora_weights(lora())
    scales = [0.0, 0.4, 0.8, 1.0, -1.0]

    def run(scale: float) -> Tensor:
        return pipe(PROMPT, cross_attention_kwargs={"scale": scale}, **CALL).images

    alone = [run(scale) for scale in scales]
    together: dict[int, Tensor] = {}
    threads = [Thread(target=lambda k=k: together.update({k: run(scales[k])})) for k in range(len(scales))]
    stepped = pipe.steps(PROMPT, num_inference_steps=2, seed=0, cross_attention_kwargs={"scale": 0.4})
    first = next(stepped)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[k], alone[k]) for k in range(len(scales)))
    assert all((alone[k] - alone[0]).abs().max() > 1e-3 for k in range(1, len(scales)))
    *_, last = stepped  # nor does it matter to a run that rests between two steps
    assert first.index == 0 and torch.equal(last.latents, alone[1])


@pytest.mark.parametrize("kind", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
def test_pipelines_that_share_networks_share_adapters(pipe: StableDiffusionPipeline, kind: Any) -> None:
    other = kind(**pipe.components)
    other.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(lora(), "one")
    assert other.get_active_adapters() == ["one"]
    arguments = {"image": torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32), "strength": 1.0, "seed": 0}
    if kind is StableDiffusionInpaintPipeline:
        arguments |= {"mask_image": torch.ones(1, 1, 32, 32), "height": 32, "width": 32}
    arguments |= {"num_inference_steps": 2, "cross_attention_kwargs": {"scale": 0.5}}
    half = other(PROMPT, **arguments, output_type="latent").images
    *_, last = other.steps(PROMPT, **arguments)
    assert torch.equal(last.latents, half)
    pipe.delete_adapters("one")
    del arguments["cross_attention_kwargs"]
    assert (other(PROMPT, **arguments, output_type="latent").images - half).abs().max() > 1e-3


def test_adapters_follow_the_network(plain: StableDiffusionPipeline) -> None:
    """To another dtype, fused or not, and into a copy."""
    call = {"num_inference_steps": 2, "output_type": "latent", "latents": draw(1, 4, 8, 8)}
    pipe = StableDiffusionPipeline(**{name: copy.deepcopy(part) for name, part in plain.components.items()})
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(lora())
    single = pipe(PROMPT, **call).images
    copied = StableDiffusionPipeline(**{name: copy.deepcopy(part) for name, part in pipe.components.items()})
    copied.set_progress_bar_config(disable=True)
    copied.unload_lora_weights()
    assert torch.equal(copied(PROMPT, **call).images, plain(PROMPT, **call).images)
    assert torch.equal(pipe(PROMPT, **call).images, single)
    pipe.to(torch.float64)
    double = pipe(PROMPT, **call).images
    assert double.dtype == torch.float64 and (double - single).abs().max() < 1e-3
    pipe.to(torch.float32)
    pipe.fuse_lora()
    pipe.to(torch.float64)
    pipe.unfuse_lora()
    assert pipe.unet.dtype == torch.float64 and torch.equal(pipe(PROMPT, **call).images, double)


def test_adapters_of_a_pipeline_that_is_faster_or_smaller(plain: StableDiffusionPipeline) -> None:
    """Those forwards have kernels, memos and copies of weights of their own, which must not go past an adapter."""
    call = CALL | {"num_inference_steps": 1, "guidance_scale": 3.0}
    tensors = lora()
    for layer, (rows, columns, *kernel) in {
        "up_blocks.0.upsamplers.0.conv": (32, 32, 3, 3),
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v": (16, 24),
        "up_blocks.1.resnets.0.time_emb_proj": (16, 64),
    }.items():
        tensors[f"unet.{layer}.lora_A.weight"] = draw(2, columns, *kernel, seed=rows)
        tensors[f"unet.{layer}.lora_B.weight"] = draw(rows, 2, *(1 for _ in kernel), seed=columns)

    def pictures(**methods: dict[str, Any]) -> list[Tensor]:
        pipe = StableDiffusionPipeline(**{name: copy.deepcopy(part) for name, part in plain.components.items()})
        pipe.set_progress_bar_config(disable=True)
        for method, arguments in methods.items():
            getattr(pipe, method)(**arguments)
        found = [pipe(PROMPT, **call).images]
        pipe.load_lora_weights(tensors)
        found.append(pipe(PROMPT, **call).images)
        found.append(pipe(PROMPT, **call, cross_attention_kwargs={"scale": 0.5}).images)
        pipe.fuse_lora(lora_scale=0.3)
        found.append(pipe(PROMPT, **call).images)
        pipe.unfuse_lora()
        pipe.fuse_lora()
        pipe.unfuse_lora()
        pipe.fuse_lora(lora_scale=0.5)
        found.append(pipe(PROMPT, **call).images)
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        return [*found, pipe(PROMPT, **call).images]

    expected = pictures()
    for methods in (
        {"optimize": {}},
        {"enable_model_cpu_offload": {"device": "cpu"}},
        {"enable_sequential_cpu_offload": {"device": "cpu"}},
    ):
        for ours, theirs in zip(pictures(**methods), expected, strict=True):
            assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()  # measured: 0 offloaded, 7e-8 optimized
    assert all((a - b).abs().max() > 1e-3 for k, a in enumerate(expected[:4]) for b in expected[:k])


def test_the_code_of_the_page(pipe: StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    save_file(lora(), tmp_path / "pixel-art.safetensors")
    save_file(kohya(), tmp_path / "folder" / "toy.safetensors")
    save_file({"emb_params": draw(2, 24)}, tmp_path / "cat.safetensors")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs/adapters.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n# tutorial\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {"pipe": pipe})
    assert pipe.get_list_adapters() == {} and len(pipe.tokenizer) == 540


# --- textual inversion -----------------------------------------------------------------------------------------------

WORDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "another width": (({"<cat>": draw(2, 32)},), r"'<cat>' are \(2, 32\), expected \(n, 24\)"),
    "three axes": (({"<cat>": draw(1, 2, 24)},), r"<cat> is \(1, 2, 24\), expected vectors"),
    "no vectors": (({"<cat>": draw(0, 24)},), r"<cat> is \(0, 24\)"),
    "a word of the vocabulary": (({"!": draw(24)},), "knows '!' already"),
    "no name": (({"emb_params": draw(24)},), "emb_params is no name.*pass token="),
    "no name for a tensor": ((draw(24),), "pass token="),
    "an empty name": ((draw(24), " "), "a token should be a text that is not empty, found ' '"),
    "twice": (([draw(24), draw(24)], ["<a>", "<a>"]), "knows '<a>' already"),
    "in the way of another": (([draw(24), draw(2, 24)], ["<a>_1", "<a>"]), "knows '<a>_1' already"),
    "names too few": (([draw(24)] * 3, ["<a>", "<b>"]), "2 names for 3 sources"),
    "names too many": ((draw(3, 24), ["<a>", "<b>"]), "3 vectors for the 2 names"),
    "two tensors": (({"<a>": draw(24), "<b>": draw(24)},), "holds <a>, <b>; expected one tensor"),
    "pickle": (({"string_to_param": {"*": draw(24)}, "name": "x"},), "layout of A1111's pickles"),
    "not a number": (({"<cat>": draw(24) / 0},), "<cat> holds values that are not finite"),
    "not a number in a tensor": ((draw(24) * float("nan"), "<cat>"), "the given tensor: .*not finite"),
    "a LoRA": ((lora(),), "is a LoRA: .*load_lora_weights"),
    "a checkpoint": (({"model.diffusion_model.out.2.weight": draw(4), "x": draw(4)},), "is a checkpoint: load it with"),
    "two encoders": (({"clip_l": draw(24), "clip_g": draw(16)}, "<a>"), "clip_g is for text_encoder_2, which this"),
}


@pytest.mark.parametrize("name", WORDS)
def test_words_that_do_not_fit(pipe: StableDiffusionPipeline, name: str) -> None:
    arguments, message = WORDS[name]
    with pytest.raises(ValueError, match=message):
        pipe.load_textual_inversion(*arguments)
    assert len(pipe.tokenizer) == pipe.text_encoder.config.vocab_size == 540


def test_words_and_their_places(pipe: StableDiffusionPipeline, xl: StableDiffusionXLPipeline, tmp_path: Path) -> None:
    pipe.load_textual_inversion({"<cat>": draw(2, 24)})
    with pytest.raises(ValueError, match="knows '<cat>', '<cat>_1' already"):
        pipe.load_textual_inversion({"<cat>": draw(2, 24)})
    with pytest.raises(ValueError, match="no added token '<dog>'"):
        pipe.unload_textual_inversion("<dog>")
    with pytest.raises(ValueError, match="give tokenizer= and text_encoder= together"):
        pipe.load_textual_inversion({"<dog>": draw(24)}, tokenizer=pipe.tokenizer)
    with pytest.raises(ValueError, match="'</w>'|not added, or special"):
        pipe.tokenizer.remove_tokens(["<|endoftext|>"])
    (tmp_path / "cat.pt").write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match=r"cat.pt is a pickle.*only safetensors"):
        pipe.load_textual_inversion(tmp_path / "cat.pt", token="<pt>")
    both = {"clip_l": draw(24), "clip_g": draw(16)}
    xl.load_textual_inversion(both, "<a>", tokenizer=xl.tokenizer_2, text_encoder=xl.text_encoder_2)
    assert (len(xl.tokenizer), len(xl.tokenizer_2)) == (540, 541)
    wrong = both | {"clip_g": draw(24)}
    with pytest.raises(ValueError, match=r"expected \(n, 16\)"):
        xl.load_textual_inversion(wrong, "<b>")
    assert (len(xl.tokenizer), len(xl.tokenizer_2)) == (540, 541)


def test_two_encoders_never_learn_half_a_word(xl: StableDiffusionXLPipeline, tmp_path: Path) -> None:
    """A file for one encoder needs to be told which; that of the second lies beside, as diffusers' script writes it."""
    xl.unload_textual_inversion()

    def sizes() -> tuple[int, int]:
        return len(xl.tokenizer), len(xl.tokenizer_2)

    before = sizes()
    for source, token in (({"emb_params": draw(2, 24)}, "<cat>"), ({"<cat>": draw(24)}, None), (draw(16), "<cat>")):
        with pytest.raises(ValueError, match="is for one text encoder, and this pipeline has two: pass tokenizer="):
            xl.load_textual_inversion(source, token=token)
        assert sizes() == before
    with pytest.raises(ValueError, match=r"width 24, which text_encoder reads"):
        xl.load_textual_inversion({"<cat>": draw(24)})
    xl.load_textual_inversion({"<one>": draw(24)}, tokenizer=xl.tokenizer, text_encoder=xl.text_encoder)
    assert sizes() == (before[0] + 1, before[1])
    xl.unload_textual_inversion()
    for name, D in (("learned_embeds", 24), ("learned_embeds_2", 16)):
        for steps in ("", "-steps-500"):
            save_file({"<cat>": draw(2, D)}, tmp_path / f"{name}{steps}.safetensors")
    first, second = "learned_embeds-steps-500.safetensors", "learned_embeds_2-steps-500.safetensors"
    for source, weight_name in ((tmp_path, None), (tmp_path / "learned_embeds.safetensors", None), (tmp_path, first)):
        xl.load_textual_inversion(source, weight_name=weight_name)
        assert sizes() == (before[0] + 2, before[1] + 2)
        xl.unload_textual_inversion("<cat>")
    xl.load_textual_inversion(tmp_path, weight_name=second)
    assert sizes() == (before[0], before[1] + 2)
    xl.unload_textual_inversion()
    xl.load_textual_inversion(
        tmp_path, tokenizer=xl.tokenizer, text_encoder=xl.text_encoder
    )  # what the caller asks for
    assert sizes() == (before[0] + 2, before[1])
    xl.unload_textual_inversion()
