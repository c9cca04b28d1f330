"""Outdated scheduler configurations: what each pipeline corrects, wherever the scheduler comes from.

Files of before 2023 lack ``steps_offset`` and ``clip_sample`` or say other values than Stable Diffusion needs, and a
scheduler that is built by hand has the defaults of its class. The reference corrects both when a pipeline is built, in
the object itself, and so does minidiff.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import minidiff
from tests.schedulers.runs import check_same_run
from tests.theirs import diffusers, relative_error
from tests.tiny import SCHEDULER, UNET
from tests.tiny_xl import save_base

SCHEDULERS = [name for name in minidiff.__all__ if name.endswith("Scheduler")]
PIPELINES = [f"StableDiffusion{task}Pipeline" for task in ("", "Img2Img", "Inpaint", "InstructPix2Pix")]
XL_PIPELINES = [f"StableDiffusionXL{task}Pipeline" for task in ("", "Img2Img", "Inpaint")]
OLD = {"steps_offset": 0, "clip_sample": True, "skip_prk_steps": False}
Parts = tuple[tuple[Any, dict[str, Any]], ...]


@pytest.fixture(scope="module")
def parts(folder: Path) -> Parts:
    """The components of a checkpoint in float64, ours and theirs."""
    return tuple((library, components(library.StableDiffusionPipeline, folder)) for library in (minidiff, diffusers))


@pytest.fixture(scope="module")
def xl_parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = save_base(tmp_path_factory.mktemp("xl"))
    return tuple((library, components(library.StableDiffusionXLPipeline, folder)) for library in (minidiff, diffusers))


def components(pipeline: type, folder: Path) -> dict[str, Any]:
    pipe = pipeline.from_pretrained(folder, torch_dtype=torch.float64)
    return pipe.to(torch.float64).components


def built(library: Any, pipeline: str, parts: dict[str, Any], scheduler: Any) -> Any:
    extra = {} if "XL" in pipeline else {"requires_safety_checker": False}
    if "Pix2Pix" in pipeline:
        parts = {**parts, "unet": library.UNet2DConditionModel(**UNET, in_channels=8)}
    pipe = getattr(library, pipeline)(**{**parts, "scheduler": scheduler}, **extra)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def own(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that a scheduler's constructor has."""
    return {field: value for field, value in fields.items() if field in getattr(minidiff, name)().config}


@pytest.mark.parametrize("fields", [{}, OLD, {"steps_offset": 2}], ids=["by hand", "spelled out", "another offset"])
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_the_object_itself_is_corrected(
    parts: Parts, pipeline: str, name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    schedulers, said = [], []
    for library, components in parts:
        scheduler = getattr(library, name)(**own(name, fields))
        pipe = built(library, pipeline, components, scheduler)
        assert pipe.scheduler is scheduler
        scheduler.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "scheduler_config.json").read_text())
        assert saved == json.loads(scheduler.to_json_string())
        said.append([saved, {**scheduler.config, "_use_default_values": set(scheduler.config["_use_default_values"])}])
        schedulers.append(scheduler)
    assert said[0] == said[1]
    check_same_run(*schedulers, steps=7, seeded="generator" in type(schedulers[1]).step.__code__.co_varnames)


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("pipeline", XL_PIPELINES)
def test_xl_corrects_nothing(xl_parts: Parts, pipeline: str, name: str) -> None:
    for library, components in xl_parts:
        scheduler = getattr(library, name)()
        before = dict(scheduler.config)
        assert built(library, pipeline, components, scheduler).scheduler.config == before


FILES = {  # changes to the file of PNDM; None leaves a field out
    "absent": {"steps_offset": None, "skip_prk_steps": None},
    "another class": {"_class_name": "DDIMScheduler", "steps_offset": None, "clip_sample": None},
    "another class, spelled out": {"_class_name": "DDPMScheduler", "steps_offset": 0, "clip_sample": True},
    "misspelled": {"steps_offset": None, "step_offset": 1},
}


@pytest.mark.parametrize("changes", FILES.values(), ids=FILES)
@pytest.mark.parametrize("pipeline", PIPELINES[:3])
def test_pictures_of_old_files(folder: Path, tmp_path: Path, pipeline: str, changes: dict[str, Any]) -> None:
    """Up to 0.66 of 1 apart where the correction was lost. Then the class is changed, as people do."""
    for part in folder.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "scheduler").unlink()
    (tmp_path / "scheduler").mkdir()
    fields = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.2.0", **SCHEDULER, **changes}
    file = tmp_path / "scheduler/scheduler_config.json"
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    results = []
    for library in (minidiff, diffusers):
        pipe = getattr(library, pipeline).from_pretrained(tmp_path, torch_dtype=torch.float64, safety_checker=None)
        pipe.to(torch.float64).set_progress_bar_config(disable=True)
        runs = [pictures(pipe, pipeline)]
        for other in ("DDIMScheduler", "EulerDiscreteScheduler"):
            pipe.scheduler = getattr(library, other).from_config(pipe.scheduler.config)
            runs.append(pictures(pipe, pipeline))
        results.append(torch.stack(runs))
    assert relative_error(*results) < 1e-6  # measured: 1.3e-8, Euler's steps in float32


def pictures(pipe: Any, pipeline: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    picture = torch.linspace(0, 1, 3 * 32 * 32, dtype=torch.float64).reshape(1, 3, 32, 32)
    inputs = {} if pipeline == "StableDiffusionPipeline" else {"image": picture}
    if "Inpaint" in pipeline:
        inputs["mask_image"] = (picture[:, :1] > 0.1).double()
    return pipe("red heart", num_inference_steps=6, output_type="latent", generator=generator, **inputs).images
