"""The embedded unconditional checkpoint: small, described, and the same pictures with the reference, seed for seed."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import minidiff
from minidiff.cli import main as cli
from minidiff.embedded import embedded_checkpoint, embedded_names
from minidiff.images.tensors import read_metadata
from weights.emoji32_quality import RUNS, contact_sheet, measure, nearest, shrink
from weights.emoji_reference import Reference

FOLDER = embedded_checkpoint("emoji32-ddpm")
PIPELINES = ["DDPMPipeline", "DDIMPipeline"]


def load(library, name: str):
    pipe = getattr(library, name).from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_found_by_its_name_and_at_most_12_megabytes():
    assert embedded_names() == ["emoji32-ddpm", "emoji64"]
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 12 * 10**6


def test_card_is_complete_and_agrees_with_the_weights():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", card, re.M) == [
        "Quality",
        "Limits",
        "Architecture",
        "Training",
        "Licence",
    ]
    assert not re.search(r"\{[a-z_]*\}|not measured", card)
    count = sum(p.numel() for p in load(minidiff, "DDPMPipeline").unet.parameters())
    assert f"{count / 1e6:.2f} M parameters" in card
    for name, steps in RUNS:
        assert f"| {name}, {steps} steps |" in card
    assert (FOLDER / "OFL.txt").read_text(encoding="utf-8").startswith("SIL OPEN FONT LICENSE")


@pytest.mark.parametrize("name", PIPELINES)
def test_the_pictures_are_those_of_the_reference(name):
    from tests.theirs import diffusers

    shown = []
    for library in (minidiff, diffusers):
        out = load(library, name)(2, num_inference_steps=5, generator=torch.Generator().manual_seed(0))
        shown.append(np.stack([np.asarray(image) for image in out.images]).astype(int))
    ours, theirs = shown
    assert ours.shape == (2, 32, 32, 3)
    assert ours.std(axis=(1, 2, 3)).min() > 20  # no flat picture
    assert np.abs(ours - theirs).max() <= 1  # measured: 0


def test_it_draws_emoji_and_not_noise():
    pipe = load(minidiff, "DDIMPipeline")
    out = pipe(8, num_inference_steps=12, seed=0, output_type="pt").images
    assert out.shape == (8, 3, 32, 32) and out.isfinite().all()
    corners = out[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].mean(dim=1)  # (B, 4): emoji stand on white
    assert (corners > 0.9).float().mean() > 0.7  # measured: 1.0
    rough = (out[..., 1:] - out[..., :-1]).abs().mean()  # of noise in [0, 1]: 0.33
    assert rough < 0.12  # measured: 0.07


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_other_schedulers_draw_with_it(name):
    pipe = load(minidiff, "DDPMPipeline")
    pipe.scheduler = getattr(minidiff, name).from_config(pipe.scheduler.config)
    picture = pipe(1, num_inference_steps=6, seed=0, output_type="pt").images
    assert picture.isfinite().all() and 0.1 < picture.std() < 0.5


def test_the_command_line_draws_it_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = "generate --model emoji32-ddpm --steps 4 --seed 3 --num 2 -o a.png --device cpu"
    assert cli.main(line.split()) == 0
    expected = load(minidiff, "DDPMPipeline")(2, num_inference_steps=4, seeds=[3, 4]).images
    for k, picture in enumerate(expected):
        with Image.open(f"a-{k}.png") as shown:
            assert np.array_equal(shown, picture)
        assert read_metadata(f"a-{k}.png") == {
            "seed": str(3 + k),
            "steps": "4",
            "scheduler": "DDPMScheduler",
            "checkpoint": "emoji32-ddpm",
            "size": "32x32",
            "dtype": "float32",
            "minidiff": minidiff.__version__,
        }


def test_copies_are_told_from_mixtures(rng):
    pictures = torch.rand(5, 3, 64, 64, generator=rng)
    pictures[4] = pictures[3]
    reference = Reference(pictures, list("abcde"), [0, 1, 2, 3, 3])
    small = shrink(pictures)
    mixture = (small[0] + small[1]) / 2
    found = nearest(torch.stack([small[2] + 0.01, small[4], mixture]), reference)
    assert found.index[0] == 2 and found.index[1] in (3, 4) and found.index[2] in (0, 1)
    torch.testing.assert_close(found.d1, torch.tensor([0.01, 0.0, found.d2[2].item()]), atol=1e-4, rtol=0)
    assert found.d2[1] > 0.1  # equal training pictures are one
    assert measure(found) == {"copies": pytest.approx(2 / 3, abs=1e-4), "distance": 0.01, "met": 3}


def test_the_sheet_shows_each_picture_and_its_nearest(rng):
    pictures = torch.rand(40, 3, 64, 64, generator=rng)
    reference = Reference(pictures, [str(i) for i in range(40)], list(range(40)))
    drawn = shrink(pictures).flip(0)
    sheet = np.asarray(contact_sheet(drawn, reference, nearest(drawn, reference)))
    assert sheet.shape == (6 * 64, 13 * 64, 3)
    assert (sheet[:, : 6 * 64] == sheet[:, 7 * 64 :]).all() and (sheet[:, 6 * 64 : 7 * 64] == 255).all()
