"""The command line: arguments, files, metadata, one-line errors; then the embedded checkpoint from a cold start."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import minidiff
from minidiff import cli
from minidiff.embedded import GUIDANCE, embedded_checkpoint
from minidiff.images import read_metadata


class StandIn:
    """Takes a pipeline's place: remembers the call and paints picture k in the grey level of its seed."""

    def __init__(self) -> None:
        self.scheduler = minidiff.PNDMScheduler(beta_start=0.00085, beta_end=0.012, skip_prk_steps=True)

    def __call__(self, prompt, *, width, height, seeds, **rest):
        self.call = {"prompt": prompt, "width": width, "height": height, "seeds": seeds, **rest}
        images = [Image.new("RGB", (width or 64, height or 64), (seed % 256,) * 3) for seed in seeds]
        return SimpleNamespace(images=images, seeds=seeds)


@pytest.fixture
def pipe(monkeypatch, tmp_path) -> StandIn:
    pipe = StandIn()

    def load(*args):
        pipe.loaded = args
        return pipe

    monkeypatch.setattr(cli, "_load", load)
    monkeypatch.setattr(cli, "embedded_checkpoint", lambda: Path("embedded"))
    monkeypatch.chdir(tmp_path)
    return pipe


def test_every_option_reaches_the_pipeline_and_the_file(pipe, capsys):
    options = "--model here/sd --negative blurry --steps 7 --guidance 3.5 --seed 41 --size 96x64 --dtype bfloat16"
    assert cli.main(["generate", "red apple", "-o", "a.png", "--device", "cpu", *options.split()]) == 0
    assert pipe.loaded == ("here/sd", "bfloat16", "cpu")
    assert pipe.call == {
        "prompt": "red apple",
        "negative_prompt": "blurry",
        "num_inference_steps": 7,
        "guidance_scale": 3.5,
        "width": 96,
        "height": 64,
        "num_images_per_prompt": 1,
        "seeds": [41],
    }
    assert read_metadata("a.png") == {
        "prompt": "red apple",
        "negative": "blurry",
        "seed": "41",
        "steps": "7",
        "scheduler": "PNDMScheduler",
        "guidance": "3.5",
        "checkpoint": "here/sd",
        "size": "96x64",
        "dtype": "bfloat16",
        "minidiff": minidiff.__version__,
    }
    assert capsys.readouterr().out == "a.png  seed 41\n"


def test_defaults(pipe):
    cli.main(["generate", "Red apple, 3/4 view!", "--seed", "0"])
    assert pipe.loaded == (Path("embedded"), "float32", None)
    assert pipe.call["seeds"] == [0]  # a seed of 0 is a seed
    assert pipe.call["width"] is pipe.call["height"] is pipe.call["negative_prompt"] is None
    assert pipe.call["guidance_scale"] == GUIDANCE
    found = read_metadata("red-apple-3-4-view-0.png")
    assert (found["checkpoint"], found["negative"], found["size"]) == ("emoji64", "", "64x64")


def test_default_guidance_is_the_one_of_the_card():
    card = (embedded_checkpoint() / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"guidance(?:_scale=| )([\d.]+\d)", card)) == {str(GUIDANCE)}


def test_default_guidance_of_a_given_checkpoint_is_the_usual_one(pipe):
    cli.main(["generate", "x", "-o", "a.png", "--model", "here/sd"])
    assert pipe.call["guidance_scale"] == 7.5


@pytest.mark.parametrize("prompt, stem", [("", "image"), ("🍎", "image"), ("りんご", "りんご"), ("a" * 90, "a" * 60)])
def test_default_file_name(pipe, tmp_path, prompt, stem):
    cli.main(["generate", prompt, "--seed", "5"])
    assert [path.name for path in tmp_path.iterdir()] == [f"{stem}-5.png"]


def test_seed_is_drawn_anew_and_said(pipe, capsys):
    seeds = set()
    for _ in range(2):
        cli.main(["generate", "x", "-o", "a.png"])
        seed = read_metadata("a.png")["seed"]
        assert pipe.call["seeds"] == [int(seed)]
        assert f"seed {seed}\n" in capsys.readouterr().out
        seeds.add(seed)
    assert len(seeds) == 2


