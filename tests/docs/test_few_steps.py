"""The code of docs/few_steps.md, run with minidiff and, its imports changed, with the reference; and its timesteps."""

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import minidiff
from tests.loras import attention, draw, peft
from tests.theirs import diffusers, randomize
from tests.tiny_xl import save_base

PAGE = (Path(__file__).parents[2] / "docs/few_steps.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n# tutorial\n(.*?)^```", PAGE, re.M | re.S)
BASE = "stabilityai/stable-diffusion-xl-base-1.0"
LIGHTNING = 'hf_hub_download("ByteDance/SDXL-Lightning", "sdxl_lightning_4step_unet.safetensors")'
LORA = {  # repository -> the files that the page asks for
    "latent-consistency/lcm-lora-sdxl": ["pytorch_lora_weights"],
    "ByteDance/Hyper-SD": ["Hyper-SDXL-4steps-lora", "Hyper-SDXL-1step-lora"],
    "h1t/TCD-SDXL-LoRA": ["pytorch_lora_weights"],
    "wangfuyun/PCM_Weights": ["sdxl/pcm_sdxl_smallcfg_4step_converted"],
    "tianweiy/DMD2": ["dmd2_sdxl_4step_lora"],
}
SPACINGS = re.findall(r"^\| `(\w+)` \| ([\d, ]+) \| (\d+) \|$", PAGE, re.M)
SETTINGS = {  # what the diffusion of SDXL and 1.x is
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny checkpoints in place of those that the page names, their files named as the page asks for them."""
    root = tmp_path_factory.mktemp("few_steps")
    base = save_base(root / "base")
    told = diffusers.UNet2DConditionModel.load_config(base / "unet") | {"time_cond_proj_dim": 9}
    randomize(diffusers.UNet2DConditionModel.from_config(told), seed=3).save_pretrained(root / "lcm")
    turbo = diffusers.DiffusionPipeline.from_pretrained(base)
    turbo.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(
        turbo.scheduler.config, timestep_spacing="trailing"
    )
    turbo.save_pretrained(root / "turbo")
    found = {f'"{BASE}"': root / "base", '"latent-consistency/lcm-sdxl"': root / "lcm"}
    found['"stabilityai/sdxl-turbo"'] = root / "turbo"
    found[LIGHTNING] = root / "lightning.safetensors"
    found[LIGHTNING].write_bytes((base / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    for folder in (root / "base", root / "lcm", root / "turbo"):
        for path in folder.rglob("*.safetensors"):
            path.rename(path.with_suffix(".fp16.safetensors"))
    for k, (repository, files) in enumerate(LORA.items()):
        tensors = peft(draw(turbo, seed=k + 1, only=attention))
        for file in files:
            path = root / f"lora{k}" / f"{file}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: value.float().contiguous() for name, value in tensors.items()}, path)
        found[f'"{repository}"'] = root / f"lora{k}"
    return {name: repr(str(path)) for name, path in found.items()}


def pictures(code: list[str], places: dict[str, str]) -> list[np.ndarray]:
    """Run the blocks one after the other; return the picture that each ends with."""
    names: dict[str, Any] = {"torch": torch}
    drawn = []
    for k, block in enumerate(code):
        for name, place in places.items():
            block = block.replace(name, place)
        # The page draws from the global generator, and so does the reference when it loads a LoRA.
        block = re.sub(r"^image = ", f"torch.manual_seed({k})\\nimage = ", block, flags=re.M)
        exec(compile(block, "docs/few_steps.md", "exec"), names)
        assert isinstance(names["image"], Image.Image)
        drawn.append(np.asarray(names.pop("image")).astype(int))
    return drawn


def test_the_pictures_are_the_same(places: dict[str, str]) -> None:
    text = "\n".join(BLOCKS)
    assert all(name in text for name in places) and "seed" not in text
    code = [block.replace("from minidiff import", "from diffusers import") for block in BLOCKS]
    ours, theirs = pictures(BLOCKS, places), pictures(code, places)
    assert len(ours) == 10
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape == (32, 32, 3) and a.std() > 10  # it shows something
        assert np.abs(a - b).max() <= 1  # measured: 1, in image to image; 0 elsewhere
    assert all((a != b).any() for a, b in itertools.pairwise(ours))


@pytest.mark.parametrize("row", SPACINGS, ids=lambda row: row[0])
def test_the_table_of_timesteps(row: tuple[str, str, str]) -> None:
    spacing, four, one = row
    for kind in (minidiff.EulerDiscreteScheduler, minidiff.DDIMScheduler):
        scheduler = kind(**SETTINGS, timestep_spacing=spacing)
        assert scheduler.plan(4).times == tuple(map(int, four.split(", ")))
        assert scheduler.plan(1).times == (int(one),)


def test_what_else_the_page_says() -> None:
    """Timesteps of the consistency samplers, and the numbers of the reasons."""
    assert len(SPACINGS) == 3
    for kind in (minidiff.LCMScheduler, minidiff.TCDScheduler):
        assert kind().plan(4).times == (999, 759, 499, 259)
        assert kind(timestep_spacing="leading").plan(4).times == kind(timestep_spacing="trailing").plan(4).times
    assert "999, 759, 499, 259" in PAGE
    ddim = minidiff.DDIMScheduler(**SETTINGS)
    alpha, level = ddim.alphas_cumprod.sqrt(), ddim._training_sigmas()
    assert f"is {alpha[999]:.3f}" in " ".join(PAGE.split()) and "15 times" in PAGE and round(level[999]) == 15
    assert f"level is {level[751]:.1f}" in " ".join(PAGE.split()) and f"level {level[999]:.1f}" in PAGE
    assert minidiff.EulerDiscreteScheduler(**SETTINGS, timestep_spacing="leading").plan(50).times[0] == 981
    dpm = minidiff.DPMSolverMultistepScheduler(**SETTINGS, timestep_spacing="leading")
    assert dpm.plan(1).times == (501,)


def test_the_classes_of_the_table_are_there() -> None:
    named = set(re.findall(r"`(\w+Scheduler)`", PAGE))
    assert named <= set(minidiff.__all__) and len(named) > 4
    for target in re.findall(r"\]\(#([\w-]+)\)", PAGE):
        assert target in [title.lower() for title in re.findall(r"^## (.*)$", PAGE, re.M)]
