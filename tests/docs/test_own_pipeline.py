"""The pipeline of docs/own_pipeline.md, run with minidiff and, its imports changed, with the reference."""

import re
from pathlib import Path

import numpy as np

from minidiff.embedded import embedded_checkpoint

PAGE = Path(__file__).parents[2] / "docs/own_pipeline.md"


def tutorial() -> str:
    (block,) = re.findall(r"```python\n# tutorial\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    return block


def with_the_reference(code: str) -> str:
    line = "from minidiff import AutoencoderKL, CLIPTextModel, CLIPTokenizer, DDIMScheduler, UNet2DConditionModel\n"
    assert code.count(line) == 1
    theirs = "from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel\n"
    theirs += "from transformers import CLIPTextModel, CLIPTokenizer\n"
    return re.sub(r"^from minidiff", "from diffusers", code.replace(line, theirs), flags=re.M)


def run(code: str, folder: Path) -> dict:
    code = code.replace("weights/emoji64", str(embedded_checkpoint())).replace("two-prompts", str(folder))
    namespace = {"__name__": "own"}
    exec(compile(code, str(PAGE), "exec"), namespace)
    return namespace


def test_the_class_is_short_and_draws_the_same_picture(tmp_path: Path) -> None:
    lines = tutorial().splitlines()
    assert (
        lines.index('pipe = TwoPromptsPipeline.from_pretrained("weights/emoji64", torch_dtype=torch.float32)') <= 46
    )  # imports included
    runs = [run(tutorial(), tmp_path / "ours"), run(with_the_reference(tutorial()), tmp_path / "theirs")]
    ours, theirs = (np.asarray(one["image"]).astype(int) for one in runs)
    assert ours.shape == theirs.shape == (64, 64, 3) and ours.std() > 20  # it shows something
    assert np.abs(ours - theirs).max() <= 1  # of 255: measured 0, the same pixels
    for one in runs:
        assert one["again"].config.switch == 0.5 and one["pipe"].config.switch == 0.3
    heart = runs[0]["pipe"]("red heart", "red heart", generator=runs[0]["torch"].Generator().manual_seed(1))
    assert np.abs(np.asarray(heart).astype(int) - ours).max() > 5  # the first prompt counts: measured 13


def test_a_part_of_your_own() -> None:
    (code,) = re.findall(r"```python\n# part\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    found = run(code, PAGE)
    pipe, image, call = found["pipe"], np.asarray(found["image"]), {"num_inference_steps": 12, "guidance_scale": 2.0}
    assert image.std() > 20  # it shows something
    other = pipe("red apple with a very long stem", **call, seed=0).images[0]
    assert (image == np.asarray(pipe("red apple pie", **call, seed=0).images[0])).all()  # the same first three tokens
    assert (np.asarray(other) == image).all()
    pipe.tokens = 77
    plain = found["StableDiffusionPipeline"](**pipe.components)("red apple", **call, seed=0).images[0]
    assert (np.asarray(pipe("red apple", **call, seed=0).images[0]) == np.asarray(plain)).all()
    assert (np.asarray(plain) != image).any()
