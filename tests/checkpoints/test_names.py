"""The five laws of the name table, for every published configuration, on the meta device where no data is needed.

1. No name repeats in a column.
2. The column ``ours`` is the state dict of the network.
3. Every tensor of a published file is in its column or in a table of those that are dropped, and the other way round.
4. Shapes agree after the change of layout.
5. There and back again between any two columns is bit-exact.

What a Hub file holds is asked of the reference, built from the same ``config.json``. What an original single file holds
is asked of the reference's own converter, which knows those names independently: fed with our ``ldm`` column it must
give exactly the tensors of the Hub file.
"""

import json
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minidiff.checkpoints.model import Model
from minidiff.checkpoints.names_clip import CLIP_DROPPED
from minidiff.checkpoints.original.dropped import LDM_DROPPED, why_dropped
from minidiff.checkpoints.original.prefixes import NETWORKS, PREFIXES, rows_in_file
from minidiff.checkpoints.remap import Row, translate
from minidiff.networks.clip import CLIPTextModel, CLIPTextModelWithProjection
from minidiff.networks.unet import UNet2DConditionModel
from minidiff.networks.vae import AutoencoderKL
from tests.theirs import diffusers, randomize, transformers
from tests.vocabulary import load_script

CONFIGS = Path(__file__).parents[1] / "data" / "hub_configs"
SD = [
    "CompVis--stable-diffusion-v1-4",
    "runwayml--stable-diffusion-v1-5",
    "runwayml--stable-diffusion-inpainting",
    "stabilityai--stable-diffusion-2",
    "stabilityai--stable-diffusion-2-1",
    "stabilityai--stable-diffusion-2-1-base",
    "stabilityai--stable-diffusion-2-inpainting",
]
XL_BASE, XL_REFINER = (f"stabilityai--stable-diffusion-xl-{name}-1.0" for name in ("base", "refiner"))
PUBLISHED = [
    *(f"{name}/{part}/config.json" for name in SD for part in ("unet", "vae", "text_encoder")),
    *(f"{name}/{part}/config.json" for name in (XL_BASE, XL_REFINER) for part in ("unet", "vae", "text_encoder_2")),
    f"{XL_BASE}/text_encoder/config.json",
    "diffusers--stable-diffusion-xl-1.0-inpainting-0.1/unet/config.json",
    "stabilityai--sd-vae-ft-mse/config.json",
    "openai--clip-vit-large-patch14/text_config.json",
]
DISTINCT = (
    "runwayml--stable-diffusion-v1-5",
    "runwayml--stable-diffusion-inpainting/unet",
    "stabilityai--stable-diffusion-2/",
    f"{XL_BASE}/unet",
    f"{XL_REFINER}/unet",
    f"{XL_BASE}/text_encoder/config.json",
    f"{XL_BASE}/text_encoder_2/config.json",
    f"{XL_REFINER}/text_encoder_2/config.json",
)
COUNTS = {f"{XL_BASE}/unet/config.json": 1680, f"{XL_REFINER}/unet/config.json": 1220}  # of tensors, as published
SPELLINGS = ("ours", "hub", "ldm")

SMALL_UNET = {"block_out_channels": [40, 80, 160, 160], "norm_num_groups": 4, "cross_attention_dim": 24}
SMALL_VAE = {"block_out_channels": [16, 32, 64, 64], "norm_num_groups": 8}
SMALL_CLIP = {"hidden_size": 96, "intermediate_size": 160, "vocab_size": 50, "num_attention_heads": 4}
SMALL_XL = {"block_out_channels": [20, 40, 80]}
SMALL_REFINER = {"block_out_channels": [24, 48, 96, 96]}
SMALL_PROJECTION = SMALL_CLIP | {"projection_dim": 96, "num_hidden_layers": 3}


def their_text_encoder(fields: dict[str, Any]) -> nn.Module:
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**fields))


