"""Single files as other programs write them: other prefixes, other names, constants, a moving average alone."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minidiff import (
    AutoencoderKL,
    CLIPTextModelWithProjection,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from minidiff.checkpoints.load import OnMeta
from minidiff.checkpoints.original.prefixes import ema_name
from minidiff.checkpoints.original.read import SingleFile
from minidiff.checkpoints.original.single_file import load_part
from minidiff.checkpoints.tools.checkpoint import open_checkpoint
from minidiff.errors import CheckpointError
from tests.single_files import Twin, sparse_file, states_equal
from tests.vocabulary import load_script

headers = load_script("headers")
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
Tensors = dict[str, Tensor]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
FIRST, SECOND = "conditioner.embedders.0.", "conditioner.embedders.1."
LAST = "transformer.resblocks.2."  # of the tiny text encoder of SD 2.x, which has three layers


@pytest.fixture(scope="module")
def make_twin(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Twin]:
    return lru_cache(lambda kind: Twin(kind, tmp_path_factory.mktemp(kind)))


def moved(tensors: Tensors, old: str, new: str) -> Tensors:
    return {new + n.removeprefix(old) if n.startswith(old) else n: tensor for n, tensor in tensors.items()}


def without(tensors: Tensors, prefix: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def hub(twin: Twin, part: str) -> Tensors:
    """Return a network's tensors under the Hub's names, as transformers 4 and 5 and diffusers write them."""
    (path,) = (twin.folder / part).glob("*.safetensors")
    return load_file(path)


def text_model(tensors: Tensors) -> Tensors:
    """Write the prefix that transformers 5 has dropped."""
    return {n if n.startswith("text_") else f"text_model.{n}": tensor for n, tensor in tensors.items()}


def add_last_layer(tensors: Tensors, twin: Twin, prefix: str) -> Tensors:
    """Add what OpenCLIP has behind the state that SD 2.x conditions on: a layer, a projection, a temperature."""
    last = {n.replace(".2.", ".3."): t + 1 for n, t in tensors.items() if n.startswith(prefix + LAST)}
    assert len(last) == 12
    return tensors | last | {f"{prefix}text_projection": torch.ones(24, 24), f"{prefix}logit_scale": torch.ones(())}


def sgm(tensors: Tensors, twin: Twin) -> Tensors:
    return add_last_layer(moved(tensors, "cond_stage_model.model.", f"{FIRST}model."), twin, f"{FIRST}model.")


def replace_part(tensors: Tensors, old: str, prefix: str, new: Tensors) -> Tensors:
    return without(tensors, old) | {prefix + name: tensor for name, tensor in new.items()}


def attention(query: str, key: str, value: str, out: str) -> Callable[[Tensors, Twin], Tensors]:
    """Spell the attention of the autoencoder otherwise, as linear layers."""
    names = {"q": query, "k": key, "v": value, "proj_out": out}

    def change(tensors: Tensors, twin: Twin) -> Tensors:
        found = {}
        for name, tensor in tensors.items():
            stem, _, last = name.rpartition(".")
            head, _, part = stem.rpartition(".")
            if head.endswith("attn_1") and part in names:
                found[f"{head}.{names[part]}.{last}"] = tensor.flatten(1).clone() if last == "weight" else tensor
            else:
                found[name] = tensor
        assert len(found.keys() - tensors.keys()) == 16
        return found

    return change


def wrapped(tensors: Tensors, twin: Twin) -> Tensors:
    """Name the tensors as torch.compile and data parallelism do, around the whole and around one network."""
    found = {name.replace(UNET, f"{UNET}_orig_mod."): tensor for name, tensor in tensors.items()}
    return {f"module.{name.replace(VAE, f'{VAE}module.')}": tensor for name, tensor in found.items()}


def constants(tensors: Tensors, twin: Twin) -> Tensors:
    ids = torch.arange(77)[None]
    names = {
        "sd1": {"cond_stage_model.text_projection": ids, "embedding_manager.embedder.x.weight": ids},
        "xl": {
            f"{SECOND}model.transformer.text_model.embeddings.position_ids": ids,
            f"{SECOND}model.logit_scale": ids,
            f"{FIRST}text_projection": ids,
            f"{FIRST}logit_scale": ids,
            f"{FIRST}transformer.text_model.embeddings.position_ids": ids,
        },
    }[twin.kind]
    more = {f"{FIRST}text_projection.weight": ids} if twin.kind == "xl" else {"cond_stage_model.logit_scale": ids}
    return tensors | {name: tensor.clone() for name, tensor in (names | more).items()}


SPELLINGS: dict[str, tuple[str, Callable[[Tensors, Twin], Tensors]]] = {
    "sd2 of SGM": ("sd2", sgm),
    "sd2 with the last layer": ("sd2", lambda t, twin: add_last_layer(t, twin, "cond_stage_model.model.")),
    "sd2 with transformers' names": (
        "sd2",
        lambda t, twin: replace_part(
            t, "cond_stage_model.", "cond_stage_model.transformer.", text_model(hub(twin, "text_encoder"))
        ),
    ),
    "sd2 of SGM with transformers' names": (
        "sd2",
        lambda t, twin: replace_part(t, "cond_stage_model.", f"{FIRST}transformer.", hub(twin, "text_encoder")),
    ),
    "xl, second encoder with transformers' names": (
        "xl",
        lambda t, twin: replace_part(t, SECOND, f"{SECOND}transformer.", text_model(hub(twin, "text_encoder_2"))),
    ),
    "xl, projection as a layer": (
        "xl",
        lambda t, twin: (
            without(t, f"{SECOND}model.text_projection")
            | {f"{SECOND}model.text_projection.weight": hub(twin, "text_encoder_2")["text_projection.weight"]}
        ),
    ),
    "vae, attention of diffusers": ("sd1", attention("to_q", "to_k", "to_v", "to_out.0")),
    "vae, attention of the first diffusers": ("sd1", attention("query", "key", "value", "proj_attn")),
    "vae of the Hub": ("sd1", lambda t, twin: replace_part(t, VAE, VAE, hub(twin, "vae"))),
    "unet of the Hub": ("xl", lambda t, twin: replace_part(t, UNET, UNET, hub(twin, "unet"))),
    "wrappers": ("sd1", wrapped),
    "constants of sd1": ("sd1", constants),
    "constants of xl": ("xl", constants),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str, make_twin: Callable[[str], Twin], tmp_path: Path) -> None:
    kind, change = SPELLINGS[name]
    twin = make_twin(kind)
    plain = load_file(twin.file)
    save_file(changed := change(plain, twin), tmp_path / "x.safetensors")
    assert changed.keys() != plain.keys()
    pipe = twin.our_class.from_single_file(tmp_path / "x.safetensors", config=twin.folder)
    parts = [part for part in NETWORKS if getattr(twin.ours, part, None) is not None]
    assert len(parts) == (4 if kind == "xl" else 3)
    assert all(states_equal(getattr(pipe, part), getattr(twin.ours, part)) for part in parts)
    checkpoint = open_checkpoint(tmp_path / "x.safetensors", config=twin.folder).check()
    known = sum(len(part.found) for part in checkpoint.parts)
    assert known + len(checkpoint.dropped) == len(changed) and all(reason for _, reason in checkpoint.dropped)


def test_sd_turbo_at_full_size(tmp_path: Path) -> None:
    """Its file is spelled as SGM does, like XL's refiner, and needs nothing beside it."""
    tensors = headers.read_list(headers.HERE / "v2-1_512-ema-pruned.json")
    old, new = "cond_stage_model.model.", f"{FIRST}model."
    tensors = {n.replace(old, new): ["F16", shape] for n, (_, shape) in tensors.items()}
    last = {n.replace(".22.", ".23."): entry for n, entry in tensors.items() if n.startswith(f"{new}transformer.res")}
    tensors |= last | {f"{new}text_projection": ["F16", [1024, 1024]], f"{new}logit_scale": ["F16", []]}
    path = sparse_file(tmp_path / "sd_turbo.safetensors", tensors)
    pipe = DiffusionPipeline.from_single_file(path, torch_dtype="float16", prediction_type="epsilon")
    assert type(pipe) is StableDiffusionPipeline and pipe.text_encoder.config.num_hidden_layers == 23
    assert len(open_checkpoint(path, ask=False).check().dropped) == 12 + 2
    assert not headers.differences(tensors, headers.tensors_of(str(path)))


