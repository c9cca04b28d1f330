"""``UNet2DConditionModel`` against the reference's, in float64, for every branch of the configuration."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import minidiff.fast
from minidiff.networks.layers import guidance_embedding
from minidiff.networks.unet import UNet2DConditionModel
from tests.theirs import assert_same_order, assert_same_start, carry_over, diffusers, randomize, relative_error

CONFIGS = Path(__file__).parents[1] / "data" / "hub_configs"
PUBLISHED = [
    "CompVis--stable-diffusion-v1-4",
    "runwayml--stable-diffusion-v1-5",
    "runwayml--stable-diffusion-inpainting",
    "stabilityai--stable-diffusion-2",
    "stabilityai--stable-diffusion-2-1",
    "stabilityai--stable-diffusion-2-1-base",
    "stabilityai--stable-diffusion-2-inpainting",
    "stabilityai--stable-diffusion-x4-upscaler",
]
BOUND = 1e-10  # measured: at most 4e-15 over all cases of this file

CROSS_DOWN, PLAIN_DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"


def tiny(**fields: Any) -> dict[str, Any]:
    """Return the fields of a two-level UNet, changed by ``fields``."""
    return {
        "block_out_channels": [8, 16],
        "down_block_types": [CROSS_DOWN, PLAIN_DOWN],
        "up_block_types": [PLAIN_UP, CROSS_UP],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 6,
        **fields,
    }


def three(down: str, up: str, **fields: Any) -> dict[str, Any]:
    """Return the fields of a three-level UNet with cross-attention where the letter is x, finest level first."""
    return tiny(
        block_out_channels=[8, 8, 16],
        down_block_types=[CROSS_DOWN if letter == "x" else PLAIN_DOWN for letter in down],
        up_block_types=[CROSS_UP if letter == "x" else PLAIN_UP for letter in reversed(up)],
        **fields,
    )


def make_pair(fields: dict[str, Any], seed: int = 0) -> tuple[UNet2DConditionModel, nn.Module]:
    """Build ours and theirs with the same large random float64 weights."""
    theirs = randomize(diffusers.UNet2DConditionModel.from_config(fields).double(), seed)
    with torch.device("meta"):
        ours = UNet2DConditionModel.from_config(fields)
    return carry_over(theirs, ours), theirs


def inputs(model: UNet2DConditionModel, B: int = 2, H: int = 8, W: int = 8, L: int = 5) -> tuple[Tensor, Tensor]:
    """Return a noisy latent and a text of the sizes that the model takes."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(B, model.config.in_channels, H, W, generator=rng, dtype=torch.float64)
    return x, torch.randn(B, L, model.spec.levels[-1].D_ctx, generator=rng, dtype=torch.float64)


def labels(model: UNet2DConditionModel, B: int = 2) -> dict[str, Tensor]:
    """Return labels of the kind that the model knows, as an argument of its forward; nothing if it knows none."""
    rng, width = torch.Generator().manual_seed(2), model.spec.class_width or model.spec.E
    match model.spec.class_embed:
        case None:
            return {}
        case "table" | "timestep":
            return {"class_labels": torch.randint(0, model.config.num_class_embeds, (B,), generator=rng)}
        case _:
            return {"class_labels": torch.randn(B, width, generator=rng, dtype=torch.float64)}


