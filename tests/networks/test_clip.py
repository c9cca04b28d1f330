"""``CLIPTextModel`` against the reference in float64: activations, pooling, masks, positions, hidden states."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import minidiff
from minidiff.networks.clip import CLIPTextConfig, CLIPTextModel
from tests.theirs import assert_same_start, carry_over, randomize, relative_error, transformers

CONFIGS = Path(__file__).parents[1] / "data" / "hub_configs"
PUBLISHED = [
    "CompVis--stable-diffusion-v1-4/text_encoder/config.json",
    "runwayml--stable-diffusion-v1-5/text_encoder/config.json",
    "runwayml--stable-diffusion-inpainting/text_encoder/config.json",
    "stabilityai--stable-diffusion-2/text_encoder/config.json",
    "stabilityai--stable-diffusion-2-1/text_encoder/config.json",
    "stabilityai--stable-diffusion-2-1-base/text_encoder/config.json",
    "stabilityai--stable-diffusion-2-inpainting/text_encoder/config.json",
    "openai--clip-vit-large-patch14/text_config.json",
]
BOUND = 1e-10  # measured: 0 in all cases of this file; the last bits differ on other processors
EOS = 40  # of the small vocabulary; ids above it are tokens that were added later


def small(**fields: Any) -> dict[str, Any]:
    """Return the fields of a small text encoder, changed by ``fields``."""
    return {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 12,
        "bos_token_id": 0,
        "eos_token_id": EOS,
        **fields,
    }


def make_pair(fields: dict[str, Any], seed: int = 0) -> tuple[CLIPTextModel, nn.Module]:
    """Build ours and theirs with the same large random float64 weights."""
    theirs = randomize(transformers.CLIPTextModel(transformers.CLIPTextConfig(**fields)).double(), seed)
    with torch.device("meta"):
        ours = CLIPTextModel(CLIPTextConfig(**fields))
    return carry_over(theirs, ours), theirs


def texts(B: int = 3, L: int = 12, vocabulary: int = EOS) -> Tensor:
    """Return (B, L) random ids of ordinary tokens, with the end of text once in the middle and as padding."""
    ids = torch.randint(1, vocabulary, (B, L), generator=torch.Generator().manual_seed(1))
    for k in range(B):
        ids[k, L // 2 + k % 2 :: 2] = EOS
    return ids


@torch.no_grad()
def assert_equal_outputs(ours: CLIPTextModel, theirs: nn.Module, ids: Tensor, **arguments: Any) -> None:
    a = ours(ids, output_hidden_states=True, **arguments)
    b = theirs(ids, output_hidden_states=True, **arguments)
    assert relative_error(a.last_hidden_state, b.last_hidden_state) <= BOUND
    assert relative_error(a.pooler_output, b.pooler_output) <= BOUND
    assert len(a.hidden_states) == len(b.hidden_states) == ours.config.num_hidden_layers + 1
    for state, other in zip(a.hidden_states, b.hidden_states, strict=True):
        assert relative_error(state, other) <= BOUND


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_topology_at_a_sixteenth_of_the_width(name: str) -> None:
    fields = json.loads((CONFIGS / name).read_text())
    fields |= {"hidden_size": fields["hidden_size"] // 16, "intermediate_size": 160, "vocab_size": 50}
    ours, theirs = make_pair(fields)
    assert_equal_outputs(ours, theirs, texts(B=2, L=77))


BRANCHES = {
    "quick_gelu": small(hidden_act="quick_gelu"),
    "gelu": small(hidden_act="gelu"),
    "one layer": small(num_hidden_layers=1),
    "one head": small(num_attention_heads=1),
    "as many heads as features": small(num_attention_heads=16),
    "another epsilon": small(layer_norm_eps=0.1),
    "true end of text": small(eos_token_id=EOS),
    "legacy end of text": small(eos_token_id=2),
}


@pytest.mark.parametrize("branch", BRANCHES)
def test_branch_of_the_configuration(branch: str) -> None:
    ours, theirs = make_pair(BRANCHES[branch])
    assert_equal_outputs(ours, theirs, texts())


STARTS = {
    **BRANCHES,
    "initializer": small(initializer_factor=0.5, initializer_range=0.1),
    "odd sizes": small(hidden_size=20),
}


@pytest.mark.parametrize("branch", STARTS)
@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_new_weights(kind: str, branch: str) -> None:
    """Initial weights are drawn as the reference draws them."""
    fields = STARTS[branch]
    make_theirs = getattr(transformers, kind)
    assert_same_start(
        lambda: getattr(minidiff, kind)(fields), lambda: make_theirs(transformers.CLIPTextConfig(**fields))
    )


@pytest.mark.parametrize(
    "option", [{"hidden_act": "gelu"}, {"layer_norm_eps": 0.1}, {"num_attention_heads": 2}], ids=str
)
@torch.no_grad()
def test_option_changes_the_result(option: dict[str, Any]) -> None:
    ours, theirs = make_pair(small())
    other = carry_over(theirs, CLIPTextModel(small(**option)))
    assert relative_error(other(texts())[0], ours(texts())[0]) > 1e-3


@pytest.mark.parametrize("eos", [2, EOS], ids=["legacy", "true"])
def test_pooling_with_an_added_token_of_a_larger_id(eos: int) -> None:
    """Where a token was added after the end-of-text token, the legacy rule pools there, as the reference does."""
    ours, theirs = make_pair(small(eos_token_id=eos))
    ids = texts()
    ids[:, 3] = 45
    assert_equal_outputs(ours, theirs, ids)
    with torch.no_grad():
        out = ours(ids)
    rows = torch.arange(3)
    ends = torch.full((3,), 3) if eos == 2 else (ids == EOS).int().argmax(dim=-1)
    assert torch.equal(out.pooler_output, out.last_hidden_state[rows, ends])


def test_pooling_without_an_end_of_text() -> None:
    ours, theirs = make_pair(small())
    assert_equal_outputs(ours, theirs, torch.randint(1, EOS, (2, 6), generator=torch.Generator().manual_seed(3)))


@pytest.fixture(scope="module")
def pair() -> tuple[CLIPTextModel, nn.Module]:
    return make_pair(small())


MASKS = {
    "everything": lambda mask: mask,
    "padding behind": lambda mask: mask.index_put(
        (torch.tensor([0, 0, 1]), torch.tensor([10, 11, 11])), torch.tensor(0)
    ),
    "padding in front": lambda mask: mask.index_put(
        (torch.tensor([0, 0, 2]), torch.tensor([0, 1, 0])), torch.tensor(0)
    ),
    "a hole": lambda mask: mask.index_put((torch.tensor([1]), torch.tensor([4])), torch.tensor(0)),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64], ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_attention_mask(kind: str, dtype: torch.dtype, pair: tuple[CLIPTextModel, nn.Module]) -> None:
    mask = MASKS[kind](torch.ones(3, 12, dtype=torch.int64))
    assert_equal_outputs(*pair, texts(), attention_mask=mask.to(dtype))


def test_attention_mask_hides_what_it_masks(pair: tuple[CLIPTextModel, nn.Module]) -> None:
    ids, mask = texts(), torch.ones(3, 12, dtype=torch.int64)
    mask[:, 4] = 0
    other = ids.clone()
    other[:, 4] = ids[:, 4] % 30 + 1
    with torch.no_grad():
        a, b = (pair[0](tokens, attention_mask=mask).last_hidden_state for tokens in (ids, other))
    assert torch.equal(a[:, 5:], b[:, 5:]) and not torch.equal(a[:, 4], b[:, 4])


@pytest.mark.parametrize("rows", [1, 3])
def test_position_ids(rows: int, pair: tuple[CLIPTextModel, nn.Module]) -> None:
    positions = torch.randint(0, 12, (rows, 12), generator=torch.Generator().manual_seed(4))
    assert_equal_outputs(*pair, texts(), position_ids=positions)


@pytest.mark.parametrize(("B", "L"), [(1, 1), (1, 2), (5, 7)])
def test_short_text(B: int, L: int, pair: tuple[CLIPTextModel, nn.Module]) -> None:
    assert_equal_outputs(*pair, texts(B, L))


@torch.no_grad()
def test_penultimate_state_after_the_final_norm(pair: tuple[CLIPTextModel, nn.Module]) -> None:
    """What clip_skip=1 conditions on: the state before the last layer, through the final normalisation."""
    ours, theirs = pair
    a = ours.norm_out(ours(texts(), output_hidden_states=True).hidden_states[-2])
    b = theirs.final_layer_norm(theirs(texts(), output_hidden_states=True).hidden_states[-2])
    assert relative_error(a, b) <= BOUND
    shallow = {name: tensor for name, tensor in theirs.state_dict().items() if ".layers.2." not in name}
    cut = transformers.CLIPTextModel(transformers.CLIPTextConfig(**small(num_hidden_layers=2))).double().eval()
    cut.load_state_dict(shallow)
    assert relative_error(a, cut(texts()).last_hidden_state) <= BOUND


@torch.no_grad()
def test_output_record(pair: tuple[CLIPTextModel, nn.Module]) -> None:
    ids = texts()
    for model in pair:  # the forms that code written for the reference uses
        record = model(ids)
        assert record.hidden_states is None and len(record.to_tuple()) == 2
        assert torch.equal(record[0], record.last_hidden_state) and torch.equal(record[1], record.pooler_output)
        assert torch.equal(record["pooler_output"], record.pooler_output)
        last, pooled = model(ids, return_dict=False)
        assert torch.equal(last, record.last_hidden_state) and torch.equal(pooled, record.pooler_output)
        last, pooled, states = model(ids, output_hidden_states=True, return_dict=False)
        assert isinstance(states, tuple) and torch.equal(states[0], model(ids, output_hidden_states=True)[2][0])
        assert torch.equal(model(input_ids=ids, attention_mask=torch.ones_like(ids))[0], last)


SHIFTS_ALL_SCORES = ".attn.k.bias"  # q·(k + b) = q·k + q·b: softmax takes no notice of the same number everywhere


@torch.no_grad()
def test_no_tensor_is_ignored_or_swapped() -> None:
    """Disturb each tensor of the reference, and its counterpart here: both outputs move, and by the same amount."""
    ours, theirs = make_pair(small())
    ours = copy.deepcopy(ours)  # weights of its own
    ids = texts()
    still = ours(ids).last_hidden_state
    rng = torch.Generator().manual_seed(2)
    mine = torch.nn.Module.state_dict(ours)
    reference = {ours.canonical_hub_name(name): tensor for name, tensor in theirs.state_dict().items()}
    for our_name, hub_name in [pair for row in ours.rows() for pair in zip(row.ours, row.hub, strict=True)]:
        delta = 0.1 * torch.randn(reference[hub_name].shape, generator=rng, dtype=torch.float64)
        mine[our_name] += delta
        reference[hub_name] += delta
        moved = ours(ids).last_hidden_state
        if our_name.endswith(SHIFTS_ALL_SCORES):
            assert relative_error(moved, still) < 1e-13, our_name
        else:
            assert relative_error(moved, still) > 1e-4, our_name  # the smallest: 6e-3
        assert relative_error(moved, theirs(ids).last_hidden_state) <= BOUND, (our_name, hub_name)
        mine[our_name] -= delta
        reference[hub_name] -= delta


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)], ids=str)
@torch.no_grad()
def test_half_precision(dtype: torch.dtype, bound: float, masked: bool, pair: tuple[CLIPTextModel, nn.Module]) -> None:
    ours, theirs = copy.deepcopy(pair)
    mask = MASKS["padding behind"](torch.ones(3, 12, dtype=torch.int64)) if masked else None
    exact = ours(texts(), attention_mask=mask).last_hidden_state
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    out = ours(texts(), attention_mask=mask).last_hidden_state
    assert out.dtype == dtype
    assert relative_error(out, theirs(texts(), attention_mask=mask).last_hidden_state) <= bound  # measured: 0
    assert relative_error(out, exact) <= bound  # measured: 1.1e-3 and 8.5e-3
