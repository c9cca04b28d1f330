"""``minidiff inspect`` and ``minidiff convert``: what they say, how fast, and how little memory they need."""

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import minidiff
from minidiff.checkpoints.original.write import original_tables
from minidiff.checkpoints.tools.checkpoint import open_checkpoint
from minidiff.checkpoints.tools.convert import convert
from minidiff.checkpoints.tools.inspect import report
from minidiff.cli.main import main
from minidiff.errors import CheckpointError
from tests.single_files import sparse_file
from tests.tiny import VAE, save_tiny
from tests.vocabulary import load_script

headers = load_script("headers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "hub")


@pytest.fixture(scope="module")
def single(folder: Path) -> Path:
    convert(folder, folder.parent / "single.safetensors")
    return folder.parent / "single.safetensors"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_report_of_both_layouts(folder: Path, single: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, of_file, _ = run(capsys, "inspect", single, "--config", folder)
    assert code == 0
    code, of_folder, _ = run(capsys, "inspect", folder)
    assert code == 0
    line = re.compile(
        r"  (\w+) +(UNet2DConditionModel|AutoencoderKL|CLIPTextModel) +(\d+) +([\d,]+) +([\d.]+ kB)  (\w+)"
    )
    found = {of: sorted(line.findall(of)) for of in (of_file, of_folder)}
    assert found[of_file] == found[of_folder] and len(found[of_file]) == 3
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(folder)
    for name, kind, tensors, parameters, _, dtype in found[of_file]:
        model = getattr(pipe, name)
        assert (type(model).__name__, str(len(model.state_dict())), "float32") == (kind, tensors, dtype)
        assert model.num_parameters() == int(parameters.replace(",", ""))
    assert "single file in the original spelling" in of_file and "folder in Hub layout" in of_folder
    for text in (of_file, of_folder):
        assert re.search(r"prediction +epsilon\n", text)
        assert re.search(r"missing +nothing\n +unexpected +nothing", text)
        starts = {m.start(3) - text.rindex("\n", 0, m.start(3)) for m in re.finditer(r"(\w+) +(\w+) +()\d+ +", text)}
        assert starts  # columns of numbers end at one place
    code, said, _ = run(capsys, "inspect", single)  # its header says what it is
    assert code == 0 and said.splitlines()[1:] == of_file.splitlines()[1:]
    silent = single.with_name("silent.safetensors")
    save_file(load_file(single), silent)
    code, _, err = run(capsys, "inspect", silent)
    assert code == 2 and "is no checkpoint that minidiff knows" in err and "pass config=" in err


@pytest.mark.parametrize("name", ["sd_xl_base_1.0", "v2-1_768-ema-pruned"])
def test_seven_gigabytes_in_a_second(name: str, tmp_path: Path) -> None:
    path = sparse_file(tmp_path / f"{name}.safetensors", headers.read_list(headers.HERE / f"{name}.json"))
    start = time.process_time()  # of this process alone: the machine may be busy
    text = report(open_checkpoint(path, ask=False))
    seconds = time.process_time() - start
    assert seconds < 1  # measured: 0.25 for SDXL (6.94 GB, 2,513 tensors), after torch's own import of 1.3
    if name.startswith("sd_xl"):
        assert "family      Stable Diffusion XL\n" in text and "6.94 GB, 2,513 tensors" in text
        assert re.search(r"text_encoder_2 +CLIPTextModelWithProjection +389 +694,659,840 +1.39 GB  float16", text)
        assert re.search(r"all +2,513 +3,468,837,867 +6.94 GB  float16", text)
    else:
        assert "prediction  not said: epsilon or v_prediction; loading needs prediction_type=" in text


def test_report_of_what_is_wrong_and_left_out(folder: Path, single: Path, tmp_path: Path) -> None:
    tensors = load_file(single)
    del tensors["model.diffusion_model.out.2.bias"]
    extra = {"betas": torch.ones(9), "model_ema.decay": torch.ones(1), "who": torch.ones(1)}
    half = {name: tensor.half() for name, tensor in tensors.items() if "decoder.mid" in name}
    save_file(tensors | half | extra, tmp_path / "wrong.safetensors")
    text = report(open_checkpoint(tmp_path / "wrong.safetensors", config=folder))
    assert re.search(r"missing +1\n +model\.diffusion_model\.out\.2\.bias \(4,\)\n", text)
    assert re.search(r"unexpected +1\n +who \(1,\) in wrong\.safetensors", text)
    assert re.search(r"left out +2 tensors\n +1 the noise schedule.*\n +1 a moving average", text)
    assert re.search(rf"vae .* float32 \(\d+\), float16 \({len(half)}\)", text)


def test_keys_in_three_spellings(folder: Path, single: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for arguments in ((single, "--config", folder), (folder,)):
        code, out, _ = run(capsys, "inspect", *arguments, "--keys")
        assert code == 0
        outputs.append(sorted(line for line in out.splitlines() if line.startswith("  ")))
    assert outputs[0] == outputs[1]
    rows = [line.split() for line in outputs[0]]
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(folder)
    tables = original_tables({"unet": pipe.unet, "vae": pipe.vae, "text_encoder": pipe.text_encoder})
    wanted = {(o, h, n) for table in tables.values() for row in table for o, h, n in zip(*row[:3], strict=True)}
    assert {tuple(row[:3]) for row in rows if row[0] != "ours"} == wanted
    conv = next(row for row in rows if row[0] == "encoder.mid.attn.self_attn.q.weight")
    assert conv[3] == "16x16" and "original: 1x1 convolution -> linear" in " ".join(conv[4:])


def test_convert_never_overwrites_and_leaves_nothing_half_done(
    folder: Path, single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"precious")
    code, _, err = run(capsys, "convert", folder, target)
    assert code == 2 and "out.safetensors exists; --force replaces it" in err and target.read_bytes() == b"precious"

    def interrupted(now: int, total: int) -> None:
        raise KeyboardInterrupt

    for goal in (target, tmp_path / "hub"):
        with pytest.raises(KeyboardInterrupt):
            convert(single, goal, config=folder, force=True, progress=interrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"] and target.read_bytes() == b"precious"

    code, out, _ = run(capsys, "convert", folder, target, "--force")
    assert code == 0 and out.strip() == str(target) and target.read_bytes() == single.read_bytes()
    for _ in range(2):  # the second time it replaces the first
        assert main(["convert", str(single), str(tmp_path / "hub"), "--config", str(folder), "--force"]) == 0
    capsys.readouterr()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "out.safetensors"]
    assert type(minidiff.DiffusionPipeline.from_pretrained(tmp_path / "hub")) is minidiff.StableDiffusionPipeline
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for arguments, message in (
        ((single, tmp_path / "mine", "--force"), "is a folder, but no checkpoint: it is not replaced"),
        ((single, single, "--force"), "is the input, or holds it"),
        ((folder / "unet", folder, "--force"), "is the input, or holds it"),
        ((single, tmp_path / "no" / "x.safetensors"), "the folder .*no of the output x.safetensors does not exist"),
        ((single, tmp_path / "x", "--to", "single-file"), "a single file ends in .safetensors"),
        ((tmp_path / "no", tmp_path / "x"), "there is no file or folder"),
        ((tmp_path / "mine", tmp_path / "x"), "has neither model_index.json .* nor config.json"),
        ((tmp_path / "x.ckpt", tmp_path / "x"), "there is no file or folder"),
    ):
        code, _, err = run(capsys, "convert", *arguments, "--config", folder)
        assert code == 2 and re.search(message, err), err
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_convert_dtype_and_single_networks(
    folder: Path, single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[tuple[int, int]] = []
    convert(single, tmp_path / "half", dtype=torch.float16, config=folder, progress=lambda *pair: told.append(pair))
    sizes = {path: path.stat().st_size for path in (tmp_path / "half").rglob("*.safetensors")}
    assert len(sizes) == 3 and {total for _, total in told} == {sum(now for now, _ in told)}
    assert json.loads((tmp_path / "half" / "text_encoder" / "config.json").read_text())["torch_dtype"] == "float16"
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(tmp_path / "half", torch_dtype=torch.float16)
    stored = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(pipe.unet.conv_in.weight, stored["conv_in.weight"].half())

    code, _, _ = run(capsys, "convert", folder / "vae", tmp_path / "vae.safetensors", "--dtype", "bfloat16")
    assert code == 0
    bare = load_file(tmp_path / "vae.safetensors")
    assert "encoder.mid.attn_1.q.weight" in bare and {t.dtype for t in bare.values()} == {torch.bfloat16}
    convert(tmp_path / "vae.safetensors", tmp_path / "vae", config=folder / "vae")
    assert minidiff.AutoencoderKL.from_pretrained(tmp_path / "vae").config.latent_channels == 4
    with pytest.raises(CheckpointError, match="the original spelling has no names for a bare network"):
        convert(folder / "text_encoder", tmp_path / "text.safetensors")


def test_a_tensor_that_does_not_fit_stops_a_conversion(folder: Path, single: Path, tmp_path: Path) -> None:
    save_file({k: v for k, v in load_file(single).items() if not k.endswith("out.2.bias")}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing:\n  model\.diffusion_model\.out\.2\.bias"):
        convert(tmp_path / "x.safetensors", tmp_path / "hub", config=folder)
    assert not (tmp_path / "hub").exists()


# --- memory ----------------------------------------------------------------------------------------------------------

LARGE_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [32, 768],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "sample_size": 32,
}


class PeakMemory:
    """Context that samples how far the resident memory of this process rises above its start, in bytes."""

    def __enter__(self) -> "PeakMemory":
        self.start = self.now()
        self.rise = 0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()

    @staticmethod
    def now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def watch(self) -> None:
        while not self.done.wait(0.002):
            self.rise = max(self.rise, self.now() - self.start)


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Path]:
    """Write the header of an autoencoder of 176 MB, its largest tensor 21 MB, with a hole for its data."""
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(LARGE_VAE))
    with torch.device("meta"):
        model = minidiff.AutoencoderKL.from_config(LARGE_VAE)
    tensors = {
        name: ["F32", list(torch.nn.Module.state_dict(model)[row.ours[0]].shape)]
        for row in model.rows()
        for name in row.hub
    }
    yield sparse_file(tmp_path / "large" / "diffusion_pytorch_model.safetensors", tensors).parent


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="counts the pages of this process in /proc")
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_memory_of_a_conversion_is_that_of_its_largest_tensor(
    large: Path, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    """Allowed are 1.5 x the largest tensor, and 300 MB of which torch takes 200; pieces of 1 MB need far less."""
    largest, whole = 768 * 768 * 9 * 4, (large / "diffusion_pytorch_model.safetensors").stat().st_size
    assert whole > 8 * largest
    minidiff.AutoencoderKL(**VAE).save_pretrained(tmp_path / "small")
    convert(tmp_path / "small", tmp_path / "small.safetensors", dtype=dtype)  # imports are no memory of a conversion
    with PeakMemory() as memory:
        convert(large, tmp_path / "large.safetensors", dtype=dtype)
    assert (tmp_path / "large.safetensors").stat().st_size > whole / (1 if dtype is None else 2) * 0.99
    assert memory.rise < largest / 2  # 10.6 MB; measured: 0.2 MB