@torch.no_grad()
def error(ours: UNet2DConditionModel, theirs: nn.Module, x: Tensor, t: Any, ctx: Tensor) -> float:
    told = labels(ours, len(x))
    return relative_error(ours(x, t, ctx, **told).sample, theirs(x, t, encoder_hidden_states=ctx, **told).sample)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_topology_at_an_eighth_of_the_width(name: str) -> None:
    fields = json.loads((CONFIGS / name / "unet" / "config.json").read_text())
    widths = [C // 8 for C in fields["block_out_channels"]]
    fields |= {"block_out_channels": widths, "norm_num_groups": 4, "cross_attention_dim": 24}
    ours, theirs = make_pair(fields)
    x, ctx = inputs(ours)
    assert error(ours, theirs, x, 981, ctx) <= BOUND


BRANCHES = {
    "dropout, which evaluation ignores": tiny(dropout=0.3),
    "lists of what is not there": tiny(only_cross_attention=[False, False]),
    "the text alone": tiny(only_cross_attention=True),
    "the text alone at some levels": three("xxx", "xxx", only_cross_attention=[True, False, True]),
    "the text alone where nothing attends": three("-x-", "--x", only_cross_attention=(True, False, True)),
    "what is said of another kind of middle": tiny(mid_block_only_cross_attention=True),
    "classes in a table": tiny(num_class_embeds=9),
    "classes as times": tiny(class_embed_type="timestep", num_class_embeds=9),
    "classes given embedded": tiny(class_embed_type="identity"),
    "classes projected": tiny(class_embed_type="projection", projection_class_embeddings_input_dim=5),
    "classes projected simply": tiny(class_embed_type="simple_projection", projection_class_embeddings_input_dim=5),
    "classes beside the time": tiny(num_class_embeds=9, class_embeddings_concat=True),
    "classes given embedded beside the time": tiny(class_embed_type="identity", class_embeddings_concat=True),
    "first convolution 1x1": tiny(conv_in_kernel=1),
    "last convolution 5x5": tiny(conv_out_kernel=5),
    "convolutional projection": tiny(use_linear_projection=False),
    "linear projection": tiny(use_linear_projection=True),
    "heads one for all": tiny(attention_head_dim=4),
    "heads per level": tiny(attention_head_dim=[2, 8]),
    "heads that divide only the levels that attend": three("-xx", "-xx", attention_head_dim=[3, 2, 4]),
    "two residual blocks": tiny(layers_per_block=2),
    "residual blocks per level": three("xx-", "xx-", layers_per_block=[1, 3, 2]),
    "two transformer blocks": tiny(transformer_layers_per_block=2),
    "transformer blocks per level": three("xxx", "xxx", transformer_layers_per_block=[1, 2, 3]),
    "no transformer blocks where nothing attends": three("-xx", "-xx", transformer_layers_per_block=[0, 1, 2]),
    "text width per level": tiny(cross_attention_dim=[6, 6]),
    "text width of a level that does not attend": three("-xx", "-xx", cross_attention_dim=[5, 6, 6]),
    "downsample padding 0": tiny(downsample_padding=0),
    "downsample padding 1": tiny(downsample_padding=1),
    "sines first": tiny(flip_sin_to_cos=False),
    "frequency shift": tiny(freq_shift=1, flip_sin_to_cos=False),
    "odd width of the time embedding": tiny(block_out_channels=[9, 18], norm_num_groups=3, attention_head_dim=3),
    "centred input": tiny(center_input_sample=True),
    "another epsilon": tiny(norm_eps=0.1),
    "one group": tiny(norm_num_groups=1),
    "eight groups": tiny(norm_num_groups=8),
    "attention in float32 in the reference": tiny(upcast_attention=True),
    "nine channels in": tiny(in_channels=9),
    "eight channels out": tiny(out_channels=8),
    "one level": tiny(block_out_channels=[8], down_block_types=[CROSS_DOWN], up_block_types=[CROSS_UP]),
    "one level without attention": tiny(
        block_out_channels=[8], down_block_types=[PLAIN_DOWN], up_block_types=[PLAIN_UP]
    ),
    "attention only in the middle": three("---", "---"),
    "attention everywhere": three("xxx", "xxx"),
    "attention on the way down only": three("xx-", "---"),
    "attention on the way up only": three("---", "-xx"),
    "attention at other levels down and up": three("x--", "-x-"),
    "widths that fall": three("xxx", "xxx") | {"block_out_channels": [16, 8, 8]},
    "sample size": tiny(sample_size=[8, 6]),
    "told the guidance scale": tiny(time_cond_proj_dim=7),
    "no middle": tiny(mid_block_type=None),
    "a middle of one residual block": tiny(mid_block_type="UNetMidBlock2D"),
    "transformer blocks per residual block": three(
        "-xx",
        "xx-",
        layers_per_block=2,
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=[0, [1, 2], [2, 1]],
        reverse_transformer_layers_per_block=[[1, 2, 3], [2, 1, 1], 1],
    ),
    "the middle after a list": three(
        "-xx",
        "xx-",
        transformer_layers_per_block=[1, 2, [2]],
        reverse_transformer_layers_per_block=[[1, 2], 2, 1],
    ),
    "the middle after the first of a list": three(
        "-xx",
        "xx-",
        layers_per_block=2,
        transformer_layers_per_block=[1, 2, [3, 1]],
        reverse_transformer_layers_per_block=[2, 1, 1],
    ),
    "other transformer blocks on the way up": three(
        "xxx", "xxx", transformer_layers_per_block=[1, 2, 3], reverse_transformer_layers_per_block=[2, 1, 3]
    ),
}


@pytest.mark.parametrize("branch", BRANCHES)
def test_branch_of_the_configuration(branch: str) -> None:
    ours, theirs = make_pair(BRANCHES[branch])
    x, ctx = inputs(ours)
    assert error(ours, theirs, x, 501, ctx) <= BOUND


@pytest.mark.parametrize("branch", BRANCHES)
def test_new_weights(branch: str) -> None:
    """Initial weights are drawn as the reference draws them, and stand in its order."""
    fields = BRANCHES[branch]
    assert_same_start(
        lambda: UNet2DConditionModel.from_config(fields), lambda: diffusers.UNet2DConditionModel.from_config(fields)
    )
    with torch.device("meta"):
        assert_same_order(UNet2DConditionModel.from_config(fields), diffusers.UNet2DConditionModel.from_config(fields))


# An option that leaves the tensors as they are must change the result, or its parity case would show nothing.
@pytest.mark.parametrize(
    "option",
    [
        {"attention_head_dim": 4},
        {"downsample_padding": 0},
        {"flip_sin_to_cos": False},
        {"freq_shift": 1},
        {"center_input_sample": True},
        {"norm_eps": 0.1},
        {"norm_num_groups": 1},
    ],
    ids=str,
)
def test_option_changes_the_result(option: dict[str, Any]) -> None:
    ours, theirs = make_pair(tiny())
    other = carry_over(theirs, UNet2DConditionModel(**tiny(**option)))
    x, ctx = inputs(ours)
    with torch.no_grad():
        assert relative_error(other(x, 501, ctx).sample, ours(x, 501, ctx).sample) > 1e-4


@torch.no_grad()
def test_a_network_that_is_told_the_guidance_scale() -> None:
    ours, theirs = make_pair(tiny(time_cond_proj_dim=7))
    x, ctx = inputs(ours)
    w = torch.tensor([6.5, 0.25])
    told = {"timestep_cond": guidance_embedding(w, 7, dtype=torch.float64)}
    expected = theirs(x, 20, ctx, **told).sample
    assert relative_error(ours(x, 20, ctx, **told).sample, expected) <= BOUND
    assert relative_error(expected, theirs(x, 20, ctx).sample) > 0.01
    with pytest.raises(ValueError, match=r"timestep_cond should be \(2 or 1, 7\), found \(2, 8\)"):
        ours(x, 20, ctx, timestep_cond=torch.zeros(2, 8))
    with pytest.raises(ValueError, match="timestep_cond"):
        make_pair(tiny())[0](x, 20, ctx, **told)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [256, 7])
