"""The benchmarks' own logic: what finds a fault must find it, and what prints a figure must print the right one."""

import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from theirs import carry_over, diffusers, randomize, transformers
from tiny import TEXT, UNET, VAE, save_tiny

import minidiff

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last, so that minidiff stays the installed one
from benchmarks.parity import components, locate, page, pictures
from benchmarks.parity.__main__ import main as parity
from benchmarks.parity.both import Both
from benchmarks.speed import report
from benchmarks.speed.timing import Measured, in_turn


@dataclasses.dataclass
class Parts:
    """A pipeline, as far as the comparison of networks looks at it."""

    components: dict

    def __getattr__(self, name):
        return self.components[name]


@pytest.fixture(scope="module")
def both():
    text = transformers.CLIPTextConfig(**TEXT, vocab_size=600)
    theirs = {
        "unet": randomize(diffusers.UNet2DConditionModel(**UNET), seed=1),
        "vae": randomize(diffusers.AutoencoderKL(**VAE), seed=2),
        "text_encoder": randomize(transformers.CLIPTextModel(text), seed=3),
    }
    ours = {
        "unet": minidiff.UNet2DConditionModel(**UNET),
        "vae": minidiff.AutoencoderKL(**VAE),
        "text_encoder": minidiff.CLIPTextModel(minidiff.CLIPTextConfig(**TEXT, vocab_size=600)),
    }
    return Both(Parts({name: carry_over(theirs[name], one) for name, one in ours.items()}), Parts(theirs))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_the_first_wrong_layer_is_named(part, both):
    ours, theirs = both.networks()[part]
    assert locate.first_departure(ours, theirs) is None
    broken = copy.deepcopy(ours)
    state = broken.state_dict()
    first, second = pair_of_equal_shape(part, state)
    state[first], state[second] = state[second].clone(), state[first].clone()
    broken.load_state_dict(state)
    found = locate.first_departure(broken, theirs)
    assert found.module == first.rpartition(".")[0]
    assert found.weights_differ == [first]
    assert found.input_relative <= 1e-12
    row = next(row for row in ours.rows() if first in row.ours)
    assert (first, row.hub[0], row.ldm[0]) in found.names or len(row.hub) > 1
    text = locate.describe(found, part)
    assert first in text and row.hub[0] in text and row.ldm[0] in text


def pair_of_equal_shape(part, state):
    """Two weights of one shape that are used one after the other."""
    wanted = {"unet": "up.1.res.", "vae": "decoder.up.2.res.", "text_encoder": "layers."}[part]
    end = {"unet": "conv2.weight", "vae": "conv2.weight", "text_encoder": "norm1.weight"}[part]
    names = [name for name in state if name.startswith(wanted) and name.endswith(end)]
    return names[0], names[1]


def test_components_are_compared(both):
    rows = list(components.compare(both, ("float64", "float32", "bfloat16"), torch.device("cpu")))
    outputs = {row.what for row in rows}
    assert {
        "unet: prediction",
        "unet: prediction, optimized",
        "vae: picture of latents",
        "text_encoder: pooled",
    } <= outputs
    bounds = {"float64": 1e-12, "float32": 1e-4, "bfloat16": 0.2}
    assert all(row.relative <= bounds[row.dtype] for row in rows)
    precise, coarse = (
        next(r for r in rows if (r.what, r.dtype) == ("unet: prediction", d)) for d in ("float32", "bfloat16")
    )
    assert 1e-8 < precise.their_precision < coarse.their_precision / 100  # a copy was rounded, not the network
    text = components.table(rows)
    assert text.count("\n") == len(rows) + 1

    wrong = copy.deepcopy(both.ours.components["vae"])
    wrong.decoder.conv_in.bias.data += 0.01
    rows = list(components.compare(Both(Parts({"vae": wrong}), both.theirs), ("float64",), torch.device("cpu")))
    assert {row.what: row.relative > 1e-9 for row in rows} == {
        "vae: moments of a picture": False,
        "vae: picture of latents": True,
    }


def test_pictures_and_page():
    a, b = Image.new("RGB", (4, 4), (10, 20, 30)), Image.new("RGB", (4, 4), (10, 20, 30))
    b.putpixel((1, 2), (10, 22, 30))
    different = pictures.Picture("a <scheduler>", a, b)
    assert different.levels.max() == 2 and different.amplified.getpixel((1, 2)) == (0, 102, 0)
    assert "| a <scheduler> | 2 | 1 of 48 | no |" in pictures.table([different])
    assert "| same | 0 | 0 of 48 | yes |" in pictures.table([pictures.Picture("same", a, a)])
    text = page.page("title", [("Tables", "| x | y |\n|---|---|\n| 1 | 2 |"), ("Text", "a & b")], [different])
    assert "<th>x</th><th>y</th>" in text and "<td>1</td><td>2</td>" in text
    assert "a &amp; b" in text and "a &lt;scheduler&gt;" in text and text.count("data:image/png;base64,") == 3


def test_speed_figures():
    row = Measured("unet", "sd15 UNet step, guided, 1 x 512x512", "float32", {}, flop=4e9)
    row.figures = {
        "ours": [4.0, 4.0, 5.0],
        "ours, optimized": [2.0, 1.0, 2.0],
        "theirs": [4.0, 4.0, 4.0],
        "theirs, x": [8.0] * 3,
    }
    assert (row.best("ours"), row.best("theirs")) == ("ours, optimized", "theirs")
    assert row.ratio("ours, optimized", "theirs") == (0.5, 0.25, 0.5)
    text = report.table([row], {"float32": {"mm": 4.0}})
    assert "| 4.00 s, 2.00 s optimized | 4.00 s, 8.00 s x | 0.50 (0.25 to 0.50) | 2 GFLOP/s, 50% of the peak |" in text
    assert "| ours, optimized | theirs | 0.75 | 0.50 |" in report.bounds([row])
    row.figures["ours, optimized"] = [3.9] * 3
    assert "0.75 | 0.97 **not met** |" in report.bounds([row])


def test_in_turn():
    order = []
    seconds = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, torch.device("cpu"))
    assert order == ["a", "b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_a_whole_certificate(tmp_path, capsys):
    """A folder, the same as a single file, and a broken copy of the folder."""
    folder, single, broken = save_tiny(tmp_path / "hub"), tmp_path / "single.safetensors", tmp_path / "broken"
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(folder)
    pipe.save_single_file(single)
    state = pipe.vae.state_dict()
    pipe.vae.load_state_dict(state | {"decoder.conv_in.bias": state["decoder.conv_in.bias"] + 0.1})
    pipe.save_pretrained(broken)

    options = ["--dtype", "float64", "--steps", "1", "--combinations", "0", "--out", str(tmp_path / "report")]
    assert parity([str(folder), *options]) == 0
    report = json.loads((tmp_path / "report" / "parity.json").read_text())
    assert len(report["pictures"]) == 17 and max(p["levels"] for p in report["pictures"]) <= 1
    assert max(row["relative"] for row in report["networks"]) <= 1e-12
    assert "inpainting" in (tmp_path / "report" / "parity.md").read_text()
    assert (tmp_path / "report" / "parity.html").read_text().count("data:image/png") == 3 * 17

    assert parity([str(single), "--config", str(folder), *options]) == 0
    capsys.readouterr()
    assert parity([str(broken), "--reference", str(folder), *options]) == 1
    said = capsys.readouterr().out
    assert "the first that departs is decoder.conv_in " in said
    assert "these weights are not the reference's: decoder.conv_in.bias" in said
