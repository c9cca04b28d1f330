"""Playground v2.5, CosXL and CosXL Edit: recognised by the marks in a file, and no mark is lost on the way.

Tiny twins are made by the reference and drawn by both libraries; full-size files are headers, with real marks alone.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import minidiff
from minidiff import AutoencoderKL, DiffusionPipeline, EulerDiscreteScheduler
from minidiff.checkpoints.original import configs as packaged_configs
from minidiff.checkpoints.original import families
from minidiff.checkpoints.original.configs import PackagedConfigs
from minidiff.checkpoints.original.read import SingleFile
from minidiff.checkpoints.original.single_file import describe
from minidiff.checkpoints.tools.checkpoint import open_checkpoint
from minidiff.checkpoints.tools.convert import convert
from minidiff.checkpoints.tools.inspect import report
from minidiff.errors import CheckpointError, ConfigError
from tests.single_files import draw, sparse_file
from tests.theirs import diffusers
from tests.tiny_xl import save_base, vocabulary
from tests.vocabulary import load_script

headers = load_script("headers")
HUB = Path(__file__).parents[1] / "data" / "hub_configs" / "playgroundai--playground-v2.5-1024px-aesthetic"
MOMENTS = {"latents_mean": [-1.6574, 1.886, -1.383, 2.5155], "latents_std": [8.4927, 5.9022, 6.5498, 5.2299]}
COSXL = {"prediction_type": "v_prediction", "sigma_data": 1.0, "sigma_max": 120.0, "sigma_schedule": "exponential"}
PLAYGROUND_MARKS = {
    "edm_mean": torch.tensor(MOMENTS["latents_mean"]).reshape(1, 4, 1, 1),
    "edm_std": torch.tensor(MOMENTS["latents_std"]).reshape(1, 4, 1, 1),
}
COSXL_MARKS = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)}
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
IMAGE = {"image": np.full((2, 32, 32, 3), 0.4, "float32")}
KINDS: dict[str, dict[str, Any]] = {
    "playground-v2.5-1024px-aesthetic": {
        "title": "Playground 2.5 (Stable Diffusion XL, EDM)",
        "pipeline": "StableDiffusionXLPipeline",
        "scheduler": ("EDMDPMSolverMultistepScheduler", {}),
        "vae": MOMENTS | {"scaling_factor": 0.5},
        "marks": PLAYGROUND_MARKS,
    },
    "cosxl": {
        "title": "CosXL (Stable Diffusion XL, EDM)",
        "pipeline": "StableDiffusionXLPipeline",
        "scheduler": ("EDMEulerScheduler", COSXL),
        "marks": COSXL_MARKS,
    },
    "cosxl-edit": {
        "title": "CosXL Edit (Stable Diffusion XL InstructPix2Pix, EDM)",
        "pipeline": "StableDiffusionXLInstructPix2PixPipeline",
        "scheduler": ("EDMEulerScheduler", COSXL),
        "marks": COSXL_MARKS,
        "channels": 8,
        "arguments": IMAGE,
        "index": {"is_cosxl_edit": True},
    },
}


class Twin:
    """A tiny checkpoint of a kind: its folder, made by the reference, and the single file that we wrote of it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.kind, self.folder = name, KINDS[name], folder / "hub"
        self.file, self.arguments = folder / "single.safetensors", self.kind.get("arguments", {})
        save_base(self.folder, unet={"in_channels": self.kind.get("channels", 4)})
        scheduler, options = self.kind["scheduler"]
        (self.folder / "scheduler" / "scheduler_config.json").unlink()
        getattr(diffusers, scheduler)(**options).save_pretrained(self.folder / "scheduler")
        self._edit("model_index.json", scheduler=["diffusers", scheduler], _class_name=self.kind["pipeline"])
        self._edit("model_index.json", **self.kind.get("index", {}))
        self._edit("vae/config.json", **self.kind.get("vae", {}))
        if self.kind["pipeline"].endswith("Pix2PixPipeline"):
            self._edit("model_index.json", image_encoder=None, feature_extractor=None)
        self.ours = DiffusionPipeline.from_pretrained(self.folder)
        self.ours.save_single_file(self.file)

    def _edit(self, name: str, **fields: Any) -> None:
        path = self.folder / name
        content = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture(scope="module", params=KINDS)
def twin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twin:
    return Twin(request.param, tmp_path_factory.mktemp("twin"))