def test_encoded_guidance_scales_are_bit_equal(width: int, dtype: torch.dtype) -> None:
    w = torch.tensor([0.0, 0.5, 6.5, 7.123])
    expected = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding(None, w, width, dtype)
    assert torch.equal(guidance_embedding(w, width, dtype), expected)


MASKS = {"some": [[1, 1, 1, 0, 0], [1, 0, 1, 1, 0]], "all": [[1] * 5] * 2, "none": [[0] * 5] * 2}


@pytest.mark.parametrize("slices", [None, "max"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", MASKS)
@torch.no_grad()
def test_mask_of_the_text(
    kind: str, dtype: torch.dtype, slices: str | None, three_levels: tuple[UNet2DConditionModel, nn.Module]
) -> None:
    ours, theirs = copy.deepcopy(three_levels[0]), three_levels[1]
    ours.set_attention_slice(slices)
    x, ctx = inputs(ours)
    mask = torch.tensor(MASKS[kind]).to(dtype)
    expected = theirs(x, 20, ctx, encoder_attention_mask=mask).sample
    assert relative_error(ours(x, 20, ctx, encoder_attention_mask=mask).sample, expected) <= BOUND
    assert (relative_error(expected, theirs(x, 20, ctx).sample) > 1e-3) == (kind == "some")
    minidiff.fast.optimize(ours)
    assert relative_error(ours(x, 20, ctx, encoder_attention_mask=mask).sample, expected) <= BOUND
    with pytest.raises(ValueError, match=r"encoder_attention_mask should be \(2, 5\).*found \(2, 4\)"):
        ours(x, 20, ctx, encoder_attention_mask=mask[:, 1:])


@pytest.fixture(scope="module")
def three_levels() -> tuple[UNet2DConditionModel, nn.Module]:
    return make_pair(three("xx-", "xx-"))


TIMES = {
    "integer": 981,
    "zero": 0,
    "fraction": 17.25,
    "0-d integer": torch.tensor(481),
    "0-d float64": torch.tensor(123.456, dtype=torch.float64),
    "one element": torch.tensor([7]),
    "one per sample": torch.tensor([1, 500, 999]),
    "one fraction per sample": torch.tensor([0.5, 500.25, 998.75]),
}


@pytest.mark.parametrize("kind", TIMES)
def test_timestep(kind: str, three_levels: tuple[UNet2DConditionModel, nn.Module]) -> None:
    x, ctx = inputs(three_levels[0], B=3)
    assert error(*three_levels, x, TIMES[kind], ctx) <= BOUND


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(("H", "W"), [(9, 13), (5, 7), (6, 10), (4, 4), (3, 16)])
def test_size_that_does_not_halve_evenly(H: int, W: int, padding: int) -> None:
    ours, theirs = make_pair(tiny(downsample_padding=padding) | {"block_out_channels": [8, 16]})
    x, ctx = inputs(ours, H=H, W=W)
    assert error(ours, theirs, x, 20, ctx) <= BOUND


@pytest.mark.parametrize(("B", "H", "W", "L"), [(1, 9, 13, 77), (3, 5, 7, 1), (2, 1, 1, 5), (1, 1, 6, 3), (1, 2, 3, 2)])
def test_sizes_of_a_three_level_network(
    B: int, H: int, W: int, L: int, three_levels: tuple[UNet2DConditionModel, nn.Module]
) -> None:
    x, ctx = inputs(three_levels[0], B, H, W, L)
    assert error(*three_levels, x, 20, ctx) <= BOUND


def test_output_record(three_levels: tuple[UNet2DConditionModel, nn.Module]) -> None:
    ours, theirs = three_levels
    x, ctx = inputs(ours)
    for model in (ours, theirs):  # the forms that code written for the reference uses
        with torch.no_grad():
            record = model(x, 20, encoder_hidden_states=ctx)
            (sample,) = model(x, 20, ctx, return_dict=False)
        assert torch.equal(record.sample, sample)
        assert torch.equal(record[0], sample) and torch.equal(record["sample"], sample)
        assert type(record).__name__ == "UNet2DConditionOutput"


@pytest.mark.parametrize("fields", [tiny(), tiny(use_linear_projection=True)], ids=["conv", "linear"])
@torch.no_grad()
def test_no_tensor_is_ignored_or_swapped(fields: dict[str, Any]) -> None:
    """Disturb each tensor of the reference, and its counterpart here: both outputs move, and by the same amount."""
    ours, theirs = make_pair(fields)
    ours = copy.deepcopy(ours)  # weights of its own
    x, ctx = inputs(ours, B=1, H=4, W=6, L=3)
    t = 333
    still = ours(x, t, ctx).sample
    rng = torch.Generator().manual_seed(2)
    mine, reference = torch.nn.Module.state_dict(ours), theirs.state_dict()
    for row in ours.rows():
        (our_name,), (hub_name,) = row.ours, row.hub
        delta = 0.1 * torch.randn(reference[hub_name].shape, generator=rng, dtype=torch.float64)
        (our_delta,) = row.hub_op.to_ours((delta,))
        mine[our_name] += our_delta
        reference[hub_name] += delta
        moved = ours(x, t, ctx).sample
        assert relative_error(moved, still) > 1e-4, our_name  # the smallest: 4e-3
        assert relative_error(moved, theirs(x, t, ctx).sample) <= BOUND, (our_name, hub_name)
        mine[our_name] -= our_delta
        reference[hub_name] -= delta


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)],  # measured: 3.4e-3 and 2.4e-2, to the reference and to float64
    ids=str,
)
@torch.no_grad()
def test_half_precision(dtype: torch.dtype, bound: float) -> None:
    ours, theirs = make_pair(three("xx-", "xx-", upcast_attention=True))
    x, ctx = inputs(ours)
    exact = ours(x, 20, ctx).sample
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    x, ctx = x.to(dtype), ctx.to(dtype)
    out = ours(x, 20, ctx).sample
    assert out.dtype == dtype
    assert relative_error(out, theirs(x, 20, ctx).sample) <= bound
    assert relative_error(out, exact) <= bound


