"""Pictures of pruned UNets: without a middle or with one block of it, and with parts of transformers left out.

Such are SSD-1B and Vega (Gupta et al. 2024, https://arxiv.org/abs/2401.02677) and those of BK-SDM (Kim et al. 2023,
https://arxiv.org/abs/2305.15798); SDXS (Song et al. 2024, https://arxiv.org/abs/2403.16627) has no self-attention at
the finest level.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minidiff
from tests.pictures import assert_same, load_both, quiet, seeded
from tests.theirs import diffusers
from tests.tiny import save_tiny
from tests.tiny_xl import save_base

LISTS = {"transformer_layers_per_block": [[1, 2], 1], "reverse_transformer_layers_per_block": [1, [2, 1, 3]]}
UNETS = {
    "no middle": {"mid_block_type": None},
    "text alone": {"only_cross_attention": [True, False]},
    "lists": {"mid_block_type": "UNetMidBlock2D", "layers_per_block": 2, **LISTS},
}
CALL = {"height": 16, "width": 16, "num_inference_steps": 3, "output_type": "np"}


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_the_same_picture(kind: str, name: str, tmp_path: Path) -> None:
    """Also optimized, and from a single file that says its configuration."""
    save = save_base if "XL" in kind else save_tiny
    ours, theirs = load_both(kind, save(tmp_path / "hub", unet=UNETS[name]))
    pictures = [pipe("red heart", **CALL, generator=seeded()).images for pipe in (ours, theirs)]
    assert_same(*pictures)
    ours.save_single_file(tmp_path / "one.safetensors")
    cls: Any = getattr(minidiff, kind)
    again = quiet(cls.from_single_file(tmp_path / "one.safetensors", torch_dtype=ours.dtype))
    assert np.array_equal(again("red heart", **CALL, generator=seeded()).images, pictures[0])
    theirs = getattr(diffusers, kind).from_single_file(
        str(tmp_path / "one.safetensors"), config=str(tmp_path / "hub"), torch_dtype=ours.dtype
    )
    assert_same(quiet(theirs)("red heart", **CALL, generator=seeded()).images, pictures[0])
    plain, fast = (quiet(cls.from_pretrained(tmp_path / "hub")) for _ in range(2))
    assert_near = np.testing.assert_allclose
    few = {**CALL, "num_inference_steps": 2}
    pictures = [pipe("red heart", **few, generator=seeded()).images for pipe in (plain, fast.optimize())]
    assert_near(*pictures, atol=1e-4)  # measured 1.9e-6: float32