def their_text_encoder_with_projection(fields: dict[str, Any]) -> nn.Module:
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**fields))


class Kind(NamedTuple):
    ours: type[Model]
    theirs: Callable[[dict[str, Any]], nn.Module]
    small: dict[str, Any]


def kind_of(fields: dict[str, Any]) -> Kind:
    if fields.get("architectures") == ["CLIPTextModelWithProjection"]:
        return Kind(CLIPTextModelWithProjection, their_text_encoder_with_projection, SMALL_PROJECTION)
    if "num_attention_heads" in fields and "hidden_size" in fields:
        return Kind(CLIPTextModel, their_text_encoder, SMALL_CLIP)
    if "latent_channels" in fields:
        return Kind(AutoencoderKL, diffusers.AutoencoderKL.from_config, SMALL_VAE)
    narrow = {(320, 640, 1280): SMALL_XL, (384, 768, 1536, 1536): SMALL_REFINER}
    small = SMALL_UNET | narrow.get(tuple(fields["block_out_channels"]), {})
    return Kind(UNet2DConditionModel, diffusers.UNet2DConditionModel.from_config, small)


class Pair(NamedTuple):
    """Our network, the reference's tensors, the name table that relates them, and where the config comes from."""

    ours: Model
    theirs: dict[str, Tensor]
    rows: list[Row]
    path: str


def their_tensors(ours: Model, theirs: nn.Module) -> dict[str, Tensor]:
    """Return the reference's tensors; transformers 5 leaves out the prefix that published text encoders have."""
    prefix = "text_model." if type(ours) is CLIPTextModel else ""
    return {prefix + name: tensor for name, tensor in theirs.state_dict().items()}


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request: pytest.FixtureRequest) -> Pair:
    """Our network of a published configuration, full size on the meta device, and the reference's tensors."""
    fields = json.loads((CONFIGS / request.param).read_text())
    kind = kind_of(fields)
    with torch.device("meta"):
        ours, theirs = kind.ours.from_config(fields), kind.theirs(fields)
    return Pair(ours, their_tensors(ours, theirs), rows_of(ours, request.param), request.param)


@pytest.fixture(scope="module", params=[name for name in PUBLISHED if name.startswith(DISTINCT)])
def filled(request: pytest.FixtureRequest) -> Pair:
    """Our network of a published topology, narrow, with the random weights of the reference, and those."""
    fields = json.loads((CONFIGS / request.param).read_text())
    kind = kind_of(fields)
    theirs = randomize(kind.theirs(fields | kind.small).float())
    with torch.device("meta"):
        ours = kind.ours.from_config(fields, **kind.small)
    return Pair(ours, their_tensors(ours, theirs), rows_of(ours, request.param), request.param)


def rows_of(ours: Model, path: str) -> list[Row]:
    """Return the name table as the single file of the family has it."""
    return rows_in_file(ours.rows(), prefix_of(ours, path))


def prefix_of(ours: Model, path: str) -> str:
    component = next((part for part in path.split("/") if part in NETWORKS), ours.single_file_parts[0])
    families = {XL_BASE: "XL", XL_REFINER: "XL refiner"}
    family = families.get(path.split("/")[0], "2.x" if ours.config.get("hidden_act") == "gelu" else "1.x")
    return PREFIXES[family][component]


def column(rows: list[Row], spelling: str) -> list[str]:
    return [name for row in rows for name in row.names(spelling)]


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def assert_equal_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_laws_one_to_four(published: Pair) -> None:
    ours, theirs, rows, path = published
    state = torch.nn.Module.state_dict(ours)
    assert len(state) == COUNTS.get(path, len(state))
    for spelling in SPELLINGS:
        names = column(rows, spelling)
        assert len(set(names)) == len(names), spelling
    assert sorted(column(rows, "ours")) == sorted(state)
    assert sorted(column(rows, "hub")) == sorted(theirs)
    assert shapes(translate(state, rows, "ours", "hub")) == shapes(theirs)
    assert shapes(translate(theirs, rows, "hub", "ours")) == shapes(state)