def test_several_pictures_have_a_file_and_a_seed_each(pipe, tmp_path):
    cli.main(["generate", "x", "-o", "a.png", "--num", "3", "--seed", "7"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-0.png", "a-1.png", "a-2.png"]
    for k in range(3):
        assert read_metadata(f"a-{k}.png")["seed"] == str(7 + k)
        assert np.asarray(Image.open(f"a-{k}.png")).max() == 7 + k


@pytest.mark.parametrize("num, rows, cols", [(1, 1, 1), (4, 2, 2), (6, 2, 3), (7, 1, 7)])
def test_grid_is_one_file_with_all_seeds(pipe, tmp_path, num, rows, cols):
    cli.main(["generate", "x", "-o", "a.png", "--num", str(num), "--seed", "1", "--size", "8", "--grid"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    cells = np.asarray(Image.open("a.png"))[::8, ::8, 0]
    assert np.array_equal(cells, np.arange(1, num + 1).reshape(rows, cols))
    assert read_metadata("a.png")["seed"] == ", ".join(map(str, range(1, num + 1)))


@pytest.mark.parametrize("name", ["unipc", "UniPC", "UniPCMultistepScheduler"])
def test_scheduler_by_short_name_or_class_name(pipe, name):
    cli.main(["generate", "x", "-o", "a.png", "--scheduler", name])
    assert type(pipe.scheduler) is minidiff.UniPCMultistepScheduler
    assert pipe.scheduler.config.beta_end == 0.012  # the checkpoint's configuration goes with it
    assert read_metadata("a.png")["scheduler"] == "UniPCMultistepScheduler"


ARGUMENT_ERRORS = [
    ("generate x --scheduler karras", "unknown scheduler 'karras'; known: "),
    ("generate x --scheduler karras", "ddpm (DDPMScheduler), "),
    ("generate x --size 64x", "write the size as 512 or as 768x512 (width x height), not '64x'"),
    ("generate x --steps 0", "--steps: needs a whole number of at least 1, found '0'"),
    ("generate x --num two", "--num: needs a whole number of at least 1, found 'two'"),
    ("generate x --seed -1", "--seed: needs a whole number from 0 to 2^63 - 1, found '-1'"),
    ("generate x --seed 9223372036854775808", "needs a whole number from 0 to 2^63 - 1"),
    ("generate x --guidance strong", "--guidance: invalid float value: 'strong'"),
    ("generate x --dtype int8", "--dtype: invalid choice: 'int8'"),
    ("generate x -o a.jpg", "name one ending in .png, not 'a.jpg'"),
    ("generate", "the following arguments are required: prompt"),
    ("", "the following arguments are required: COMMAND"),
    ("paint x", "invalid choice: 'paint'"),
]


@pytest.mark.parametrize("line, message", ARGUMENT_ERRORS)
def test_argument_errors_are_one_line(line, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(line.split())
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and shown.startswith("minidiff") and message in shown


INPUT_ERRORS = [
    ("generate x -o nowhere/a.png", "the folder nowhere of the output file a.png does not exist"),
    ("generate x -o a.png --device abacus", "the device 'abacus' is not available"),
    ("generate x -o a.png --model ./nowhere", "nowhere"),
    ("generate x -o a.png --model .", "model_index.json"),
]


@pytest.mark.parametrize("line, message", INPUT_ERRORS)
def test_input_errors_are_one_line(line, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(line.split()) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and shown.startswith("minidiff generate: error: ") and message in shown
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_takes_no_prompt_is_refused(monkeypatch, capsys, tmp_path):
    unet = {"sample_size": 8, "block_out_channels": [8], "norm_num_groups": 4, "layers_per_block": 1}
    unet |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    pipe = minidiff.DDPMPipeline(minidiff.UNet2DModel(**unet), minidiff.DDPMScheduler())
    monkeypatch.setattr(cli, "_load", lambda *args: pipe)
    monkeypatch.chdir(tmp_path)
    assert cli.main("generate x --model faces".split()) == 2
    message = "faces is a checkpoint for DDPMPipeline, which draws without a prompt"
    assert capsys.readouterr().err == f"minidiff generate: error: {message}\n"


def test_arguments_are_checked_before_torch_is_imported(tmp_path):
    code = "import sys; from minidiff.cli import main; main(sys.argv[1:])"
    for line, returncode in ["generate --help", 0], ["generate x --steps 0", 2]:
        command = [sys.executable, "-X", "importtime", "-c", code, *line.split()]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert run.returncode == returncode
        imported = re.findall(r"^import time:.*\|\s+(\S+)$", run.stderr, re.M)
        assert "minidiff.cli" in imported and "torch" not in imported


def minidiff_command(line: list[str], cwd: Path) -> subprocess.CompletedProcess:
    """Run the installed console script away from the checkout, on one core."""
    script, env = Path(sys.executable).with_name("minidiff"), os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([script, *line], cwd=cwd, env=env, capture_output=True, text=True, timeout=100)


def child_seconds() -> float:
    """Return the processor time of finished children: what a clock shows on an idle machine with one core."""
    times = os.times()
    return times.children_user + times.children_system


def test_embedded_checkpoint_from_a_cold_start(tmp_path):
    start = child_seconds()
    run = minidiff_command(["generate", "red apple", "-o", "apple.png", "--seed", "3", "--device", "cpu"], tmp_path)
    seconds = child_seconds() - start
    assert run.returncode == 0, run.stderr
    assert run.stdout == "apple.png  seed 3\n"
    assert "25/25" in run.stderr  # the progress bar
    assert seconds < 15  # measured: 2.9 s

    pipe = minidiff.DiffusionPipeline.from_pretrained(embedded_checkpoint())
    expected = pipe("red apple", num_inference_steps=25, guidance_scale=GUIDANCE, seeds=[3]).images[0]
    shown = np.asarray(Image.open(tmp_path / "apple.png"))
    assert shown.shape == (64, 64, 3) and shown.std() > 20
    # Another number of threads may sum in another order. Measured: 0.
    assert np.abs(shown.astype(int) - np.asarray(expected).astype(int)).max() <= 1
    assert read_metadata(tmp_path / "apple.png") == {
        "prompt": "red apple",
        "negative": "",
        "seed": "3",
        "steps": "25",
        "scheduler": type(pipe.scheduler).__name__,
        "guidance": str(GUIDANCE),
        "checkpoint": "emoji64",
        "size": "64x64",
        "dtype": "float32",
        "minidiff": minidiff.__version__,
    }


def test_size_that_does_not_fit_is_one_line(tmp_path):
    run = minidiff_command(["generate", "x", "-o", "a.png", "--size", "66"], tmp_path)
    assert run.returncode == 2 and not run.stdout
    assert run.stderr == "minidiff generate: error: height should be divisible by 4, found 66; 64 would do\n"
