"""The embedded checkpoint: complete, small, described, true to its names, and loaded by diffusers."""

import re

import pytest
import torch

from minidiff import DDPMScheduler, PNDMScheduler, StableDiffusionPipeline
from minidiff.embedded import GUIDANCE, embedded_checkpoint
from weights.emoji_quality import measure
from weights.emoji_reference import groups_of, read_reference

FOLDER = embedded_checkpoint("emoji64")
# Right with each of the seeds 0, 100 and 200 at 12 steps, and the second nearest at least 1.5 times as far.
NAMES = ["red apple", "sparkling heart", "taxi", "large orange circle", "octopus", "anchor"]


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_weights_are_at_most_32_megabytes():
    files = [path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(files) <= 32 * 10**6


def test_card_is_complete_and_agrees_with_the_weights(pipe):
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", card, re.M) == ["Quality", "Architecture", "Training", "Licence"]
    assert not re.search(r"\{[a-z_]*\}|not measured", card)
    networks = {"autoencoder": pipe.vae, "text encoder": pipe.text_encoder, "UNet": pipe.unet}
    for name, network in networks.items():
        assert f"{name} {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M" in card
    assert float(re.search(r"\*\*([\d.]+)%\*\* compared at 64x64", card)[1]) >= 50
    assert (FOLDER / "OFL.txt").read_text(encoding="utf-8").startswith("SIL OPEN FONT LICENSE")


def test_pictures_are_what_the_names_say(pipe):
    reference = read_reference()
    out = pipe(NAMES, num_inference_steps=12, guidance_scale=GUIDANCE, seed=0, output_type="pt").images
    assert out.shape == (len(NAMES), 3, 64, 64) and out.isfinite().all()
    assert measure(out, [reference.names.index(name) for name in NAMES], reference).right == [True] * len(NAMES)


@pytest.mark.parametrize("scheduler", [DDPMScheduler, PNDMScheduler])
def test_its_configuration_suits_the_other_schedulers(pipe, scheduler):
    config = scheduler.from_config(pipe.scheduler.config).config
    assert config.get("clip_sample", False) is False and config.get("skip_prk_steps", True) is True


def test_diffusers_loads_the_folder_and_draws_the_same(pipe):
    from tests.theirs import diffusers

    # left to itself, transformers keeps the float16 of the text encoder's file and diffusers does not
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    call = {"prompt": "red apple", "num_inference_steps": 5, "guidance_scale": GUIDANCE, "output_type": "np"}
    a, b = (p(**call, generator=torch.Generator().manual_seed(0)).images for p in (pipe, theirs))
    error = abs(a - b).max()  # measured: 3.0e-6
    assert error < 1e-4


def test_the_reference_sheet_has_every_name_and_finds_duplicates():
    reference = read_reference()
    assert reference.pictures.shape == (len(reference.names), 3, 64, 64) and len(reference.groups) == len(
        reference.names
    )
    assert len(reference.names) == 1636
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    pictures = torch.cat([white, white - 1, white, white - 2])
    assert groups_of(pictures, ["a", "b", "c", "b"]) == [0, 1, 0, 1]


def test_measure_counts_the_nearest_picture_at_both_sizes():
    reference = read_reference()
    chosen = [10, 200, 999]
    pictures = reference.pictures[[10, 200, 998]]
    quality = measure(pictures, chosen, reference)
    assert quality.right == [True, True, False]
    assert quality.at_16 == quality.at_64 == pytest.approx(2 / 3)