@pytest.fixture
def unmarked(twin: Twin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file without what minidiff writes into its header, as if the twin were the published model."""
    sections = {}
    for path in twin.folder.rglob("*.json"):
        if path.name != "tokenizer.json":
            sections[path.relative_to(twin.folder).as_posix()] = json.loads(path.read_text())
    for name in ("tokenizer", "tokenizer_2"):
        sections[f"{name}/special_tokens_map.json"] = {}
    (tmp_path / f"{twin.name}.json").write_text(json.dumps(sections))
    tiny = [(m, f._replace(ctx=40)) for m, f in families.MARKED]
    monkeypatch.setattr(families, "MARKED", tiny)
    monkeypatch.setattr(packaged_configs, "PUBLISHED", tmp_path)
    monkeypatch.setattr(packaged_configs, "clip_vocabulary", vocabulary)
    save_file(load_file(twin.file), tmp_path / "published.safetensors")
    return tmp_path / "published.safetensors"


def fields(part: Any) -> dict[str, Any]:
    """The configuration, without where it comes from."""
    return {name: value for name, value in part.config.to_dict().items() if name[0] != "_"}


def test_pictures_of_folder_and_file(twin: Twin) -> None:
    picture = draw(twin.ours, **twin.arguments)
    assert picture.std() > 10
    their_class = getattr(diffusers, twin.kind["pipeline"])
    theirs = diffusers.DiffusionPipeline.from_pretrained(twin.folder)
    assert type(theirs) is their_class
    assert np.abs(draw(theirs, **twin.arguments) - picture).max() <= 1  # measured: 0
    theirs = their_class.from_single_file(str(twin.file), config=str(twin.folder), **twin.kind.get("index", {}))
    assert np.abs(draw(theirs, **twin.arguments) - picture).max() <= 1  # measured: 0
    ours = DiffusionPipeline.from_single_file(twin.file)
    assert type(ours) is type(twin.ours) and ours.config.to_dict() == twin.ours.config.to_dict()
    assert np.array_equal(draw(ours, **twin.arguments), picture)


def test_marks_are_written_and_read(twin: Twin, unmarked: Path) -> None:
    stored = load_file(unmarked)
    for name, value in twin.kind["marks"].items():
        assert torch.equal(stored[name], value)
    assert {name for name in stored if name.startswith("edm")} == twin.kind["marks"].keys()
    pipe = DiffusionPipeline.from_single_file(unmarked)  # knows the family by the marks, and needs no header
    assert type(pipe) is type(twin.ours)
    assert fields(pipe.scheduler) == fields(twin.ours.scheduler)
    assert fields(pipe.vae) == fields(twin.ours.vae)
    assert np.array_equal(draw(pipe, **twin.arguments), draw(twin.ours, **twin.arguments))


def test_other_numbers_than_the_published_ones(twin: Twin, unmarked: Path, tmp_path: Path) -> None:
    """A file's own numbers count; those that are the published ones but for rounding do not."""
    own = {name: (value * 2).half() for name, value in twin.kind["marks"].items()}
    rounded = {name: value.half() for name, value in twin.kind["marks"].items()}
    save_file(load_file(unmarked) | own, tmp_path / "own.safetensors")
    save_file(load_file(unmarked) | rounded, tmp_path / "rounded.safetensors")
    vae = AutoencoderKL.from_single_file(tmp_path / "own.safetensors")
    scheduler = DiffusionPipeline.from_single_file(tmp_path / "own.safetensors").scheduler
    if "edm_mean" in own:
        assert vae.config.latents_mean == own["edm_mean"].flatten().tolist()
        assert vae.config.latents_std == own["edm_std"].flatten().tolist()
    else:
        assert scheduler.config.sigma_max == 240.0 and vae.config.latents_mean is None
        assert scheduler.config.sigma_min == own["edm_vpred.sigma_min"].item()
    again = DiffusionPipeline.from_single_file(tmp_path / "rounded.safetensors")
    assert fields(again.vae) == fields(twin.ours.vae)
    assert fields(again.scheduler) == fields(twin.ours.scheduler)


def test_conversions_lose_no_mark(twin: Twin, tmp_path: Path) -> None:
    convert(twin.folder, tmp_path / "single.safetensors")
    convert(tmp_path / "single.safetensors", tmp_path / "hub")
    convert(tmp_path / "hub", tmp_path / "back.safetensors")
    expected = load_file(twin.file)
    for name in ("single", "back"):
        found = load_file(tmp_path / f"{name}.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "hub")
    assert np.abs(draw(again, **twin.arguments) - draw(twin.ours, **twin.arguments)).max() <= 1  # measured: 0


def test_inspect_names_them(twin: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "MARKED", [(m, f._replace(ctx=40)) for m, f in families.MARKED])
    for path in (twin.file, twin.folder):
        checkpoint = open_checkpoint(path)
        assert checkpoint.title == twin.kind["title"] and not checkpoint.wrong
        assert twin.kind["title"] in report(checkpoint)
    assert "noise process (EDM)" in report(open_checkpoint(twin.file))


def test_marks_say_nothing_that_is_not_so(twin: Twin, tmp_path: Path) -> None:
    """With a scheduler of another kind they would make other programs take the UNet for what it is not said to be."""
    others = [EulerDiscreteScheduler()]
    others += [minidiff.EDMEulerScheduler(sigma_data=0.7, prediction_type="v_prediction")]
    for scheduler in others:
        pipe = type(twin.ours)(**{**twin.ours.components, "scheduler": scheduler})
        pipe.save_single_file(tmp_path / "other.safetensors")
        assert not any(name.startswith("edm") for name in load_file(tmp_path / "other.safetensors"))
        again = DiffusionPipeline.from_single_file(tmp_path / "other.safetensors")  # the header says all of it
        assert fields(again.scheduler) == fields(scheduler)
        assert fields(again.vae) == fields(twin.ours.vae)


# --- the published ones, at full size --------------------------------------------------------------------------------


def full_size(path: Path, name: str, **changed: Any) -> Path:
    """Write a file with the names and shapes of XL base, and the marks of a kind with their values."""
    tensors = headers.read_list(headers.HERE / "sd_xl_base_1.0.json")
    tensors |= {FIRST: ["F16", [320, KINDS[name].get("channels", 4), 3, 3]], **changed}
    marks = KINDS[name]["marks"]
    tensors |= {mark: ["F32", list(value.shape)] for mark, value in marks.items()}
    sparse_file(path, tensors)
    stored = {tensor.name: tensor for tensor in SingleFile.of(path).stored}
    with path.open("r+b") as file:
        for mark, value in marks.items():
            file.seek(stored[mark].start)
            file.write(value.numpy().tobytes())
    return path


@pytest.mark.parametrize("name", KINDS)
def test_full_size_files(name: str, tmp_path: Path) -> None:
    path = full_size(tmp_path / "full.safetensors", name)
    checkpoint = open_checkpoint(path)
    assert checkpoint.title == KINDS[name]["title"] and not checkpoint.wrong
    assert checkpoint.prediction == KINDS[name]["scheduler"][1].get("prediction_type", "epsilon")
    _, configs, prediction = describe(SingleFile.of(path), None, None, {})
    assert prediction == checkpoint.prediction
    assert configs.sections == PackagedConfigs(name).sections  # the numbers of the file are the published ones
    fields = configs.read("scheduler/scheduler_config.json")
    kind, options = KINDS[name]["scheduler"]
    scheduler = getattr(minidiff, kind).from_config(fields)
    theirs = getattr(diffusers, kind)(**options)
    scheduler.set_timesteps(7)
    theirs.set_timesteps(7)
    assert torch.equal(scheduler.sigmas, theirs.sigmas) and torch.equal(scheduler.timesteps, theirs.timesteps)
    assert scheduler.config.sigma_data == theirs.config.sigma_data
    assert configs.read("model_index.json").get("is_cosxl_edit", False) == (name == "cosxl-edit")
    assert {key: configs.read("vae/config.json").get(key) for key in MOMENTS} == {
        key: KINDS[name].get("vae", {}).get(key) for key in MOMENTS
    }


def test_playground_is_configured_as_published() -> None:
    """But for the UNet, of which there is no copy; the reference takes it for that of XL base too."""
    configs = PackagedConfigs("playground-v2.5-1024px-aesthetic")
    for path in HUB.rglob("*.json"):
        published = json.loads(path.read_text())
        for key in ("_diffusers_version", "torch_dtype", "transformers_version"):
            published.pop(key, None)
        assert configs.read(path.relative_to(HUB).as_posix()).items() >= published.items(), path
    names = {path.name for path in packaged_configs.PUBLISHED.glob("*.json")}
    assert all(f"{name}.json" in names for _, f in families.MARKED for name in f.configs.values())


def test_their_family_of_playground(tmp_path: Path) -> None:
    """The reference goes by the same mark; those of CosXL it does not know, and takes the file for XL base."""
    utils = diffusers.loaders.single_file_utils
    for name, expected in (("playground-v2.5-1024px-aesthetic", "playground-v2-5"), ("cosxl", "xl_base")):
        shapes = SingleFile.of(full_size(tmp_path / "x.safetensors", name)).shapes
        meta = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        assert utils.infer_diffusers_model_type(meta) == expected


# --- bad input -------------------------------------------------------------------------------------------------------


def test_marks_on_a_unet_that_no_family_has(tmp_path: Path) -> None:
    path = full_size(tmp_path / "nine.safetensors", "cosxl", **{FIRST: ["F16", [320, 9, 3, 3]]})
    with pytest.raises(CheckpointError, match=r"and 9 channels .*Known are CosXL .*CosXL Edit"):
        DiffusionPipeline.from_single_file(path)


def test_numbers_that_cannot_be(twin: Twin, unmarked: Path, tmp_path: Path) -> None:
    wrong = {name: value.flatten()[0] * -1 for name, value in twin.kind["marks"].items()}
    save_file(load_file(unmarked) | wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(ConfigError, match="latents_mean should be null or 4 numbers|needs 0 < sigma_min < sigma_max"):
        DiffusionPipeline.from_single_file(tmp_path / "wrong.safetensors")
