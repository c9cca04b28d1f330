"""The networks of Stable Diffusion XL against the reference's, in float64: the UNets and the second text encoder."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minidiff import CLIPTextModelWithProjection, UNet2DConditionModel
from tests.theirs import (
    assert_same_order,
    assert_same_start,
    carry_over,
    diffusers,
    randomize,
    relative_error,
    transformers,
)

CONFIGS = Path(__file__).parents[1] / "data" / "hub_configs"
BOUND = 1e-10  # measured: at most 1.1e-15 over all cases of this file

POOLED, FEATURES = 12, 8  # width of the pooled text, and of each encoded size
BASE = {"block_out_channels": [20, 40, 80], "projection_class_embeddings_input_dim": POOLED + 6 * FEATURES}
REFINER = {"block_out_channels": [24, 48, 96, 96], "projection_class_embeddings_input_dim": POOLED + 5 * FEATURES}
UNETS = {  # published topology -> what makes it small
    "stabilityai--stable-diffusion-xl-base-1.0": BASE,
    "stabilityai--stable-diffusion-xl-refiner-1.0": REFINER,
    "stabilityai--sdxl-turbo": BASE,
    "diffusers--stable-diffusion-xl-1.0-inpainting-0.1": BASE,
}


def read(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / name / "config.json").read_text())


def make_unets(fields: dict[str, Any]) -> tuple[UNet2DConditionModel, nn.Module]:
    """Build ours and theirs with the same large random float64 weights."""
    theirs = randomize(diffusers.UNet2DConditionModel.from_config(fields).double())
    with torch.device("meta"):
        ours = UNet2DConditionModel.from_config(fields)
    return carry_over(theirs, ours), theirs


def tiny(**fields: Any) -> dict[str, Any]:
    """Return the fields of a one-level UNet with added conditions, changed by ``fields``."""
    return {
        "block_out_channels": [8],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 6,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": FEATURES,
        "projection_class_embeddings_input_dim": POOLED + 6 * FEATURES,
        **fields,
    }


def inputs(model: UNet2DConditionModel, B: int = 2) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return a noisy latent, a text, and the added conditions: pooled text and sizes."""
    rng = torch.Generator().manual_seed(1)
    count = (model.spec.added - POOLED) // model.spec.added_features
    x, ctx, pooled = (
        torch.randn(*shape, generator=rng, dtype=torch.float64)
        for shape in ((B, model.config.in_channels, 8, 12), (B, 5, model.spec.levels[-1].D_ctx), (B, POOLED))
    )
    ids = torch.randint(0, 1400, (B, count), generator=rng).double() + 0.5
    return x, ctx, {"text_embeds": pooled, "time_ids": ids}


@torch.no_grad()
def unet_error(ours: UNet2DConditionModel, theirs: nn.Module, t: Any, inputs: tuple[Any, ...]) -> float:
    x, ctx, added = inputs
    expected = theirs(x, t, encoder_hidden_states=ctx, added_cond_kwargs=added).sample
    return relative_error(ours(x, t, encoder_hidden_states=ctx, added_cond_kwargs=added).sample, expected)


@pytest.mark.parametrize("name", UNETS)
def test_published_unet_topology_made_narrow(name: str) -> None:
    fields = read(f"{name}/unet") | {"norm_num_groups": 4, "cross_attention_dim": 24, "addition_time_embed_dim": 8}
    ours, theirs = make_unets(fields | UNETS[name])
    assert unet_error(ours, theirs, 981, inputs(ours)) <= BOUND


BRANCHES = {
    "sines first": tiny(flip_sin_to_cos=False),
    "frequency shift": tiny(freq_shift=1, flip_sin_to_cos=False),
    "odd width of an encoded size": tiny(
        addition_time_embed_dim=7, projection_class_embeddings_input_dim=POOLED + 6 * 7
    ),
    "one size": tiny(projection_class_embeddings_input_dim=POOLED + FEATURES),
}


@pytest.mark.parametrize("branch", BRANCHES)
def test_branch_of_the_added_condition(branch: str) -> None:
    ours, theirs = make_unets(BRANCHES[branch])
    assert unet_error(ours, theirs, 501, inputs(ours)) <= BOUND


@pytest.mark.parametrize("branch", BRANCHES)
def test_new_weights(branch: str) -> None:
    """Initial weights are drawn as the reference draws them, and stand in its order."""
    fields = BRANCHES[branch]
    assert_same_start(
        lambda: UNet2DConditionModel.from_config(fields), lambda: diffusers.UNet2DConditionModel.from_config(fields)
    )
    with torch.device("meta"):
        assert_same_order(UNet2DConditionModel.from_config(fields), diffusers.UNet2DConditionModel.from_config(fields))


