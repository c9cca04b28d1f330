"""The loop written by hand in docs/internals.md, run with minidiff and, its imports changed, with the reference."""

import re
from pathlib import Path

import numpy as np

from minidiff.embedded import embedded_checkpoint

PAGE = Path(__file__).parents[2] / "docs/internals.md"
CHECKPOINT = "weights/emoji64"
REFERENCE = {
    "from minidiff import AutoencoderKL, UNet2DConditionModel, UniPCMultistepScheduler": "diffusers",
    "from minidiff import CLIPTextModel, CLIPTokenizer": "transformers",
}


def tutorial() -> str:
    (block,) = re.findall(r"```python\n# tutorial\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    return block


def with_the_reference(code: str) -> str:
    for line, library in REFERENCE.items():
        assert code.count(f"{line}\n") == 1
        code = code.replace(line, line.replace("minidiff", library))
    assert "minidiff" not in code
    return code


def picture(code: str) -> np.ndarray:
    """Run the block on the embedded checkpoint, wherever it is installed."""
    namespace = {}
    assert code.count(CHECKPOINT) == 1
    exec(compile(code.replace(CHECKPOINT, str(embedded_checkpoint())), str(PAGE), "exec"), namespace)
    return np.asarray(namespace["image"]).astype(int)


def test_the_picture_is_the_same():
    ours, theirs = picture(tutorial()), picture(with_the_reference(tutorial()))
    assert ours.shape == theirs.shape == (64, 64, 3)
    assert ours.std() > 20  # it shows something
    assert np.abs(ours - theirs).max() <= 1  # measured: 1, in one value of 12,288
