"""The code of docs/sdxl.md, run with minidiff and, its import changed, with the reference, on tiny checkpoints."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import minidiff
from tests.theirs import diffusers
from tests.tiny_xl import save_base, save_refiner

PAGE = Path(__file__).parents[2] / "docs/sdxl.md"
IMPORT = "from minidiff import DiffusionPipeline\n"
PICTURES = ["image", "two_texts", "cropped", "sharp", "refined"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny checkpoints in place of those that the page names, their files named as the page asks for them."""
    found = {
        "stabilityai/stable-diffusion-xl-base-1.0": save_base(tmp_path_factory.mktemp("base")),
        "stabilityai/stable-diffusion-xl-refiner-1.0": save_refiner(tmp_path_factory.mktemp("refiner")),
    }
    for folder in found.values():
        for path in folder.rglob("*.safetensors"):
            path.rename(path.with_suffix(".fp16.safetensors"))
    return found


def tutorial(checkpoints: dict[str, Path]) -> str:
    """Return the code of the page, on the CPU, in float32 and with fewer steps."""
    code = "\n".join(re.findall(r"^```python\n# tutorial\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S))
    for name, folder in checkpoints.items():
        assert code.count(f'"{name}"') == 1
        code = code.replace(f'"{name}"', repr(str(folder)))
    assert code.count(IMPORT) == 1 and "seed" not in code  # nothing that only minidiff has
    code = code.replace("num_inference_steps=20", "num_inference_steps=5")  # of the pictures beside the ensemble
    return code.replace('"cuda"', '"cpu"').replace("torch.float16", "torch.float32")


def run(code: str) -> dict[str, Any]:
    torch.manual_seed(0)  # the page draws from the global generator
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def test_the_pictures_are_the_same(checkpoints: dict[str, Path]) -> None:
    code = tutorial(checkpoints)
    ours = run(code)
    theirs = run(code.replace(IMPORT, IMPORT.replace("minidiff", "diffusers")))
    assert type(ours["refiner"]) is minidiff.StableDiffusionXLImg2ImgPipeline
    assert type(theirs["refiner"]) is diffusers.StableDiffusionXLImg2ImgPipeline
    assert [name for name, value in ours.items() if isinstance(value, Image.Image)] == PICTURES
    for name in PICTURES:
        a, b = (np.asarray(names[name]).astype(int) for names in (ours, theirs))
        assert a.shape == b.shape and a.std() > 10  # it shows something
        assert np.abs(a - b).max() <= 1, name
