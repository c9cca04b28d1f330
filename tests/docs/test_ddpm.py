"""The loop written by hand in docs/ddpm.md, run with minidiff and, its imports changed, with the reference."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.theirs import diffusers, randomize, relative_error

PAGE = Path(__file__).parents[2] / "docs/ddpm.md"
CHECKPOINT = '"google/ddpm-cat-256"'
IMPORTS = "from minidiff import DDPMScheduler, UNet2DModel\n"


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The block of the page, with a tiny checkpoint that the reference has saved as the published ones are laid out."""
    unet = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    randomize(unet).save_pretrained(tmp_path)
    diffusers.DDPMScheduler().save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)  # the block writes a picture
    (block,) = re.findall(r"```python\n# tutorial\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert block.count(CHECKPOINT) == block.count(IMPORTS) == 1
    return block.replace(CHECKPOINT, repr(str(tmp_path)))


def run(code: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), namespace)
    return namespace


def test_the_picture_is_the_same(code: str) -> None:
    ours = run(code)
    changed = code.replace(IMPORTS, IMPORTS.replace("minidiff", "diffusers"))
    assert "minidiff" not in changed
    theirs = run(changed)
    assert ours["model"].__module__.startswith("minidiff.") and theirs["model"].__module__.startswith("diffusers.")
    assert ours["pixels"].std() > 0.05  # not a flat picture
    assert relative_error(ours["x"], theirs["x"]) <= 2e-6  # float32; measured: 2e-7
    a, b = (np.asarray(names["image"]).astype(int) for names in (ours, theirs))
    assert a.shape == b.shape == (16, 16, 3)
    assert np.abs(a - b).max() <= 1  # measured: 0