@pytest.mark.parametrize(("samples", "texts"), [(1, 2), (2, 4), (2, 1), (3, 2)])
def test_each_sample_has_its_text(samples: int, texts: int) -> None:
    """Twice as many texts once made two pictures of one."""
    ours, theirs = make_pair(tiny())
    x, ctx = inputs(ours, B=samples)[0], inputs(ours, B=texts)[1]
    with pytest.raises(RuntimeError, match="must match"):
        theirs(x, 3, encoder_hidden_states=ctx)
    with pytest.raises(ValueError, match=rf"encoder_hidden_states should be \({samples}, L, "):
        ours(x, 3, ctx)


def test_dropout_in_training() -> None:
    """In residual blocks alone, as in the reference; without attention, see ``test_unet_unconditional``."""
    plain = {"down_block_types": [PLAIN_DOWN] * 2, "up_block_types": [PLAIN_UP] * 2, "layers_per_block": 1}
    ours, theirs = make_pair(tiny(dropout=0.3, **plain))
    assert ours.config.dropout == ours.spec.dropout == theirs.config.dropout == 0.3
    x, ctx = inputs(ours)
    outs = []
    for model in (ours, theirs):
        torch.manual_seed(5)
        with torch.no_grad():
            outs.append(model.train()(x, 501, ctx).sample)
    with torch.no_grad():
        assert relative_error(ours.eval()(x, 501, ctx).sample, outs[0]) > 0.01
    assert relative_error(*outs) < BOUND  # measured: 7e-16
