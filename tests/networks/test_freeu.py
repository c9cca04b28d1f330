"""FreeU, function by function, in networks of each family, in pictures, and together with what changes a UNet."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import minidiff
from minidiff.networks.freeu import FreeU
from tests.pictures import assert_same, load_both, seeded
from tests.theirs import carry_over, diffusers, randomize, relative_error
from tests.tiny import UNET
from tests.tiny_xl import COARSE_UNET, save_base

VALUES = {"s1": 0.9, "s2": 0.2, "b1": 1.5, "b2": 1.6}
SIZES = [(8, 8), (9, 7), (16, 6), (1, 1), (1, 4), (2, 3)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_function_is_the_reference_s(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Bit for bit in every dtype: the transform is in float32, amplifying in the dtype; 5 channels have a half."""
    for i in range(3):
        x, skip = (torch.randn(2, 5, *size, generator=seeded(k), dtype=torch.float64).to(dtype) for k in (1, 2))
        expected = diffusers.utils.torch_utils.apply_freeu(i, x.clone(), skip.clone(), **VALUES)
        found = FreeU(**VALUES)(i, x, skip)
        assert all(
            torch.equal(ours, theirs) and ours.dtype == dtype for ours, theirs in zip(found, expected, strict=True)
        )
        if i < 2:
            assert not torch.equal(found[0], x) and not torch.equal(found[1], skip)


def test_a_skip_that_is_what_comes_from_below() -> None:
    """In a UNet without a middle the first skip is that very tensor, which the reference amplifies in place."""
    x = torch.randn(2, 4, 8, 8, generator=seeded())
    again = x.clone()
    expected = diffusers.utils.torch_utils.apply_freeu(0, again, again, **VALUES)
    found = FreeU(**VALUES)(0, x, x)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


LEVELS = {
    "block_out_channels": [16, 16, 32],
    "down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2,
}
NETWORKS: dict[str, dict[str, Any]] = {
    "SD 1.x": UNET | LEVELS,
    "SD 2.x": UNET | LEVELS | {"use_linear_projection": True, "attention_head_dim": [2, 2, 4]},
    "SDXL": COARSE_UNET,
    "no middle": UNET | LEVELS | {"mid_block_type": None},
}


@torch.no_grad()
def run(network: Any, size: tuple[int, int]) -> Tensor:
    x = torch.randn(2, 4, *size, generator=seeded(), dtype=torch.float64)
    added = {"text_embeds": torch.ones(2, 12).double(), "time_ids": torch.ones(2, 6).double()}
    text = torch.randn(2, 5, 24, generator=seeded(1), dtype=torch.float64)
    options = {"added_cond_kwargs": added} if network.config.addition_embed_type else {}
    return network(x, 7, encoder_hidden_states=text, **options).sample


@pytest.mark.parametrize("size", [(8, 8), (9, 7)], ids=str)
@pytest.mark.parametrize("kind", NETWORKS)
def test_networks(kind: str, size: tuple[int, int]) -> None:
    """Measured: 1.2e-15 at most, 0 for SD 2.x and XL; the transform in float32 is the same one."""
    fields = NETWORKS[kind]
    theirs = randomize(diffusers.UNet2DConditionModel(**fields).double())
    ours = carry_over(theirs, minidiff.UNet2DConditionModel(**fields))
    before = run(ours, size)
    for network in (ours, theirs):
        network.enable_freeu(**VALUES)
    found = run(ours, size)
    assert relative_error(found, run(theirs, size)) < 1e-10
    assert relative_error(found, before) > 1e-2
    assert torch.equal(run(copy.deepcopy(ours), size), found)
    ours.enable_freeu(1.0, 1.0, 1.0, 1.0)
    assert relative_error(run(ours, size), before) < 1e-6  # nothing but the way through float32
    ours.disable_freeu()
    assert torch.equal(run(ours, size), before)
    with pytest.raises(ValueError, match=r"numbers other than 0, found s1=0\.9, s2=0"):
        ours.enable_freeu(0.9, 0, 1.5, 1.6)
    assert torch.equal(run(ours, size), before)


@pytest.mark.parametrize("kind", ["SD", "XL"])
def test_pictures(kind: str, folder: Path, tmp_path: Path) -> None:
    name = "StableDiffusionPipeline" if kind == "SD" else "StableDiffusionXLPipeline"
    ours, theirs = load_both(name, folder if kind == "SD" else save_base(tmp_path / "xl"))
    call = {"prompt": "red heart", "num_inference_steps": 3, "output_type": "np"}

    def draw(pipe: Any) -> np.ndarray:
        return pipe(**call, generator=seeded(3)).images

    before = draw(ours)
    for pipe in (ours, theirs):
        pipe.enable_freeu(**VALUES)
    found = draw(ours)
    assert_same(found, draw(theirs))
    assert np.abs(found - before).max() > 0.01
    ours.disable_freeu()
    assert np.array_equal(draw(ours), before)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str)
def test_optimized_is_the_same(dtype: torch.dtype, bound: float, folder: Path) -> None:
    """With guidance, whose two copies the first layers share when optimized."""
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "red heart", "num_inference_steps": 3, "output_type": "np", "seed": 3}
    pipe.enable_freeu(**VALUES)
    expected = pipe(**call).images
    pipe.optimize()
    error = np.abs(pipe(**call).images - expected).mean()
    assert error < bound  # measured: 4e-7 and 0.007, which is rounding
    pipe.disable_freeu()
    assert np.abs(pipe(**call).images - expected).mean() > 2 * bound