def test_a_square_projection_is_told_by_its_name(make_twin: Callable[[str], Twin], tmp_path: Path) -> None:
    """SDXL's is 1280 x 1280. OpenCLIP's parameter has no ".weight" and is transposed, a layer has it and is not."""
    twin = make_twin("xl")
    fields = dict(twin.ours.text_encoder_2.config) | {"projection_dim": 16}
    state = CLIPTextModelWithProjection(fields).state_dict()
    tensors = load_file(twin.file)
    W = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    for name, stored in (("text_projection", W.T.contiguous()), ("text_projection.weight", W)):
        rest = without(tensors, f"{SECOND}model.text_projection")
        save_file(rest | {f"{SECOND}model.{name}": stored}, tmp_path / "x.safetensors")
        contents = SingleFile.of(tmp_path / "x.safetensors")
        with OnMeta():
            model = CLIPTextModelWithProjection(fields)
        parts, wrong, _ = contents.match({"text_encoder_2": model}, ignore=lambda owner: True)
        assert not wrong and model.state_dict().keys() == state.keys()
        assert torch.equal(load_part(parts[0], torch.float32).text_projection.weight, W)


def test_a_layer_that_nobody_expects_is_not_left_out(make_twin: Callable[[str], Twin], tmp_path: Path) -> None:
    """Only the one layer behind the last of an encoder without projection is."""
    twin = make_twin("sd2")
    prefix = "cond_stage_model.model.transformer.resblocks."
    tensors = add_last_layer(load_file(twin.file), twin, "cond_stage_model.model.")
    tensors |= {name.replace(".3.", ".4."): t for name, t in tensors.items() if name.startswith(f"{prefix}3.")}
    save_file({name: t.clone() for name, t in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"12 unexpected") as error:
        StableDiffusionPipeline.from_single_file(tmp_path / "x.safetensors", config=twin.folder)
    assert f"{prefix}4.attn" in str(error.value) and f"{prefix}3.attn" not in str(error.value)
    xl = make_twin("xl")
    tensors, prefix = load_file(xl.file), f"{SECOND}model.transformer.resblocks."
    tensors |= {n.replace(".3.", ".4."): t.clone() for n, t in tensors.items() if n.startswith(f"{prefix}3.")}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"12 unexpected"):
        xl.our_class.from_single_file(tmp_path / "x.safetensors", config=xl.folder)