def from_single_file(ours: Model, path: str, ldm: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the tensors of an original single file to the Hub's with the reference's own code."""
    convert = diffusers.loaders.single_file_utils
    if isinstance(ours, UNet2DConditionModel):
        return convert.convert_ldm_unet_checkpoint(ldm, ours.config)
    if isinstance(ours, AutoencoderKL):
        return convert.convert_ldm_vae_checkpoint(ldm, ours.config)
    if ours.config.hidden_act == "gelu":
        return convert.convert_open_clip_checkpoint(ours, ldm, prefix=prefix_of(ours, path))
    return convert.convert_ldm_clip_checkpoint(ldm)


def test_single_file_column_is_what_the_reference_reads(published: Pair) -> None:
    ours, theirs, rows, path = published
    ldm = translate(theirs, rows, "hub", "ldm")
    assert shapes(from_single_file(ours, path, ldm)) == shapes(theirs)


def test_single_file_data_is_what_the_reference_reads(filled: Pair) -> None:
    ours, theirs, rows, path = filled
    ldm = translate(theirs, rows, "hub", "ldm")
    assert_equal_tensors(from_single_file(ours, path, ldm), theirs)


def test_there_and_back_again_is_bit_exact(filled: Pair) -> None:
    _, theirs, rows, _ = filled
    columns = {spelling: translate(theirs, rows, "hub", spelling) for spelling in SPELLINGS}
    assert_equal_tensors(columns["hub"], theirs)
    for a, b in permutations(SPELLINGS, 2):
        assert_equal_tensors(translate(columns[a], rows, a, b), columns[b])
        assert_equal_tensors(translate(translate(columns[a], rows, a, b), rows, b, a), columns[a])


def is_dropped(name: str) -> bool:
    return why_dropped(name) is not None


def test_dropped_tensors_of_single_files() -> None:
    assert all(LDM_DROPPED.values()), "each with a reason"
    ignored = diffusers.loaders.single_file_utils.SD_2_TEXT_ENCODER_KEYS_TO_IGNORE
    headers = load_script("headers")
    expected = headers.read_list(headers.HERE / "v2-1_768-ema-pruned.json")
    assert len(ignored) == 13 and all(why_dropped(name, expected) for name in ignored)
    assert not any(why_dropped(name) for name in ignored)  # it is what is expected that tells
    buffers = """
        betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod
        log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance
        posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2
        model_ema.decay model_ema.num_updates model_ema.diffusion_modelinput_blocks00weight
        cond_stage_model.transformer.text_model.embeddings.position_ids cond_stage_model.model.logit_scale
        conditioner.embedders.0.transformer.text_model.embeddings.position_ids
        conditioner.embedders.0.model.logit_scale conditioner.embedders.1.model.logit_scale
        first_stage_model.loss.logvar first_stage_model.loss.perceptual_loss.lin0.model.1.weight
    """.split()
    assert all(map(is_dropped, buffers))


def test_dropped_tensors_are_in_no_column(published: Pair) -> None:
    ours, _, rows, _ = published
    assert not [name for name in column(rows, "ldm") if is_dropped(name)]
    assert not [name for name in column(rows, "hub") if ours.canonical_hub_name(name) != name]


# --- Older spellings on the Hub ---------------------------------------------------------------------------------------

OLD_ATTENTION = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def old_attention(name: str) -> str:
    for modern, old in OLD_ATTENTION.items():
        name = name.replace(modern, old)
    return name


def write(folder: Path, fields: dict[str, Any], stem: str, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{stem}.safetensors")
    return folder


def assert_same_model(a: Model, b: Model) -> None:
    assert_equal_tensors(a.state_dict(), b.state_dict())


def test_vae_with_the_old_names_of_attention(tmp_path: Path) -> None:
    fields = json.loads((CONFIGS / "CompVis--stable-diffusion-v1-4/vae/config.json").read_text()) | SMALL_VAE
    modern = randomize(diffusers.AutoencoderKL.from_config(fields)).state_dict()
    old = {old_attention(name): tensor for name, tensor in modern.items()}
    assert len(old.keys() - modern.keys()) == 16  # two attentions, four layers each, weight and bias
    stem = "diffusion_pytorch_model"
    new_folder, old_folder = (write(tmp_path / k, fields, stem, v) for k, v in (("new", modern), ("old", old)))
    assert_same_model(AutoencoderKL.from_pretrained(old_folder), AutoencoderKL.from_pretrained(new_folder))
    theirs = diffusers.AutoencoderKL.from_pretrained(old_folder)
    ours = AutoencoderKL.from_pretrained(old_folder)
    assert_equal_tensors(
        translate(torch.nn.Module.state_dict(ours), ours.rows(), "ours", "hub"), dict(theirs.state_dict())
    )


@pytest.fixture
def text_encoder() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration of a small text encoder and its tensors as transformers 5 spells them, without a prefix."""
    path = CONFIGS / "runwayml--stable-diffusion-v1-5/text_encoder/config.json"
    fields = json.loads(path.read_text()) | SMALL_CLIP | {"num_hidden_layers": 2}
    return fields, dict(randomize(their_text_encoder(fields)).state_dict())


OLDER_TEXT_ENCODERS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "prefix": lambda bare: {f"text_model.{name}": tensor for name, tensor in bare.items()},
    "position_ids": lambda bare: bare | {"embeddings.position_ids": torch.arange(77)[None]},
    "prefix and position_ids": lambda bare: (
        {f"text_model.{name}": tensor for name, tensor in bare.items()}
        | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    ),
    "the text half of a whole CLIP": lambda bare: (
        {f"text_model.{name}": tensor for name, tensor in bare.items()}
        | {
            "text_projection.weight": torch.ones(8, 96),
            "visual_projection.weight": torch.ones(8, 12),
            "vision_model.embeddings.class_embedding": torch.ones(12),
            "vision_model.embeddings.position_ids": torch.arange(5)[None],
            "logit_scale": torch.tensor(4.6),
        }
    ),
}


