"""The command line: arguments, files, metadata, one-line errors; then the embedded checkpoint from a cold start."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import minidiff
from minidiff.cli import generate
from minidiff.cli import main as cli
from minidiff.embedded import GUIDANCE, embedded_checkpoint
from minidiff.images.tensors import read_metadata


class StandIn:
    """Takes a pipeline's place: remembers the call and paints picture k in the grey level of its seed."""

    def __init__(self) -> None:
        self.scheduler = minidiff.PNDMScheduler(beta_start=0.00085, beta_end=0.012, skip_prk_steps=True)

    def __call__(self, prompt, *, negative_prompt, width, height, seeds, **rest):
        self.call = {"prompt": prompt, "negative_prompt": negative_prompt, "seeds": seeds, **rest}
        self.call |= {"width": width, "height": height}
        images = [Image.new("RGB", (width or 64, height or 64), (seed % 256,) * 3) for seed in seeds]
        return SimpleNamespace(images=images, seeds=seeds)


@pytest.fixture
def pipe(monkeypatch, tmp_path) -> StandIn:
    pipe = StandIn()

    def load(*args):
        pipe.loaded = args
        return pipe

    monkeypatch.setattr(generate, "_load", load)
    monkeypatch.setattr(generate, "_pipeline_class", lambda model: StandIn)
    monkeypatch.setattr(generate, "embedded_names", lambda: ["emoji32-ddpm", "emoji64"])
    monkeypatch.setattr(generate, "embedded_checkpoint", lambda name: Path("embedded") / name)
    monkeypatch.chdir(tmp_path)
    return pipe


class PlainStandIn:
    """Takes the place of a pipeline without text, whose call has exactly these arguments."""

    def __init__(self) -> None:
        self.scheduler = minidiff.DDPMScheduler(beta_schedule="squaredcos_cap_v2")

    def __call__(self, batch_size, num_inference_steps, seeds):
        self.call = {"batch_size": batch_size, "num_inference_steps": num_inference_steps, "seeds": seeds}
        return SimpleNamespace(images=[Image.new("RGB", (8, 8), (seed,) * 3) for seed in seeds], seeds=seeds)


@pytest.fixture
def plain_pipe(pipe, monkeypatch) -> PlainStandIn:
    plain = PlainStandIn()

    def load(*args):
        plain.loaded = args
        return plain

    monkeypatch.setattr(generate, "_load", load)
    monkeypatch.setattr(generate, "_pipeline_class", lambda model: PlainStandIn)
    return plain


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
    assert pipe.loaded == (Path("embedded/emoji64"), "float32", None)
    assert pipe.call["num_inference_steps"] == 25
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


@pytest.mark.parametrize("model", [None, "emoji64", "./here"])
def test_a_missing_prompt_is_one_line_and_nothing_is_loaded(pipe, capsys, model):
    assert cli.main(["generate", *(["--model", model] if model else [])]) == 2
    message = f'{model or "emoji64"} is a checkpoint for StandIn, which needs a prompt: minidiff generate "red apple"'
    assert capsys.readouterr().err == f"minidiff generate: error: {message}\n"
    assert not hasattr(pipe, "loaded")


def test_without_a_prompt_every_option_reaches_the_pipeline_and_the_file(plain_pipe, capsys):
    line = (
        "generate --model emoji32-ddpm --num 3 --seed 5 --steps 7 --scheduler ddim --dtype bfloat16 --device cpu --grid"
    )
    assert cli.main(line.split()) == 0
    assert plain_pipe.loaded == (Path("embedded/emoji32-ddpm"), "bfloat16", "cpu")
    assert plain_pipe.call == {"batch_size": 3, "num_inference_steps": 7, "seeds": [5, 6, 7]}
    assert plain_pipe.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert read_metadata("emoji32-ddpm-5.png") == {
        "seed": "5, 6, 7",
        "steps": "7",
        "scheduler": "DDIMScheduler",
        "checkpoint": "emoji32-ddpm",
        "size": "8x8",
        "dtype": "bfloat16",
        "minidiff": minidiff.__version__,
    }
    assert capsys.readouterr().out == "emoji32-ddpm-5.png  seed 5, 6, 7\n"


def test_defaults_without_a_prompt(plain_pipe, tmp_path):
    assert cli.main(["generate", "--model", "google/ddpm-cat-256", "--seed", "0"]) == 0
    assert plain_pipe.loaded[0] == "google/ddpm-cat-256"
    assert plain_pipe.call == {"batch_size": 1, "num_inference_steps": generate.PLAIN_STEPS, "seeds": [0]}
    assert [path.name for path in tmp_path.iterdir()] == ["ddpm-cat-256-0.png"]


