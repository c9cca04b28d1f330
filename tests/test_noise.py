"""Random draws against the reference: same generators, same numbers."""

import pytest
import torch

from minidiff.noise import randn
from tests.theirs import diffusers


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("many", [0, 1, 4])
def test_draws(many, dtype):
    """One generator for the batch, a list of one, a list of four."""
    theirs_randn = diffusers.utils.torch_utils.randn_tensor

    def pair(draw):
        given = generators(many) if many else generators(1)[0]
        first = draw((4, 3, 2), generator=given, device="cpu", dtype=dtype)
        return torch.stack([first, draw((4, 3, 2), generator=given, device="cpu", dtype=dtype)])

    assert torch.equal(pair(randn), pair(theirs_randn))


def test_without_a_generator():
    torch.manual_seed(3)
    ours = randn((2, 3))
    torch.manual_seed(3)
    assert torch.equal(ours, diffusers.utils.torch_utils.randn_tensor((2, 3)))


def test_a_picture_does_not_depend_on_its_batch():
    assert torch.equal(randn((3, 4), generators(3))[2:], randn((1, 4), generators(3)[2:]))


def test_a_cpu_generator_serves_another_device():
    assert randn((2, 3), generators(1)[0], device="meta").device.type == "meta"
