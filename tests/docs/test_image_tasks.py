"""docs/image_tasks.md: its code, run with minidiff and, its imports changed, with the reference; and its table."""

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minidiff import EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from minidiff.embedded import embedded_checkpoint
from minidiff.pipelines.strength import last_steps

PAGE = (Path(__file__).parents[2] / "docs/image_tasks.md").read_text(encoding="utf-8")
CHECKPOINT = "weights/emoji64"
PICTURES = ("image", "redrawn", "repainted")
ROWS = re.findall(r"^\| (\d+) \| ([\d.]+) \| (\d+) \| (\w+) \| (\w+) \| (\w+) \|$", PAGE, re.M)
SCHEDULERS = (EulerDiscreteScheduler(), HeunDiscreteScheduler(), PNDMScheduler(skip_prk_steps=True))


def pictures(code: str) -> list[np.ndarray]:
    """Run the block on the embedded checkpoint, wherever it is installed."""
    namespace = {}
    assert code.count(CHECKPOINT) == 1
    exec(compile(code.replace(CHECKPOINT, str(embedded_checkpoint())), "docs/image_tasks.md", "exec"), namespace)
    return [np.asarray(namespace[name]).astype(int) for name in PICTURES]


def test_the_pictures_are_the_same():
    (code,) = re.findall(r"```python\n# tutorial\n(.*?)```", PAGE, re.S)
    assert code.count("from minidiff import") == 1
    theirs = pictures(code.replace("from minidiff import", "from diffusers import"))
    for ours, other in zip(pictures(code), theirs, strict=True):
        assert ours.shape == other.shape == (64, 64, 3)
        assert ours.std() > 20  # it shows something
        assert np.abs(ours - other).max() <= 1  # measured: 1, in one value of 36,864


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_the_table_counts_evaluations(row: tuple[str, ...]) -> None:
    steps, strength, taken = int(row[0]), float(row[1]), int(row[2])
    assert taken == int(steps * strength)
    request = SimpleNamespace(strength=strength, timesteps=None, sigmas=None)
    for scheduler, expected in zip(SCHEDULERS, row[3:], strict=True):
        plan = scheduler.plan(steps)
        if expected == "error":
            with pytest.raises(ValueError, match="leaves no step"):
                last_steps(scheduler, plan, request)
        else:
            part = last_steps(scheduler, plan, request)
            assert len(part.coefficients) - part.start == int(expected)


def test_there_is_a_table():
    assert len(ROWS) == 5
