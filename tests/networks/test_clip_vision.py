"""``CLIPVisionModel`` against the reference in float64: activations, sizes, positions, hidden states, spellings."""

import copy
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minidiff
from minidiff.checkpoints.load import OnMeta
from minidiff.checkpoints.remap import translate
from minidiff.errors import CheckpointError, ConfigError
from minidiff.networks.clip_vision import CLIPVisionModel, CLIPVisionModelWithProjection
from minidiff.networks.specs.clip_vision import vision_half
from tests.theirs import assert_same_start, carry_over, randomize, relative_error, transformers

CONFIGS = Path(__file__).parents[1] / "data" / "hub_configs"
PUBLISHED = [
    "h94--IP-Adapter/image_encoder/config.json",
    "lambdalabs--sd-image-variations-diffusers/image_encoder/config.json",
    "lambdalabs--sd-image-variations-diffusers/image_encoder/whole_clip.json",
    "CompVis--stable-diffusion-v1-4/safety_checker/config.json",
    "runwayml--stable-diffusion-v1-5/safety_checker/config.json",
    "runwayml--stable-diffusion-inpainting/safety_checker/config.json",
]
# The sizes of OpenCLIP's ViT-bigG/14, of SDXL's IP-Adapter, as kvmm 0.1.8 lists them; heads and activation by heart.
BIG_G = {
    "hidden_size": 1664,
    "intermediate_size": 8192,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
BOUND = 1e-10  # measured: 0 in all cases of this file; the last bits differ on other processors
KINDS = ["CLIPVisionModel", "CLIPVisionModelWithProjection"]


def small(**fields: Any) -> dict[str, Any]:
    """Return the fields of a small vision encoder, changed by ``fields``."""
    return {
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 12,
        "patch_size": 4,
        "projection_dim": 10,
        **fields,
    }


def make_pair(fields: dict[str, Any], kind: str = "CLIPVisionModelWithProjection") -> tuple[Any, Any]:
    """Build ours and theirs with the same large random float64 weights."""
    theirs = randomize(getattr(transformers, kind)(transformers.CLIPVisionConfig(**fields)).double())
    with torch.device("meta"):
        ours = getattr(minidiff, kind)(minidiff.CLIPVisionConfig(**fields))
    return carry_over(theirs, ours), theirs


def pictures(H: int = 12, W: int = 12, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_equal_outputs(ours: nn.Module, theirs: nn.Module, x: Tensor, **arguments: Any) -> None:
    a, b = (model(x, output_hidden_states=True, **arguments) for model in (ours, theirs))
    assert list(a) == list(b)
    states = zip(a.hidden_states, b.hidden_states, strict=True)
    for one, other in [*((a[name], b[name]) for name in a if name != "hidden_states"), *states]:
        assert relative_error(one, other) <= BOUND
    assert len(a.hidden_states) == ours.config.num_hidden_layers + 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_topology_at_a_sixteenth_of_the_width(name: str) -> None:
    fields = dict(vision_half(json.loads((CONFIGS / name).read_text())))
    fields |= {"hidden_size": fields["hidden_size"] // 16, "intermediate_size": 80, "image_size": 28}
    assert_equal_outputs(*make_pair(fields), pictures(28, 28))


def test_an_early_whole_configuration() -> None:
    """Where ``vision_config_dict`` stands beside ``vision_config``, it and the defaults are what counts."""
    fields = {"vision_config": small(), "vision_config_dict": {"hidden_size": 24, "patch_size": 16}}
    theirs = transformers.CLIPConfig(**copy.deepcopy(fields)).vision_config
    ours = CLIPVisionModel.from_config(fields).config
    assert ours.hidden_size == 24 and ours.image_size == 224
    shared = set(small()) | {"num_channels", "hidden_act", "layer_norm_eps"}
    assert {name: ours[name] for name in shared} == {name: getattr(theirs, name) for name in shared}


BRANCHES = {
    "quick_gelu": small(),
    "gelu": small(hidden_act="gelu"),
    "one layer": small(num_hidden_layers=1),
    "one head": small(num_attention_heads=1),
    "another epsilon": small(layer_norm_eps=0.1),
    "pixels that no patch sees": small(image_size=14),
    "one patch": small(patch_size=12),
    "four channels": small(num_channels=4),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("branch", BRANCHES)
def test_branch_of_the_configuration(branch: str, kind: str) -> None:
    fields = BRANCHES[branch]
    side = fields["image_size"]
    assert_equal_outputs(*make_pair(fields, kind), pictures(side, side, fields.get("num_channels", 3)))


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return make_pair(small())


@pytest.mark.parametrize(("H", "W"), [(12, 12), (13, 15), (20, 8), (4, 40), (24, 24), (12, 16)])
def test_positions_are_stretched_to_pictures_of_any_size(H: int, W: int, pair: tuple[Any, Any]) -> None:
    assert_equal_outputs(*pair, pictures(H, W), interpolate_pos_encoding=True)


@pytest.mark.parametrize("branch", [*BRANCHES, "initializer"])
@pytest.mark.parametrize("kind", KINDS)
def test_new_weights(kind: str, branch: str) -> None:
    """Initial weights are drawn as the reference draws them."""
    fields = {**BRANCHES, "initializer": small(initializer_factor=0.5, initializer_range=0.1)}[branch]
    make_theirs = getattr(transformers, kind)
    assert_same_start(
        lambda: getattr(minidiff, kind)(fields), lambda: make_theirs(transformers.CLIPVisionConfig(**fields))
    )


SHIFTS_ALL_SCORES = ".attn.k.bias"  # q·(k + b) = q·k + q·b: softmax takes no notice of the same number everywhere


@torch.no_grad()
def test_no_tensor_is_ignored_or_swapped() -> None:
    """Disturb each tensor of the reference, and its counterpart here: both outputs move, and by the same amount."""
    ours, theirs = make_pair(small())
    ours = copy.deepcopy(ours)  # weights of its own
    still, x, rng = ours(pictures()).image_embeds, pictures(), torch.Generator().manual_seed(2)
    mine = nn.Module.state_dict(ours)
    reference = {ours.canonical_hub_name(name): tensor for name, tensor in theirs.state_dict().items()}
    for our_name, hub_name in [pair for row in ours.rows() for pair in zip(row.ours, row.hub, strict=True)]:
        delta = 0.1 * torch.randn(reference[hub_name].shape, generator=rng, dtype=torch.float64)
        mine[our_name] += delta
        reference[hub_name] += delta
        moved = ours(x).image_embeds
        if our_name.endswith(SHIFTS_ALL_SCORES):
            assert relative_error(moved, still) < 1e-13, our_name
        else:
            assert relative_error(moved, still) > 1e-4, our_name
        assert relative_error(moved, theirs(x).image_embeds) <= BOUND, (our_name, hub_name)
        mine[our_name] -= delta
        reference[hub_name] -= delta


@torch.no_grad()
def test_output_record(pair: tuple[Any, Any]) -> None:
    x = pictures()
    for model in pair:  # the forms that code written for the reference uses
        record = model(x)
        assert record.hidden_states is None and len(record.to_tuple()) == 2
        assert torch.equal(record[0], record.image_embeds) and torch.equal(record[1], record.last_hidden_state)
        embeds, last = model(pixel_values=x, return_dict=False)
        assert torch.equal(embeds, record["image_embeds"]) and torch.equal(last, record.last_hidden_state)
        pooled = model.vision_model(x)[1]  # as the safety checker is written
        assert torch.equal(model.visual_projection(pooled), embeds)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)], ids=str)
@torch.no_grad()
def test_half_precision(dtype: torch.dtype, bound: float) -> None:
    ours, theirs = make_pair(small())
    exact = ours(pictures()).image_embeds
    out = ours.to(dtype)(pictures()).image_embeds  # pixels take the dtype of the weights
    assert out.dtype == dtype
    assert relative_error(out, theirs.to(dtype)(pictures()).image_embeds) <= bound  # measured: 0
    assert relative_error(out, exact) <= bound  # measured: 5.2e-4 and 4.2e-3


def test_gradient_checkpointing(pair: tuple[Any, Any]) -> None:
    ours, _ = make_pair(small())
    gradients = []
    for switch in (ours.gradient_checkpointing_disable, ours.gradient_checkpointing_enable):
        switch()
        ours.zero_grad()
        ours(pictures()).image_embeds.square().sum().backward()
        gradients.append([weight.grad for weight in ours.parameters()])
    assert ours.is_gradient_checkpointing
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


# --- Files -------------------------------------------------------------------------------------------------------


def open_clip(hub: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write a vision encoder as OpenCLIP does: q, k and v stacked, the projection transposed."""
    found = {}
    for name, tensor in hub.items():
        name = name.removeprefix("vision_model.")
        for old, new in [
            ("embeddings.class_embedding", "class_embedding"),
            ("embeddings.patch_embedding", "conv1"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
            ("pre_layrnorm", "ln_pre"),
            ("post_layernorm", "ln_post"),
            ("encoder.layers", "transformer.resblocks"),
            ("layer_norm", "ln_"),
            ("self_attn", "attn"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("visual_projection.weight", "proj"),
        ]:
            name = name.replace(old, new)
        found[f"visual.{name}"] = tensor.T if name == "proj" else tensor
    for name in [name for name in found if ".q_proj." in name]:
        parts = [found.pop(name.replace("q_proj", f"{s}_proj")) for s in "qkv"]
        found[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return found


SPELLINGS = {
    "transformers 4": lambda hub: hub,
    "transformers 5": lambda hub: {name.removeprefix("vision_model."): tensor for name, tensor in hub.items()},
    "before 4.31": lambda hub: hub | {"vision_model.embeddings.position_ids": torch.arange(10)[None]},
    "a whole CLIP": lambda hub: (
        hub
        | {
            "text_model.final_layer_norm.weight": torch.ones(3),
            "text_projection.weight": torch.ones(3, 3),
            "logit_scale": torch.tensor(4.6),
        }
    ),
}


def write(folder: Path, fields: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_files(spelling: str, kind: str, tmp_path: Path) -> None:
    ours, theirs = make_pair(small(), kind)
    fields = {"text_config": {"hidden_size": 3}, "vision_config": small()} if spelling == "a whole CLIP" else small()
    tensors = SPELLINGS[spelling](dict(make_pair(small())[0].state_dict()))  # with a projection, which one lacks
    folder = write(tmp_path / "published", fields, tensors)
    model = getattr(minidiff, kind).from_pretrained(folder, torch_dtype=torch.float64)
    assert_equal_outputs(model, theirs, pictures())
    model.save_pretrained(tmp_path / "saved")
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(ours.state_dict())
    back = getattr(transformers, kind).from_pretrained(tmp_path / "saved").double().eval()
    assert_equal_outputs(model, back, pictures())
    back.save_pretrained(tmp_path / "theirs")
    assert_equal_outputs(
        getattr(minidiff, kind).from_pretrained(tmp_path / "theirs", dtype="float64"), theirs, pictures()
    )


def test_open_clip_spelling() -> None:
    ours, theirs = make_pair(small())
    hub = dict(ours.state_dict())
    original = open_clip(hub)
    made = translate(hub, ours.rows(), "hub", "ldm")
    assert made.keys() == original.keys() and all(torch.equal(made[name], original[name]) for name in made)
    model = CLIPVisionModelWithProjection(small()).double().eval()
    model.load_state_dict(original)
    assert_equal_outputs(model, theirs, pictures())


@pytest.mark.parametrize("name", [*PUBLISHED[:2], "bigG"])
def test_names_and_shapes_at_full_size(name: str) -> None:
    fields = BIG_G if name == "bigG" else json.loads((CONFIGS / name).read_text())
    with torch.device("meta"):
        theirs = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**fields))
    with OnMeta():
        ours = CLIPVisionModelWithProjection.from_config(fields)
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {
        name: tensor.shape for name, tensor in theirs.state_dict().items()
    }


def test_states_that_nobody_asked_for_are_not_kept(pair: tuple[Any, Any]) -> None:
    """48 of them, in the encoder of IP-Adapter XL, would take 1.3 GB for 16 pictures."""
    layers, states = pair[0].vision_model.layers, []
    hooks = [layers[0].register_forward_hook(lambda layer, args, out: states.append(weakref.ref(out)))]
    hooks.append(layers[-1].register_forward_hook(lambda layer, args, out: states.append(states[0]() is not None)))
    with torch.no_grad():
        for asked in (False, True):
            states.clear()
            pair[0](torch.zeros(1, 3, 12, 12, dtype=torch.float64), output_hidden_states=asked)
            assert states[1] is asked
    [hook.remove() for hook in hooks]


# --- Bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act should be one of quick_gelu, gelu, found 'relu'"),
        ({"attention_dropout": 0.1}, r"attention_dropout = 0.1 \(implemented: 0.0\)"),
        ({"image_size": [12, 16]}, r"image_size = \[12, 16\] \(expected an integer\)"),
        ({"patch_size": 13}, "patch_size 13 should be at most image_size 12"),
        ({"num_channels": 0}, "num_channels should be a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads should be a positive integer"),
        ({"num_hidden_layers": -1}, "num_hidden_layers should be a positive integer"),
        ({"hidden_size": 18}, "hidden_size 18 should be divisible by num_attention_heads 4"),
        ({"output_attentions": True}, "output_attentions = true"),
        ({"vocab_size": 3}, r"vocab_size = 3 \(unknown field\)"),
    ],
)
def test_refused_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"CLIPVisionModel.*{message}"):
        CLIPVisionModel(small(**fields))


def test_a_projection_needs_a_width() -> None:
    for width in (None, 0):
        with pytest.raises(ConfigError, match="projection_dim should be a positive integer"):
            CLIPVisionModelWithProjection(small(projection_dim=width))
    assert CLIPVisionModel(small(projection_dim=None)).config.projection_dim is None


@pytest.mark.parametrize("shape", [(2, 3, 12, 16), (2, 4, 12, 12), (3, 12, 12), None], ids=str)
def test_refused_pictures(shape: tuple[int, ...] | None, pair: tuple[Any, Any]) -> None:
    x = None if shape is None else torch.zeros(shape)
    with pytest.raises(ValueError, match=r"should be \(B, 3, 12, 12\), found .*CLIPImageProcessor"):
        pair[0](x)
    with pytest.raises(ValueError, match="at least 4 pixels high and wide"):
        pair[0](torch.zeros(1, 3, 12, 3), interpolate_pos_encoding=True)


def test_a_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    state = dict(CLIPVisionModel(small()).state_dict())
    del state["vision_model.pre_layrnorm.bias"]
    folder = write(tmp_path / "broken", small(), state | {"vision_model.adapter.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match="(?s)vision_model.adapter.*missing.*pre_layrnorm.bias"):
        CLIPVisionModel.from_pretrained(folder)
