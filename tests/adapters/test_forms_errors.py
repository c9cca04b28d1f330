"""What is wrong with the tensors of a form is said by name and shape, all at once, and nothing is changed."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from minidiff import StableDiffusionPipeline
from minidiff.errors import CheckpointError
from tests.tiny import save_tiny

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # (16, 16), without a bias
FF = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"  # (128, 16)
CONV = "down_blocks.1.resnets.0.conv1"  # (32, 16, 3, 3)
NORM = "down_blocks.0.resnets.0.norm1"  # (16,)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(save_tiny(tmp_path_factory.mktemp("sd")))


@pytest.fixture
def pipe(plain: StableDiffusionPipeline) -> Iterator[StableDiffusionPipeline]:
    before = dict(plain.unet.named_parameters())
    yield plain
    assert all(now is before[name] for name, now in plain.unet.named_parameters())
    assert not any(module._forward_hooks or module._buffers for module in plain.unet.modules())


def parts(layer: str, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Return tensors of ones in kohya's spelling; a double "_" is a dot."""
    stem = "lora_unet_" + layer.replace(".", "_")
    return {f"{stem}.{part.replace('__', '.')}": torch.ones(shape) for part, shape in shapes.items()}


LORA = {"lora_down__weight": (2, 16), "lora_up__weight": (16, 2)}
LOHA = {"hada_w1_a": (16, 2), "hada_w1_b": (2, 16), "hada_w2_a": (16, 2), "hada_w2_b": (2, 16)}
LOHA_CONV = {"hada_w1_a": (32, 2), "hada_w1_b": (2, 144), "hada_w2_a": (32, 2), "hada_w2_b": (2, 144)}
TUCKER = {"lora_down__weight": (2, 16, 1, 1), "lora_mid__weight": (2, 2, 3, 3), "lora_up__weight": (32, 2, 1, 1)}
LOKR = {"lokr_w1": (4, 2), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 8)}
WRONG = {
    "half a LoHa": (
        parts(Q, **{k: v for k, v in LOHA.items() if k != "hada_w2_b"}),
        "hada_w2_a: its layer lacks.* hada_w2_b",
    ),
    "half a Tucker LoHa": (
        parts(CONV, hada_t1=(2, 2, 3, 3)),
        "hada_t1: its layer lacks the matrix hada_w1_a and.* hada_t2",
    ),
    "half a LoKr": (parts(Q, lokr_w1=(4, 4), lokr_w2_a=(4, 1)), "lokr_w2_a: its layer lacks the matrix lokr_w2_b"),
    "a LoKr's core": (
        parts(CONV, lokr_t2=(1, 1, 3, 3)),
        "lokr_t2: its layer lacks the matrix lokr_w1 and lokr_w2_a and lo",
    ),
    "a core alone": (
        parts(CONV, lora_mid__weight=(2, 2, 3, 3)),
        r"lora_mid.weight: its layer lacks.* down \(A\) and up \(B\)",
    ),
    "a magnitude alone": (
        parts(Q, dora_scale=(16, 1)),
        r"dora_scale: its layer lacks the matrix down \(A\) and up \(B\)",
    ),
    "an alpha alone": (parts(NORM, alpha=()), r"alpha: its layer lacks the matrix down \(A\)"),
    "two forms": (parts(Q, **LORA, **LOHA), "lora_down.weight, .*hada_w2_b: parts of several forms"),
    "both kinds of LoKr": (
        parts(Q, lokr_w1=(4, 4), lokr_w1_a=(4, 1), lokr_w2=(4, 4)),
        "lokr_w1_a.*: parts of several forms",
    ),
    "LoHa of another rank": (
        parts(Q, **LOHA | {"hada_w2_a": (16, 3)}),
        r"hada_w2_a is \(16, 3\), expected \(16, r\) with the rank r = 2 of lora_unet_.*_to_q.hada_w1_a",
    ),
    "LoHa of another layer": (parts(FF, **LOHA), r"hada_w1_a is \(16, 2\), expected \(128, r\)"),
    "LoHa without the kernel": (
        parts(CONV, **LOHA_CONV | {"hada_w1_b": (2, 16)}),
        r"w1_b is \(2, 16\), expected \(r, 144\)",
    ),
    "Tucker of another kernel": (
        parts(CONV, **TUCKER | {"lora_mid__weight": (2, 2, 1, 1)}),
        r"lora_mid.weight is \(2, 2, 1, 1\), expected \(q, r, 3, 3\) with the rank r = 2 of .*lora_down",
    ),
    "Tucker of another rank": (
        parts(CONV, **TUCKER | {"lora_up__weight": (32, 3, 1, 1)}),
        r"up.weight is \(32, 3, 1, 1\), expected \(32, q, 1, 1\) with the rank q = 2 of .*mid",
    ),
    "LoKr that divides nothing": (
        parts(Q, lokr_w1=(3, 4), lokr_w2=(5, 4)),
        r"lokr_w1 is \(3, 4\), expected \(a divisor of 16, a d",
    ),
    "LoKr of another layer": (
        parts(Q, **LOKR | {"lokr_w2_a": (8, 1)}),
        r"lokr_w2_a is \(8, 1\), expected \(4, r\)",
    ),
    "LoKr of another rank": (
        parts(Q, **LOKR | {"lokr_w2_b": (3, 8)}),
        r"w2_b is \(3, 8\), expected \(r, 8\) with the rank r = 1",
    ),
    "magnitudes too few": (
        parts(Q, **LORA, dora_scale=(12, 1)),
        r"dora_scale is \(12, 1\), expected \(16,\) or \(16, 1\) or",
    ),
    "a vector of PEFT's": (
        parts(FF, **LOHA, lora_magnitude_vector=(128,)),
        "magnitude_vector: .*changed by a LoHa, which has",
    ),
    "a magnitude of a difference": (
        parts(Q, diff=(16, 16), dora_scale=(16, 1)),
        "dora_scale: .*changed by a difference",
    ),
    "two magnitudes": (parts(Q, **LORA, dora_scale=(16,), lora_magnitude_vector=(16,)), "not defined together"),
    "a difference of another layer": (parts(Q, diff=(16, 8)), r"diff is \(16, 8\), expected \(16, 16\)"),
    "an alpha of a difference": (
        parts(Q, diff=(16, 16), alpha=()),
        "alpha: its layer has a difference, which has no rank",
    ),
    "a bias without one": (parts(Q, diff_b=(16,)), "diff_b: its layer has no bias"),
    "a bias of another layer": (parts(CONV, diff_b=(16,)), r"diff_b is \(16,\), expected \(32,\)"),
    "a bias of LoRA without it": (parts(CONV, lora_up__bias=(32,)), "lora_up.bias: its layer lacks"),
    "LoRA of a norm": (parts(NORM, **LORA), "lora_down.weight, .*: a LoRA of a norm, which can only have a difference"),
    "half a norm": (parts(NORM, w_norm=(8,)), r"w_norm is \(8,\), expected \(16,\)"),
    "a norm twice": (parts(NORM, w_norm=(16,), diff=(16,)), "diff: the same tensor as .*w_norm"),
    "unknown": (parts(Q, lokr_t1=(2, 2)), "lokr_t1: no part of a LoRA layer in any spelling"),
    "BOFT": (parts(Q, boft_R=(2, 2)), "BOFT .*which minidiff does not implement"),
    "OFT": (parts(Q, oft_blocks=(2, 2)), "OFT .*which minidiff does not implement"),
    "GLoRA": (parts(Q, a1__weight=(2, 2)), "GLoRA, which minidiff does not implement"),
    "IA3": (parts(Q, on_input=()), "IA3 .*which minidiff does not implement"),
    "VeRA": (parts(Q, vera_lambda_b=(2,)), "VeRA .*which minidiff does not implement"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit(pipe: StableDiffusionPipeline, name: str) -> None:
    """Beside a LoRA that fits."""
    tensors, message = WRONG[name]
    good = parts("mid_block.resnets.0.time_emb_proj", lora_down__weight=(1, 64), lora_up__weight=(32, 1))
    with pytest.raises(CheckpointError, match=message) as error:
        pipe.load_lora_weights(good | tensors)
    assert "the given state dict is no LoRA for this pipeline; nothing was changed" in str(error.value)
    assert pipe.get_list_adapters() == {}


def test_what_is_not_a_number(pipe: StableDiffusionPipeline) -> None:
    for part in LOHA | {"dora_scale": (16, 1)}:
        tensors = parts(Q, **LOHA, dora_scale=(16, 1))
        tensors[next(key for key in tensors if key.endswith(part))][0, 0] = float("nan")
        with pytest.raises(CheckpointError, match=f"{part} holds values that are not finite"):
            pipe.load_lora_weights(tensors)
    assert pipe.get_list_adapters() == {}
