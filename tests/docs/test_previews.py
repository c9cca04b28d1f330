"""docs/previews.md: its code, run on the embedded checkpoint, and its figure."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from docs.figures import film_strip
from minidiff.embedded import embedded_checkpoint

PAGE = (Path(__file__).parents[2] / "docs/previews.md").read_text(encoding="utf-8")
CHECKPOINT = "weights/emoji64"


def test_the_code_runs() -> None:
    (code,) = re.findall(r"```python\n# tutorial\n(.*?)```", PAGE, re.S)
    assert code.count(CHECKPOINT) == 1
    short = code.replace(CHECKPOINT, str(embedded_checkpoint())).replace(
        "num_inference_steps=20", "num_inference_steps=2"
    )
    namespace: dict[str, Image.Image] = {}
    exec(compile(short, "docs/previews.md", "exec"), namespace)
    assert namespace["picture"].size == (16, 16)
    assert namespace["strip"].size == (8 * 96, 2 * 96)


def test_the_figure_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(film_strip, "STEPS", 2)
    sheet = np.asarray(film_strip.film_strip(), float)
    assert sheet.shape == (4 * 64, 2 * 64, 3)
    linear, decoded, _, other = (sheet[64 * k : 64 * (k + 1), 64:].flatten() for k in range(4))
    own, foreign = (np.corrcoef(linear, row)[0, 1] for row in (decoded, other))
    assert own > foreign + 0.1  # rows belong together; measured: 0.75 and 0.29