@torch.no_grad()
def test_every_added_condition_shows() -> None:
    ours, _ = make_unets(tiny())
    x, ctx, added = inputs(ours, B=1)
    still = ours(x, 20, ctx, added_cond_kwargs=added).sample
    for name, k in [("text_embeds", POOLED - 1), *(("time_ids", k) for k in range(6))]:
        other = {key: tensor.clone() for key, tensor in added.items()}
        other[name][0, k] += 1
        assert relative_error(ours(x, 20, ctx, added_cond_kwargs=other).sample, still) > 1e-4, (name, k)


@torch.no_grad()
def test_added_conditions_in_half_precision() -> None:
    ours, theirs = make_unets(tiny())
    x, ctx, added = inputs(ours)
    ours, theirs = ours.to(torch.bfloat16), theirs.to(torch.bfloat16)
    x, ctx = x.bfloat16(), ctx.bfloat16()
    added = {name: tensor.bfloat16() for name, tensor in added.items()}
    # Measured: 1.4e-2, which is the precision of bfloat16 (2^-8) after a dozen layers.
    assert unet_error(ours, theirs, 20, (x, ctx, added)) <= 2e-2


# --- Text encoder ----------------------------------------------------------------------------------------------------

EOS = 40


def small(**fields: Any) -> dict[str, Any]:
    return {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 12,
        "bos_token_id": 0,
        "eos_token_id": EOS,
        "projection_dim": 10,
        "hidden_act": "gelu",
        **fields,
    }


def make_encoders(fields: dict[str, Any]) -> tuple[CLIPTextModelWithProjection, nn.Module]:
    """Build ours and theirs with the same large random float64 weights."""
    config = transformers.CLIPTextConfig(**fields)
    theirs = randomize(transformers.CLIPTextModelWithProjection(config).double())
    with torch.device("meta"):
        ours = CLIPTextModelWithProjection.from_config(fields)
    return carry_over(theirs, ours), theirs


def texts(L: int = 12) -> Tensor:
    """Return (2, L) random ids of ordinary tokens; the end of text stands at other places in each."""
    ids = torch.randint(1, EOS, (2, L), generator=torch.Generator().manual_seed(1))
    ids[0, L // 2 :], ids[1, L // 3 :] = EOS, EOS
    return ids


@torch.no_grad()
def assert_equal_encodings(ours: CLIPTextModelWithProjection, theirs: nn.Module, ids: Tensor) -> None:
    a, b = (model(ids, output_hidden_states=True) for model in (ours, theirs))
    assert relative_error(a.text_embeds, b.text_embeds) <= BOUND
    assert relative_error(a[0], b[0]) <= BOUND  # the first of the record is the pooled embedding, as pipelines expect
    assert relative_error(a.last_hidden_state, b.last_hidden_state) <= BOUND
    for state, other in zip(a.hidden_states, b.hidden_states, strict=True):
        assert relative_error(state, other) <= BOUND
    assert relative_error(ours(ids, return_dict=False)[0], theirs(ids, return_dict=False)[0]) <= BOUND


@pytest.mark.parametrize("family", ["base", "refiner"])
def test_published_second_text_encoder_made_narrow(family: str) -> None:
    fields = read(f"stabilityai--stable-diffusion-xl-{family}-1.0/text_encoder_2")
    ours, theirs = make_encoders(fields | {"hidden_size": 40, "intermediate_size": 80, "vocab_size": 50})
    assert_equal_encodings(ours, theirs, texts(77))


@pytest.mark.parametrize("fields", [{}, {"hidden_act": "quick_gelu"}, {"eos_token_id": 2}, {"projection_dim": 24}])
def test_branch_of_the_second_text_encoder(fields: dict[str, Any]) -> None:
    ours, theirs = make_encoders(small(**fields))
    assert_equal_encodings(ours, theirs, texts())


def test_projection_is_loaded_and_saved_as_the_reference_does(tmp_path: Path) -> None:
    _, theirs = make_encoders(small())
    theirs = copy.deepcopy(theirs).float()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = CLIPTextModelWithProjection.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    saved, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    again = transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path / "ours")
    assert torch.equal(again.text_projection.weight, ours.text_projection.weight)
    fields = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert fields["architectures"] == ["CLIPTextModelWithProjection"] and fields["projection_dim"] == 10
