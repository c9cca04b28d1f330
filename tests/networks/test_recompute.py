"""Gradient checkpointing: the same gradients as the reference and as without it, from half of the kept tensors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import minidiff
from tests.theirs import carry_over, diffusers, randomize, transformers
from tests.tiny import TEXT, UNET, VAE

PLAIN_UNET = {
    "block_out_channels": [8, 16],
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "dropout": 0.3,
}


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[Any, ...]]] = {
    "UNet2DConditionModel": (
        lambda: minidiff.UNet2DConditionModel(**UNET),
        lambda: diffusers.UNet2DConditionModel(**UNET),
        (drawn(2, 4, 8, 8), 7, drawn(2, 5, 24)),
    ),
    "UNet2DModel": (
        lambda: minidiff.UNet2DModel(**PLAIN_UNET),
        lambda: diffusers.UNet2DModel(**PLAIN_UNET),
        (drawn(2, 3, 8, 8), 7),
    ),
    "AutoencoderKL": (
        lambda: minidiff.AutoencoderKL(**VAE),
        lambda: diffusers.AutoencoderKL(**VAE),
        (drawn(2, 3, 16, 16),),
    ),
    "CLIPTextModel": (
        lambda: minidiff.CLIPTextModel({**TEXT, "vocab_size": 50}),
        lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, vocab_size=50)),
        (torch.arange(14).reshape(2, 7),),
    ),
}


def gradients(network: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """Take one backward pass in training mode, with the same dropout each time."""
    torch.manual_seed(5)
    out = network(*inputs)[0]
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)).mean().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference of two sets of gradients, as a part of the largest gradient."""
    assert found.keys() == expected.keys()
    worst = max((found[key] - expected[key]).abs().max().item() for key in found)
    return worst / max(grad.abs().max().item() for grad in expected.values())


def kept(network: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Return how many numbers the forward pass keeps for the backward pass."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        network(*inputs)
    return sum(sizes)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients(name: str) -> None:
    make_ours, make_theirs, inputs = NETWORKS[name]
    theirs = randomize(make_theirs().double())
    ours = carry_over(theirs, make_ours()).train()
    for parameter in ours.parameters():
        parameter.requires_grad_()
    assert not ours.is_gradient_checkpointing
    plain, size = gradients(ours, inputs), kept(ours, inputs)

    ours.zero_grad()
    ours.enable_gradient_checkpointing()
    assert ours.is_gradient_checkpointing and kept(ours, inputs) < 0.6 * size
    again = gradients(ours, inputs)
    assert error(again, plain) <= 1e-12  # measured: 0

    (theirs.enable_gradient_checkpointing if name != "CLIPTextModel" else theirs.gradient_checkpointing_enable)()
    reference = {ours.canonical_hub_name(key): grad for key, grad in gradients(theirs.train(), inputs).items()}
    again = {ours.canonical_hub_name(key): grad for key, grad in again.items()}
    found = {key: grad.reshape(reference[key].shape) for key, grad in again.items()}
    assert error(found, reference) <= 1e-12  # measured: at most 2e-15

    ours.disable_gradient_checkpointing()
    assert not ours.is_gradient_checkpointing and kept(ours, inputs) == size


def test_other_ways_to_recompute() -> None:
    unet, inputs = NETWORKS["UNet2DConditionModel"][0]().double(), NETWORKS["UNet2DConditionModel"][2]
    plain, calls = gradients(unet, inputs), []

    def recompute(run: Callable[..., Any], *arguments: Any) -> Any:
        calls.append(run)
        return checkpoint(run.__call__, *arguments, use_reentrant=False)

    for how in (recompute, partial(checkpoint, use_reentrant=True)):
        unet.zero_grad()
        unet.enable_gradient_checkpointing(how)
        again = gradients(unet, inputs)
        assert error(again, plain) <= 1e-12  # measured: 2e-16
    assert len(calls) == 12
    with torch.no_grad():
        unet(*inputs)
    assert len(calls) == 12  # without gradients nothing is computed again


def test_the_text_encoders_own_names() -> None:
    encoder = NETWORKS["CLIPTextModel"][0]()
    encoder.gradient_checkpointing_enable({"use_reentrant": False})
    assert encoder.is_gradient_checkpointing
    encoder.gradient_checkpointing_disable()
    assert not encoder.is_gradient_checkpointing
