"""``UNet2DModel`` against the reference's, in float64, for every branch of the configuration."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minidiff.checkpoints.remap import translate
from minidiff.errors import CheckpointError, ConfigError
from minidiff.networks.specs.unet_unconditional import unconditional_unet_config
from minidiff.networks.unet_unconditional import UNet2DModel
from tests.theirs import assert_same_order, assert_same_start, carry_over, diffusers, randomize, relative_error

CONFIGS = Path(__file__).parents[1] / "data" / "hub_configs"
PUBLISHED = ["google--ddpm-cat-256", "google--ddpm-celebahq-256", "google--ddpm-cifar10-32"]
BOUND = 1e-10  # measured: at most 2e-15 over all cases of this file

DOWN = {"-": "DownBlock2D", "a": "AttnDownBlock2D", "r": "ResnetDownsampleBlock2D"}
UP = {"-": "UpBlock2D", "a": "AttnUpBlock2D", "r": "ResnetUpsampleBlock2D"}


def tiny(down: str = "-a", up: str | None = None, **fields: Any) -> dict[str, Any]:
    """Return the fields of a small UNet: a letter of ``DOWN`` and ``UP`` per level, the finest first."""
    return {
        "block_out_channels": [8, 16, 16][: len(down)],
        "down_block_types": [DOWN[letter] for letter in down],
        "up_block_types": [UP[letter] for letter in reversed(up or down)],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        **fields,
    }


def published(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / name / "config.json").read_text())


def their_model(fields: dict[str, Any], seed: int = 0) -> nn.Module:
    theirs = randomize(diffusers.UNet2DModel.from_config(fields).double(), seed)
    if fields.get("class_embed_type") == "timestep":
        # The reference feeds the float32 encoding of the labels to layers of any dtype, which fails unless float32.
        theirs.class_embedding.register_forward_pre_hook(lambda _, arguments: (arguments[0].double(),))
    return theirs


def make_pair(fields: dict[str, Any], seed: int = 0) -> tuple[UNet2DModel, nn.Module]:
    """Build ours and theirs with the same large random float64 weights."""
    theirs = their_model(fields, seed)
    with torch.device("meta"):
        ours = UNet2DModel.from_config(fields)
    return carry_over(theirs, ours), theirs


def noisy(B: int = 2, C: int = 3, H: int = 8, W: int = 8) -> Tensor:
    return torch.randn(B, C, H, W, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def error(ours: UNet2DModel, theirs: nn.Module, x: Tensor, t: Any, labels: Tensor | None = None) -> float:
    return relative_error(ours(x, t, labels).sample, theirs(x, t, labels).sample)


@pytest.mark.parametrize("heads", [{}, {"attention_head_dim": 8}], ids=["one head", "heads of width 8"])
@pytest.mark.parametrize("name", ["google--ddpm-cat-256", "google--ddpm-cifar10-32"])  # celebahq is as cat
def test_published_topology_at_an_eighth_of_the_width(name: str, heads: dict[str, Any]) -> None:
    fields = published(name) | heads
    fields |= {"block_out_channels": [C // 8 for C in fields["block_out_channels"]], "norm_num_groups": 4}
    ours, theirs = make_pair(fields)
    size = 2 ** (len(fields["block_out_channels"]) - 1)
    assert error(ours, theirs, noisy(B=1, H=size, W=size), 981) <= BOUND


BRANCHES = {
    "no attention": tiny("--"),
    "attention everywhere": tiny("aa"),
    "attention on the way down only": tiny("-a", "--"),
    "attention on the way up only": tiny("--", "-a"),
    "attention at the finest level": tiny("a-"),
    "no attention in the middle": tiny(add_attention=False),
    "no middle": tiny(mid_block_type=None),
    "one head": tiny("aa", attention_head_dim=None),
    "heads of width 2": tiny("aa", attention_head_dim=2),
    "heads of a width that does not divide the channels": tiny("aa", attention_head_dim=3),
    "one head that is narrower than the channels": tiny("aa", block_out_channels=[8, 12], attention_head_dim=7),
    "a width of heads that divides only the levels that attend": tiny(attention_head_dim=16),
    "downsample padding 0": tiny("---", downsample_padding=0),
    "downsample padding 0 with attention": tiny("aa-", downsample_padding=0),
    "residual blocks that resize": tiny("rr-"),
    "residual blocks that resize at the coarsest level": tiny("-r"),
    "residual blocks down, convolutions up": tiny("r--", "---"),
    "convolutions down, residual blocks up": tiny("---", "-rr"),
    "attention and residual blocks down": tiny("aa-", downsample_type="resnet"),
    "attention and residual blocks up": tiny("aaa", upsample_type="resnet"),
    "up/downsample type of blocks without attention": tiny("--", downsample_type="resnet", upsample_type="resnet"),
    "every kind of block": tiny("ar-", "-ra", downsample_type="resnet"),
    "names of 2022": tiny() | {"down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"]},
    "scale and shift": tiny("-ra", resnet_time_scale_shift="scale_shift"),
    "scale and shift, no attention": tiny("--", resnet_time_scale_shift="scale_shift", add_attention=False),
    "groups of the middle": tiny(attn_norm_num_groups=8),
    "groups of the middle, scale and shift": tiny(attn_norm_num_groups=2, resnet_time_scale_shift="scale_shift"),
    "scale of the middle": tiny(mid_block_scale_factor=1.5),
    "scale of the middle, square root": tiny(mid_block_scale_factor=2**0.5, add_attention=False),
    "sines first": tiny(flip_sin_to_cos=False),
    "frequency shift": tiny(flip_sin_to_cos=False, freq_shift=1),
    "odd width of the time encoding": tiny(block_out_channels=[9, 18], norm_num_groups=3, attention_head_dim=9),
    "fourier": tiny(time_embedding_type="fourier"),
    "learned": tiny(time_embedding_type="learned", num_train_timesteps=600),
    "width of the time embedding": tiny(time_embedding_dim=20),
    "training steps unused": tiny(num_train_timesteps=10),
    "centred input": tiny(center_input_sample=True),
    "swish": tiny(act_fn="swish"),
    "another epsilon": tiny("-a", norm_eps=0.1),
    "one group": tiny(norm_num_groups=1),
    "two residual blocks": tiny("-a", layers_per_block=2),
    "one level": tiny("-"),
    "one level with attention": tiny("a"),
    "widths that fall": tiny("-a-", "a--") | {"block_out_channels": [16, 8, 8]},
    "one channel in, two out": tiny(in_channels=1, out_channels=2),
    "sample size": tiny(sample_size=[8, 6]),
    "dropout, which evaluation ignores": tiny(dropout=0.3),
}


@pytest.mark.parametrize("branch", BRANCHES)
def test_branch_of_the_configuration(branch: str) -> None:
    ours, theirs = make_pair(BRANCHES[branch])
    assert error(ours, theirs, noisy(C=ours.config.in_channels), 501) <= BOUND


@pytest.mark.parametrize("branch", BRANCHES)
def test_new_weights(branch: str) -> None:
    """Initial weights are drawn as the reference draws them, and stand in its order."""
    fields = BRANCHES[branch]
    assert_same_start(lambda: UNet2DModel.from_config(fields), lambda: diffusers.UNet2DModel.from_config(fields))
    with torch.device("meta"):
        assert_same_order(UNet2DModel.from_config(fields), diffusers.UNet2DModel.from_config(fields))


def test_defaults_of_the_class() -> None:
    small = {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4}
    ours, theirs = make_pair(small)
    assert error(ours, theirs, noisy(), 501) <= BOUND
    with torch.device("meta"):
        config = diffusers.UNet2DModel().config
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if not k.startswith("_")}
    assert dict(unconditional_unet_config({})) == plain


# An option that leaves the tensors as they are must change the result, or its parity case would show nothing.
@pytest.mark.parametrize(
    "option",
    [
        {"attention_head_dim": 4},
        {"attention_head_dim": None},
        {"downsample_padding": 0},
        {"flip_sin_to_cos": False},
        {"freq_shift": 1},
        {"center_input_sample": True},
        {"mid_block_scale_factor": 1.5},
        {"norm_eps": 0.1},
        {"norm_num_groups": 1},
        {"attn_norm_num_groups": 1},
    ],
    ids=str,
)
def test_option_changes_the_result(option: dict[str, Any]) -> None:
    ours, theirs = make_pair(tiny())
    other = carry_over(theirs, UNet2DModel(**tiny(**option)))
    x = noisy()
    with torch.no_grad():
        assert relative_error(other(x, 501).sample, ours(x, 501).sample) > 1e-4


def test_dropout_in_training() -> None:
    """The masks are drawn from torch's global generator, in the reference's order, behind attention too."""
    pair = make_pair(tiny("ra", dropout=0.3))
    outs = []
    for model in pair:
        torch.manual_seed(5)
        with torch.no_grad():
            outs.append(model.train()(noisy(), 501).sample)
    assert relative_error(*outs) <= BOUND
    with torch.no_grad():
        assert relative_error(pair[0].eval()(noisy(), 501).sample, outs[0]) > 0.1


# --- Time and class ---------------------------------------------------------------------------------------------------

TIMES = {
    "integer": 481,
    "whole float": 481.0,
    "0-d integer": torch.tensor(481),
    "0-d float64": torch.tensor(123.456, dtype=torch.float64),
    "one element": torch.tensor([7]),
    "one per sample": torch.tensor([1, 500, 599]),
    "one fraction per sample": torch.tensor([0.5, 500.25, 598.75]),
}


@pytest.mark.parametrize("embedding", ["positional", "fourier", "learned"])
@pytest.mark.parametrize("kind", TIMES)
def test_timestep(kind: str, embedding: str) -> None:
    t = TIMES[kind]
    ours, theirs = make_pair(tiny("-", time_embedding_type=embedding, num_train_timesteps=600))
    if embedding == "learned" and isinstance(t, Tensor) and t.is_floating_point():
        with pytest.raises(TypeError, match="timestep should be integers from 0 to 599"):
            ours(noisy(B=3), t)
    else:
        assert error(ours, theirs, noisy(B=3), t) <= BOUND


LABELS = torch.tensor([3, 0])
CLASSES = {
    "table": (tiny(num_class_embeds=5), LABELS),
    "table, one class for all": (tiny(num_class_embeds=5), LABELS[:1]),
    "timestep": (tiny(class_embed_type="timestep"), torch.tensor([3.5, 0])),
    "timestep, table unused": (tiny(class_embed_type="timestep", num_class_embeds=5), LABELS),
    "timestep, fourier": (tiny(class_embed_type="timestep", time_embedding_type="fourier"), torch.tensor([2, 7])),
    "timestep, learned": (
        tiny(class_embed_type="timestep", time_embedding_type="learned", num_train_timesteps=600),
        LABELS,
    ),
    "identity": (tiny(class_embed_type="identity"), noisy(2, 32, 1, 1)[:, :, 0, 0]),
    "identity, width": (tiny(class_embed_type="identity", time_embedding_dim=12), noisy(2, 12, 1, 1)[:, :, 0, 0]),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_class(kind: str) -> None:
    fields, labels = CLASSES[kind]
    ours, theirs = make_pair(fields)
    assert error(ours, theirs, noisy(), 501, labels) <= BOUND
    with torch.no_grad():
        assert relative_error(ours(noisy(), 501, labels + 1).sample, ours(noisy(), 501, labels).sample) > 1e-4


def test_fourier_frequencies_are_saved_and_not_trained() -> None:
    torch.manual_seed(0)
    ours = UNet2DModel(**tiny("-", block_out_channels=[512], time_embedding_type="fourier"))
    assert ours.time_proj.weight.std().item() == pytest.approx(16, rel=0.1)  # of 512 draws; measured: 15.9
    theirs = diffusers.UNet2DModel(**tiny("-", block_out_channels=[512], time_embedding_type="fourier"))
    for trainable in (False, True):
        assert ours.num_parameters(trainable) == theirs.num_parameters(trainable)


# --- Sizes, records, dtypes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(("B", "H", "W"), [(1, 8, 8), (3, 4, 12), (2, 9, 13), (1, 6, 5), (1, 12, 7)])
def test_any_size(B: int, H: int, W: int, padding: int) -> None:
    """The reference's ``UNet2DModel`` fails on sizes that do not halve evenly; its other UNet of the same blocks does
    not, and comes up to the size of the skip."""
    fields = tiny("---", downsample_padding=padding, mid_block_type=None)
    conditional = fields | {"in_channels": 3, "out_channels": 3}
    theirs = randomize(diffusers.UNet2DConditionModel.from_config(conditional).double())
    with torch.device("meta"):
        ours = UNet2DModel.from_config(fields)
    ours = carry_over(theirs, ours)
    x = noisy(B, 3, H, W)
    with torch.no_grad():
        assert relative_error(ours(x, 20).sample, theirs(x, 20, encoder_hidden_states=None).sample) <= BOUND


@pytest.mark.parametrize("down", ["rr-", "aa-", "-a-"])
def test_any_size_with_every_kind_of_block(down: str) -> None:
    """Here the reference cannot be asked: it fails."""
    ours, theirs = make_pair(tiny(down, downsample_type="resnet", upsample_type="resnet"))
    with torch.no_grad():
        assert ours(noisy(H=9, W=11), 20).sample.shape == (2, 3, 9, 11)
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            theirs(noisy(H=9, W=11), 20)


def test_output_record() -> None:
    for model in make_pair(tiny("-")):  # the forms that code written for the reference uses
        with torch.no_grad():
            record = model(noisy(), 20)
            (sample,) = model(noisy(), timestep=20, return_dict=False)
        assert torch.equal(record.sample, sample)
        assert torch.equal(record[0], sample) and torch.equal(record["sample"], sample)
        assert type(record).__name__ == "UNet2DOutput"


@pytest.mark.parametrize("embedding", ["positional", "fourier"])
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)],  # measured to float64: 2e-3 and 1.5e-2; to the reference: 0
    ids=str,
)
@torch.no_grad()
def test_half_precision(dtype: torch.dtype, bound: float, embedding: str) -> None:
    ours, theirs = make_pair(tiny("-ra", time_embedding_type=embedding))
    exact = ours(noisy(), 20).sample
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    out = ours(noisy().to(dtype), 20).sample
    assert out.dtype == dtype
    assert relative_error(out, theirs(noisy().to(dtype), 20).sample) <= bound
    assert relative_error(out, exact) <= bound


# --- Names and files --------------------------------------------------------------------------------------------------

EVERYTHING = [
    tiny("ar-", "-ra", downsample_type="resnet", time_embedding_type="fourier", num_class_embeds=5),
    tiny("-a", class_embed_type="timestep", resnet_time_scale_shift="scale_shift", attn_norm_num_groups=2),
]


@pytest.mark.parametrize("fields", EVERYTHING, ids=["fourier", "scale_shift"])
@torch.no_grad()
def test_no_tensor_is_ignored_or_swapped(fields: dict[str, Any]) -> None:
    """Disturb each tensor of the reference, and its counterpart here: both outputs move, and by the same amount."""
    ours, theirs = make_pair(fields)
    ours = copy.deepcopy(ours)  # weights of its own
    x, t, labels = noisy(1), 333, torch.tensor([3])
    still = ours(x, t, labels).sample
    rng = torch.Generator().manual_seed(2)
    mine, reference = torch.nn.Module.state_dict(ours), theirs.state_dict()
    for row in ours.rows():
        (our_name,), (hub_name,) = row.ours, row.hub
        delta = 0.1 * torch.randn(reference[hub_name].shape, generator=rng, dtype=torch.float64)
        mine[our_name] += delta
        reference[hub_name] += delta
        moved = ours(x, t, labels).sample
        if ".self_attn.k.bias" in our_name:  # adds the same to every score of a query, which the softmax takes away
            assert relative_error(moved, still) < 1e-12
        else:
            assert relative_error(moved, still) > 1e-4, our_name  # the smallest: 2e-3
        assert relative_error(moved, theirs(x, t, labels).sample) <= BOUND, (our_name, hub_name)
        mine[our_name] -= delta
        reference[hub_name] -= delta


@pytest.mark.parametrize("fields", EVERYTHING, ids=["fourier", "scale_shift"])
def test_gradients(fields: dict[str, Any]) -> None:
    ours, theirs = make_pair(fields)
    for model in (ours, theirs):
        model(noisy(), 333, LABELS + 1).sample.square().mean().backward()
    mine, reference = torch.nn.Module.state_dict(ours, keep_vars=True), dict(theirs.named_parameters())
    for row in ours.rows():
        (our_name,), (hub_name,) = row.ours, row.hub
        if our_name == "time_proj.weight" and mine[our_name].grad is reference[hub_name].grad is None:
            continue  # the random frequencies are not trained
        expected = reference[hub_name].grad
        # Relative, except to a gradient that is 0 up to rounding (biases of k, and those that a norm takes away).
        bound = BOUND * max(expected.norm().item(), 1e-3)
        assert (mine[our_name].grad - expected).norm().item() <= bound, our_name


@pytest.mark.parametrize("name", PUBLISHED)
def test_laws_of_the_name_table(name: str) -> None:
    fields = published(name)
    with torch.device("meta"):
        ours, theirs = UNet2DModel.from_config(fields), diffusers.UNet2DModel.from_config(fields)
    rows, state = ours.rows(), torch.nn.Module.state_dict(ours)
    for spelling, expected in (("ours", state), ("hub", theirs.state_dict()), ("ldm", theirs.state_dict())):
        names = [one for row in rows for one in row.names(spelling)]
        assert len(set(names)) == len(names) and set(names) == expected.keys()
        moved = translate(state, rows, "ours", spelling)
        assert {k: v.shape for k, v in moved.items()} == {k: v.shape for k, v in expected.items()}


OLD_ATTENTION = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def old(name: str) -> str:
    for modern, spelling in OLD_ATTENTION.items():
        name = name.replace(modern, spelling)
    return name


def test_file_with_the_old_names_of_attention(tmp_path: Path) -> None:
    """Published DDPM checkpoints are of this age: old names of attention, few fields, an old version."""
    fields = published("google--ddpm-cifar10-32")
    fields |= {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4}
    theirs = their_model(fields).float()
    tensors = {old(name): tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    assert sum(name not in theirs.state_dict() for name in tensors) == 8 * 6  # 2 + 1 + 3 attentions
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours = UNet2DModel.from_pretrained(tmp_path)
    reference = diffusers.UNet2DModel.from_pretrained(tmp_path)
    assert ours.config.attention_head_dim is None
    assert error(ours.double(), reference.double(), noisy(), 501) <= BOUND


@pytest.mark.parametrize("fields", EVERYTHING, ids=["fourier", "scale_shift"])
def test_files_both_ways(fields: dict[str, Any], tmp_path: Path) -> None:
    theirs = their_model(fields).float()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = UNet2DModel.from_pretrained(tmp_path / "theirs")
    assert not ours.training and ours.dtype == torch.float32
    ours.save_pretrained(tmp_path / "ours")
    a, b = (load_file(tmp_path / who / "diffusion_pytorch_model.safetensors") for who in ("ours", "theirs"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    written, original = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("ours", "theirs"))
    assert {k: v for k, v in original.items() if k != "_name_or_path"} == written
    again = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    UNet2DModel(**tiny()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"add_attention": False}))
    with pytest.raises(CheckpointError, match=r"10 unexpected:\n  mid_block.attentions.0.group_norm.bias"):
        UNet2DModel.from_pretrained(tmp_path)
    path.write_text(json.dumps(config | {"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(ConfigError, match="describes a UNet2DConditionModel, not a UNet2DModel"):
        UNet2DModel.from_pretrained(tmp_path)


# --- What is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "act_fn": ({"act_fn": "gelu"}, r'act_fn = "gelu" \(implemented: "silu", "swish"\)'),
    "scale shift": ({"resnet_time_scale_shift": "spatial"}, 'resnet_time_scale_shift = "spatial"'),
    "time embedding": ({"time_embedding_type": "sinus"}, 'time_embedding_type = "sinus"'),
    "no table": ({"time_embedding_type": "learned"}, "'learned' needs num_train_timesteps"),
    "class embedding": ({"class_embed_type": "projection"}, 'class_embed_type = "projection"'),
    "middle": ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, 'mid_block_type = "UNetMidBlock2DCrossAttn"'),
    "downsampling": ({"downsample_type": "fir"}, 'downsample_type = "fir"'),
    "upsampling": ({"upsample_type": None}, "upsample_type = null"),
    "padding": ({"downsample_padding": 2}, "downsample_padding should be 0 or 1, found 2"),
    "skip block": (
        {"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]},
        r"down_block_types should be 2 of .*; found \['SkipDownBlock2D'",
    ),
    "K block": ({"up_block_types": ["KUpBlock2D", "UpBlock2D"]}, r"up_block_types should be .*; found \['KUpBlock2D'"),
    "length": ({"up_block_types": ["UpBlock2D"]}, "up_block_types should be 2 of"),
    "cross-attention": ({"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]}, "found .*CrossAttnDownBlock2D"),
    "groups": ({"norm_num_groups": 3}, r"\[8, 16\] should be divisible by norm_num_groups 3"),
    "no groups": ({"norm_num_groups": None}, r"norm_num_groups = null \(expected an integer\)"),
    "groups of the middle": ({"attn_norm_num_groups": 3}, "16 channels should be divisible by attn_norm_num_groups 3"),
    "heads": (
        {"attention_head_dim": 17},
        "attention_head_dim 17, the width of a head, should be at most 16, the channels",
    ),
    "width of heads": ({"attention_head_dim": 0}, "attention_head_dim should be a positive integer or null, found 0"),
    "heads per level": ({"attention_head_dim": [8, 8]}, r"attention_head_dim should be .*, found \[8, 8\]"),
    "layers": ({"layers_per_block": 0}, "layers_per_block should hold integers of at least 1, found 0"),
    "scale": ({"mid_block_scale_factor": 0}, "mid_block_scale_factor should not be 0"),
    "dropout": ({"dropout": 1.5}, "dropout should be from 0 to 1, found 1.5"),
    "type": ({"in_channels": "3"}, r'in_channels = "3" \(expected an integer\)'),
    "field": ({"cross_attention_dim": 8}, "cross_attention_dim = 8 .unknown field"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configuration_that_is_refused(case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        UNet2DModel(**tiny(**fields))


CALLS = {
    "sample": ({}, (noisy(C=4), 1), r"sample should be \(B, 3, H, W\), found \(2, 4, 8, 8\)"),
    "fraction": ({}, (noisy(), 17.25), "timestep 17.25: .* drops the fraction .* pass torch.tensor"),
    "times": ({}, (noisy(), torch.tensor([1, 2, 3])), r"found shape \(3,\) for a batch of 2"),
    "zero": ({"time_embedding_type": "fourier"}, (noisy(), 0), r"times above 0, .*: found \[0, 0\]"),
    "large": (
        {"time_embedding_type": "learned", "num_train_timesteps": 9},
        (noisy(), 9),
        "timestep should be from 0 t",
    ),
    "no labels": ({"num_class_embeds": 5}, (noisy(), 1), "class_labels should be provided when num_class_embeds > 0"),
    "no classes": ({}, (noisy(), 1, LABELS), "class_labels given to a network without classes"),
    "number of labels": (
        {"num_class_embeds": 5},
        (noisy(), 1, torch.zeros(3).long()),
        r"should be \(2,\), found \(3,\)",
    ),
    "label": ({"num_class_embeds": 3}, (noisy(), 1, LABELS), r"class_labels should be from 0 to 2, found \[3, 0\]"),
    "width": ({"class_embed_type": "identity"}, (noisy(), 1, torch.ones(2, 8)), r"should be \(2, 32\), found \(2, 8\)"),
}


@pytest.mark.parametrize("case", CALLS)
def test_call_that_is_refused(case: str) -> None:
    fields, arguments, message = CALLS[case]
    with pytest.raises(ValueError, match=message):
        UNet2DModel(**tiny("-", **fields)).double()(*arguments)
