"""Transformers whose first attention looks at the text too (``only_cross_attention``): what else has to know of it."""

import copy
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

import minidiff.fast
from minidiff.compat.attention import AttnProcessor
from minidiff.networks.unet import UNet2DConditionModel
from tests.networks.test_unet import BOUND, inputs, make_pair, three
from tests.theirs import relative_error

Pair = tuple[UNet2DConditionModel, nn.Module]
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 0]])


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make_pair(three("xx-", "xx-", only_cross_attention=[True, False, True]))


@torch.no_grad()
def assert_equal(ours: UNet2DConditionModel, theirs: nn.Module, **options: Any) -> None:
    x, ctx = inputs(ours)
    assert relative_error(ours(x, 20, ctx, **options).sample, theirs(x, 20, ctx, **options).sample) <= BOUND


def test_the_middle_looks_at_the_pixels(pair: Pair) -> None:
    """As in the reference, which tells only a kind of middle that is not built here."""
    for model in pair:
        firsts = {name: module.to_k.in_features for name, module in model.named_modules() if name.endswith(".attn1")}
        widths = {name: 6 if name.startswith(("down_blocks.0", "up_blocks.2")) else None for name in firsts}
        assert all(
            firsts[name] == (width or model.get_submodule(name).to_q.in_features) for name, width in widths.items()
        )
        assert sum(width == 6 for width in widths.values()) == 3


def test_published_attributes(pair: Pair) -> None:
    for model in pair:
        blocks = [model.get_submodule(name) for name in (BLOCK, BLOCK.replace("down_blocks.0", "down_blocks.1"))]
        assert [block.only_cross_attention for block in blocks] == [True, False]
        assert [block.attn1.cross_attention_dim for block in blocks] == [6, 8]
        assert [block.attn2.cross_attention_dim for block in blocks] == [6, 6]


@pytest.mark.parametrize("slices", [None, "max"])
def test_a_mask_concerns_the_second_attention_alone(slices: str | None, pair: Pair) -> None:
    ours = copy.deepcopy(pair[0])
    ours.set_attention_slice(slices)
    assert_equal(ours, pair[1], encoder_attention_mask=MASK)
    minidiff.fast.optimize(ours)
    assert_equal(ours, pair[1], encoder_attention_mask=MASK)


def seen(attn: Any, x: Any, encoder_hidden_states: Any = None, attention_mask: Any = None, **_: Any) -> Any:
    """Attend, and note whether there was a text and a mask of it: of both libraries."""
    SEEN.append((encoder_hidden_states is not None, attention_mask is not None))
    theirs = import_module("diffusers.models.attention_processor")
    kind = AttnProcessor if type(attn).__module__.startswith("minidiff") else theirs.AttnProcessor
    return kind()(attn, x, encoder_hidden_states, attention_mask)


SEEN: list[tuple[bool, bool]] = []


@torch.no_grad()
def test_processors_are_shown_the_text(pair: Pair) -> None:
    outs, notes = [], []
    for model in copy.deepcopy(pair):
        SEEN.clear()
        model.set_attn_processor(seen)
        x, ctx = inputs(pair[0])
        outs.append(model(x, 20, ctx, encoder_attention_mask=MASK).sample)
        notes.append(list(SEEN))
    assert relative_error(*outs) <= BOUND
    assert notes[0] == notes[1]
    assert notes[0][:4] == [(True, False), (True, True), (False, False), (True, True)]


def test_training_with_recomputed_blocks(pair: Pair) -> None:
    ours, theirs = copy.deepcopy(pair)
    x, ctx = inputs(ours)
    ours.enable_gradient_checkpointing()
    for model in (ours, theirs):
        model.train()(x, 20, ctx).sample.square().sum().backward()
    for name in (f"{BLOCK}.attn1.to_k.weight", f"{BLOCK}.attn1.to_q.weight", "conv_in.weight"):
        assert relative_error(ours.get_parameter(name).grad, theirs.get_parameter(name).grad) <= BOUND


def test_adapters_have_the_width_of_the_text(pair: Pair) -> None:
    """A LoRA of such a layer, as PEFT writes it: the product is added to the weight."""
    ours = copy.deepcopy(pair[0])
    before = ours.get_submodule(BLOCK).attn1.to_k.weight.detach().clone()
    A, B = torch.randn(2, 6, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    ours.load_lora_adapter(
        {f"{BLOCK}.attn1.to_k.lora_A.weight": A, f"{BLOCK}.attn1.to_k.lora_B.weight": B}, prefix=None
    )
    theirs = copy.deepcopy(pair[1])
    theirs.get_submodule(BLOCK).attn1.to_k.weight.data = before + B @ A
    assert_equal(ours, theirs)