@pytest.mark.parametrize("use_ema", [False, True])
def test_a_moving_average_alone(
    use_ema: bool, make_twin: Callable[[str], Twin], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    twin = make_twin("sd1")
    path = tmp_path / "ema.safetensors"
    tensors = {
        ema_name(name.removeprefix(UNET)) if name.startswith(UNET) else name: t
        for name, t in load_file(twin.file).items()
    }
    save_file(tensors | {"model_ema.decay": torch.tensor(0.9)}, path)
    for unet in (
        StableDiffusionPipeline.from_single_file(path, config=twin.folder, use_ema=use_ema).unet,
        UNet2DConditionModel.from_single_file(path, config=twin.folder, subfolder="unet", use_ema=use_ema),
    ):
        assert states_equal(unet, twin.ours.unet)
    said = "ema.safetensors holds only the moving average of the UNet's weights: it is loaded"
    assert (said in caplog.text) == (not use_ema) and "and their moving average" not in caplog.text
    checkpoint = open_checkpoint(path, config=twin.folder)
    assert not checkpoint.wrong and len(checkpoint.parts) == 3
    reasons = {tensor.name: reason for tensor, reason in checkpoint.dropped}
    assert reasons.keys() == {"model_ema.decay"}


def test_an_autoencoder_of_the_hub_with_a_configuration(make_twin: Callable[[str], Twin], tmp_path: Path) -> None:
    twin = make_twin("sd1")
    save_file({f"module.{name}": t for name, t in hub(twin, "vae").items()}, tmp_path / "x.safetensors")
    vae = AutoencoderKL.from_single_file(tmp_path / "x.safetensors", config=twin.folder, subfolder="vae")
    assert states_equal(vae, twin.ours.vae)
    with pytest.raises(CheckpointError, match="in the Hub's spelling"):
        AutoencoderKL.from_single_file(tmp_path / "x.safetensors")


def test_wrappers_in_a_folder(make_twin: Callable[[str], Twin], tmp_path: Path) -> None:
    twin: Any = make_twin("sd1")
    twin.ours.unet.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({f"module._orig_mod.{name}": t.clone() for name, t in load_file(path).items()}, path)
    assert states_equal(UNet2DConditionModel.from_pretrained(tmp_path), twin.ours.unet)
