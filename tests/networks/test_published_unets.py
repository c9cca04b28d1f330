"""The UNets of published checkpoints besides the usual ones: pruned, few-step, upscaling, told a picture.

Each is built at full size without memory, and has every tensor that the reference's has, by name and shape; a narrow
one computes the same in float64. Which fields each has was read in the source named beside it.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from minidiff.checkpoints.load import OnMeta, expected_shapes
from minidiff.checkpoints.original.configs import PackagedConfigs
from minidiff.checkpoints.original.families import FAMILIES
from minidiff.networks.specs.unet import unet_config
from minidiff.networks.unet import UNet2DConditionModel
from tests.theirs import carry_over, diffusers, randomize, relative_error

BOUND = 1e-10  # measured: at most 4e-15

LIKE = {  # name -> (the packaged configuration that it is like, what it has otherwise, source)
    "SimianLuo/LCM_Dreamshaper_v7": (
        "stable-diffusion-v1-5",
        {"time_cond_proj_dim": 256, "sample_size": 96},
        "unet/config.json as copied to deinferno/LCM_Dreamshaper_v7-openvino (8943a6e) on the Hub",
    ),
    "latent-consistency/lcm-sdxl": (
        "stable-diffusion-xl-base-1.0",
        {"time_cond_proj_dim": 256},
        "unet/config.json as copied to Jingya/lcm-sdxl-neuronx; the width is the default of what it was trained with, "
        "examples/consistency_distillation/train_lcm_distill_sdxl_wds.py in huggingface/diffusers",
    ),
    "stabilityai/stable-diffusion-2-1-unclip": (
        "stable-diffusion-2-1",
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048},
        "ComfyUI, comfy/model_detection.py (commit 006dd0a), SD21_uncliph; the small one has 1536",
    ),
    "nota-ai/bk-sdm-small": (
        "small-sd",
        {"mid_block_type": None},
        "Nota-NetsPresso/BK-SDM, src/unet_config/bk_small/config.json; bk_base is small-sd, and bk_tiny tiny-sd",
    ),
}
NAMES = [*LIKE, *(f.configs[next(iter(f.configs))] for f in FAMILIES if f.left is not None or f.channels == 7)]


def fields_of(name: str) -> dict[str, Any]:
    like, changes, _ = LIKE.get(name, (name, {}, ""))
    return PackagedConfigs(like).read("unet/config.json") | changes


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_at_full_size(name: str) -> None:
    with OnMeta():
        ours = UNet2DConditionModel.from_config(fields_of(name))
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(fields_of(name))
    rows = ours.rows()
    expected = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    assert expected_shapes(ours, rows, "hub") == expected
    assert sum(torch.Size(shape).numel() for shape in expected.values()) == ours.num_parameters()
    assert len(expected_shapes(ours, rows, "ldm")) == len(expected)  # no two of one name


def narrow(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the same network an eighth as wide."""
    widths = [C // 8 for C in unet_config(fields).block_out_channels]
    fields = fields | {"block_out_channels": widths, "norm_num_groups": 4, "cross_attention_dim": 24}
    if fields.get("addition_embed_type"):
        fields |= {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 8 + 6 * 4}
    return fields


def told(model: UNet2DConditionModel) -> dict[str, Any]:
    """Return what a network is told besides time and text."""
    rng, spec = torch.Generator().manual_seed(2), model.spec

    def noise(width: int) -> Tensor:
        return torch.randn(2, width, generator=rng, dtype=torch.float64)

    found: dict[str, Any] = {}
    if spec.added is not None:
        found["added_cond_kwargs"] = {"text_embeds": noise(8), "time_ids": 64 * noise(6).round()}
    if spec.time_cond is not None:
        found["timestep_cond"] = noise(spec.time_cond)
    if spec.class_embed is not None:
        found["class_labels"] = torch.tensor([20, 350]) if spec.class_embed == "table" else noise(spec.class_width)
    return found


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_same_result_at_an_eighth_of_the_width(name: str) -> None:
    fields = narrow(fields_of(name))
    theirs = randomize(diffusers.UNet2DConditionModel.from_config(fields).double())
    with OnMeta():
        ours = UNet2DConditionModel.from_config(fields)
    ours = carry_over(theirs, ours)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, ours.config.in_channels, 8, 8, generator=rng, dtype=torch.float64)
    ctx = torch.randn(2, 5, 24, generator=rng, dtype=torch.float64)
    arguments = told(ours)
    expected = theirs(x, 481, ctx, **arguments).sample
    assert relative_error(ours(x, 481, ctx, **arguments).sample, expected) <= BOUND
