"""What draws the pictures of the documentation, as far as it computes something."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from docs.figures import adapter_forms, clip_image, edm_levels, few_steps_sheet, pruned_unets, scheduler_sheet
from docs.figures.table import table

ROOT = Path(__file__).parents[2]


def test_every_picture_is_shown_and_drawn_by_a_script() -> None:
    """But for the contact sheets of the embedded checkpoints, which the scripts that measure these draw."""
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/figures").glob("*.py"))
    pictures = [path.name for path in (ROOT / "docs").iterdir() if path.suffix in (".png", ".webp", ".svg")]
    others = {"emoji64.png", "emoji32-ddpm.png"}
    assert len(pictures) > 15 and others < set(pictures)
    assert not [name for name in pictures if name not in others and (f"({name})" not in pages or name not in scripts)]


def test_pruned_unets() -> None:
    """The picture is that of the networks, whose sizes are the published ones, and has a bar for each transformer."""
    picture = pruned_unets.svg()
    assert picture == (ROOT / "docs/pruned_unets.svg").read_text(encoding="utf-8")
    fills = [
        element.get("fill") for element in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}rect")
    ]
    networks = [pruned_unets.read(name) for row in pruned_unets.ROWS for name in row]
    cells = [cell for network in networks for cell in (*network.down, *network.up, network.middle)]
    assert fills.count(pruned_unets.BLUE) == sum(len(cell.depths) for cell in cells) + 1  # the legend's
    bars = fills.count(pruned_unets.ORANGE) + fills.count(pruned_unets.LIGHT)
    assert bars == sum(sum(cell.depths) for cell in cells) + 2
    # https://huggingface.co/segmind: 50% and 70% smaller than SDXL; KOALA, arXiv 2312.04005, table 3: 1.16 B and 782 M.
    sizes = [network.parameters / 1e6 for network in networks]
    assert sizes == pytest.approx([860, 579, 323, 328, 316, 2567, 1331, 745, 1161, 783], abs=0.6)
    assert sum(sum(cell.depths) for cell in (*networks[5].down, *networks[5].up, networks[5].middle)) == 70  # SDXL's


@pytest.mark.parametrize("network", edm_levels.NETWORKS)
def test_edm_levels(network: str) -> None:
    sigma = torch.tensor([0.002, 0.5, 1.0, 80.0])
    data = {"Playground v2.5": 0.5, "CosXL": 1.0}[network]
    c_in, c_skip, c_out = edm_levels.surroundings(network, sigma).values()
    variance = sigma**2 + data**2
    assert torch.allclose(c_in**2 * variance, torch.ones(4)) and torch.allclose(
        c_skip * variance, torch.tensor(data**2)
    )
    assert torch.allclose(c_out, sigma * data / variance.sqrt() * (1 if network == "Playground v2.5" else -1))
    karras, exponential = (edm_levels.levels(network, name) for name in ("karras", "exponential"))
    for levels, straight in ((karras, karras ** (1 / 7)), (exponential, exponential.log())):
        ends = torch.tensor([{"Playground v2.5": 80.0, "CosXL": 120.0}[network], 0.002])
        assert levels.shape == (10,) and torch.allclose(levels[[0, -1]], ends, rtol=1e-4)
        assert torch.allclose(straight.diff(), straight.diff().mean(), rtol=1e-4)


def test_clip_image() -> None:
    stripes = Image.fromarray(np.repeat(np.eye(3, dtype=np.uint8) * 255, 64, axis=0)[None].repeat(64, axis=0))
    shown = clip_image.stages(stripes)
    assert list(shown)[:3] == ["192x64", "resized, 672x224", "its middle, 224x224"]
    red, green, blue = list(shown)[3:]  # (0 - mean) / std, and (1 - mean) / std
    assert red.startswith("red, -1.79 to ") and blue.startswith("blue, -1.48 to ") and green.endswith(" to 2.07")
    middle = np.asarray(shown["its middle, 224x224"])
    assert (middle[:, 20:-20] == (0, 255, 0)).all()
    assert clip_image.sheet(shown).size == (680, 2 * 140)


@pytest.mark.parametrize("script", [few_steps_sheet, scheduler_sheet])
def test_labels_are_drawn_once(script: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time that they are drawn over themselves they become coarser."""
    monkeypatch.setattr(script, "draw", lambda *_: Image.new("RGB", (64, 64)))
    labels = []
    for steps in (script.STEPS, script.STEPS[:1]):
        monkeypatch.setattr(script, "STEPS", steps)
        labels.append(np.asarray(script.sheet("a prompt", 0).crop((0, 0, script.LEFT, 500))))
    assert (labels[0] < 255).any() and (labels[0] == labels[1]).all()


def test_adapter_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each form is trained once, loads, and changes the pictures, the more the larger its weight."""
    known = json.loads(adapter_forms.NAMES.read_text(encoding="utf-8"))["names"]
    assert set(adapter_forms.SHOWN) <= set(known)
    for name, value in {"DRAWN": 2, "BATCH": 2, "LEARNING_RATE": 0.2, "SHOWN": ("penguin", "rocket")}.items():
        monkeypatch.setattr(adapter_forms, name, value)
    monkeypatch.setattr(adapter_forms, "FORMS", {name: adapter_forms.FORMS[name] for name in ("DoRA", "LoKr")})
    assert len(set(adapter_forms.names())) == 2 and not set(adapter_forms.names()) & set(adapter_forms.SHOWN)
    assert set(adapter_forms.SHOWN) <= set(
        json.loads((ROOT / adapter_forms.NAMES).read_text(encoding="utf-8"))["names"]
    )
    adapter_forms.train_missing(tmp_path, 2)
    monkeypatch.delattr(adapter_forms, "train")
    adapter_forms.train_missing(tmp_path, 2)  # nothing is missing
    drawn = adapter_forms.rows(tmp_path, 2)
    assert len(drawn) == 2 + 2 * len(adapter_forms.FORMS)
    plain, _, *others = (np.stack([np.asarray(image, int) for image in images]) for images in drawn.values())
    for whole, half in zip(others[::2], others[1::2], strict=True):
        assert np.abs(whole - plain).mean() > np.abs(half - plain).mean() > 0.05
    assert table(drawn, adapter_forms.LEFT).size == (adapter_forms.LEFT + 2 * (64 + 4), 4 + len(drawn) * (64 + 4))