TEXT_OPTIONS = {"x": "the prompt", "--negative y": "--negative", "--guidance 1": "--guidance", "--size 64": "--size"}


@pytest.mark.parametrize("given", [*TEXT_OPTIONS, "--guidance 2 --negative y"])
def test_options_that_need_text_are_refused_by_name(plain_pipe, capsys, given):
    assert cli.main(["generate", *given.split(), "--model", "faces"]) == 2
    named = TEXT_OPTIONS.get(given, "--negative, --guidance")
    message = f"faces is a checkpoint for PlainStandIn, which draws without a prompt and in one size: leave out {named}"
    assert capsys.readouterr().err == f"minidiff generate: error: {message}\n"
    assert not hasattr(plain_pipe, "loaded")


def test_an_embedded_checkpoint_by_name_and_a_folder_of_that_name_first(pipe, tmp_path):
    cli.main(["generate", "x", "-o", "a.png", "--model", "emoji64"])
    assert pipe.loaded[0] == Path("embedded/emoji64")
    assert pipe.call["guidance_scale"] == GUIDANCE
    (tmp_path / "emoji64").mkdir()
    cli.main(["generate", "x", "-o", "a.png", "--model", "emoji64"])
    assert pipe.loaded[0] == "emoji64"
    assert pipe.call["guidance_scale"] == 7.5
    cli.main(["generate", "x", "-o", "a.png"])  # the default is the embedded one all the same
    assert pipe.loaded[0] == Path("embedded/emoji64")


def test_the_kind_of_a_checkpoint_is_read_before_its_weights(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDIMPipeline"}')
    assert generate._pipeline_class(tmp_path) is minidiff.DDIMPipeline


def test_a_negative_prompt_where_there_is_none_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "LatentConsistencyModelPipeline"}')
    assert cli.main(["generate", "x", "--model", ".", "--negative", "y"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "takes no negative prompt: leave out --negative" in shown


def test_without_the_safety_checker(monkeypatch, tmp_path):
    pipe, asked = StandIn(), []
    monkeypatch.chdir(tmp_path)
    original, model = generate._load, str(embedded_checkpoint())
    monkeypatch.setattr(generate, "_load", lambda *args, **options: asked.append(options) or pipe)
    for flags in ([], ["--no-safety-checker"]):
        assert cli.main(["generate", "red apple", "--model", model, "-o", "a.png", *flags]) == 0
    assert asked == [{}, {"safety_checker": None}]
    assert original(model, "float32", "cpu", **asked[1]).safety_checker is None
    plain = PlainStandIn()
    monkeypatch.setattr(generate, "_load", lambda *args, **options: asked.append(options) or plain)
    assert cli.main(["generate", "--model", "emoji32-ddpm", "--seed", "1", "-o", "a.png", "--no-safety-checker"]) == 0
    assert asked[2:] == [{}]  # a pipeline that has none


def test_arguments_are_checked_before_torch_is_imported(tmp_path):
    code = "import sys; from minidiff.cli.main import main; main(sys.argv[1:])"
    for line, returncode in ["generate --help", 0], ["generate x --steps 0", 2]:
        command = [sys.executable, "-X", "importtime", "-c", code, *line.split()]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert run.returncode == returncode
        imported = re.findall(r"^import time:.*\|\s+(\S+)$", run.stderr, re.M)
        assert "minidiff.cli.main" in imported and "torch" not in imported


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


def test_a_reader_that_has_seen_enough(tmp_path):
    script = shlex.quote(str(Path(sys.executable).with_name("minidiff")))
    line = f"set -o pipefail; {script} inspect --keys {shlex.quote(str(embedded_checkpoint()))} | head -n 1"
    run = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0 and run.stderr == "" and run.stdout.count("\n") == 1


def test_files_do_not_write_to_the_terminal(tmp_path, capsys):
    """Names of tensors come from whoever made the file: they may hold the codes that move the cursor."""
    name = "lora_unet_\x1b[2J\x07\r\u202edown.weight"
    save_file({name: torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    assert cli.main(["inspect", str(tmp_path / "a.safetensors")]) in (0, 2)
    out, err = capsys.readouterr()
    said = out + err
    assert r"\x1b[2J\x07\r\u202edown" in said
    assert all(character.isprintable() or character == "\n" for character in said)


def test_a_long_error_is_cut(tmp_path, capsys):
    save_file({"x" * 100_000: torch.zeros(2)}, tmp_path / "a.safetensors")
    assert cli.main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b")]) == 2
    err = capsys.readouterr().err
    assert 4000 < len(err) < 4200 and re.search(r"\.\.\. \([\d,]+ characters\)\n$", err)