@pytest.mark.parametrize("spelling", OLDER_TEXT_ENCODERS)
def test_older_spelling_of_a_text_encoder(
    spelling: str, text_encoder: tuple[dict[str, Any], dict[str, Tensor]], tmp_path: Path
) -> None:
    fields, bare = text_encoder
    new = CLIPTextModel.from_pretrained(write(tmp_path / "new", fields, "model", bare))
    other = OLDER_TEXT_ENCODERS[spelling](bare)
    old = CLIPTextModel.from_pretrained(write(tmp_path / "old", fields, "model", other))
    assert_same_model(old, new)
    prefixed = {f"text_model.{name}": tensor for name, tensor in bare.items()}
    assert_equal_tensors(translate(torch.nn.Module.state_dict(new), new.rows(), "ours", "hub"), prefixed)
    dropped = [name for name in other if CLIPTextModel.canonical_hub_name(name) is None]
    assert len(dropped) == len(other) - len(bare)


def test_dropped_tensors_of_text_encoders_have_reasons() -> None:
    assert all(CLIP_DROPPED.values())


def test_saved_names_are_the_modern_ones(
    text_encoder: tuple[dict[str, Any], dict[str, Tensor]], tmp_path: Path
) -> None:
    fields, bare = text_encoder
    folder = write(tmp_path / "old", fields, "model", OLDER_TEXT_ENCODERS["position_ids"](bare))
    CLIPTextModel.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert_equal_tensors(saved, {f"text_model.{name}": tensor for name, tensor in bare.items()})
    theirs = transformers.CLIPTextModel.from_pretrained(tmp_path / "saved")
    assert_equal_tensors(dict(theirs.state_dict()), bare)
