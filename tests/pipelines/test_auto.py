"""Pipelines by their task are of the classes that the reference chooses."""

from pathlib import Path

import pytest

import minidiff
from minidiff.errors import ConfigError
from minidiff.pipelines.auto import FAMILIES, TASKS
from minidiff.registry import HOME
from tests.theirs import diffusers
from tests.tiny import save_tiny

AUTO = ("AutoPipelineForText2Image", "AutoPipelineForImage2Image", "AutoPipelineForInpainting")
MAPPINGS = {name: f"AUTO_{name.removeprefix('AutoPipelineFor').upper()}_PIPELINES_MAPPING" for name in AUTO}


@pytest.mark.parametrize("made_for", [family + task for family in FAMILIES for task in TASKS if family + task in HOME])
@pytest.mark.parametrize("name", AUTO)
def test_every_family_and_task(name: str, made_for: str) -> None:
    theirs = diffusers.pipelines.auto_pipeline
    mapping = getattr(theirs, MAPPINGS[name].replace("INPAINTING", "INPAINT"))
    if made_for.startswith("Latent") and "Inpaint" in name:  # the reference has none
        with pytest.raises(ConfigError, match="knows the families"):
            getattr(minidiff, name)._of(made_for)
        return
    expected = theirs._get_task_class(mapping, made_for)
    assert getattr(minidiff, name)._of(made_for).__name__ == expected.__name__


def test_from_a_checkpoint_and_from_a_pipeline(folder: Path) -> None:
    found = []
    for library in (minidiff, diffusers):
        pipe = library.AutoPipelineForInpainting.from_pretrained(folder, safety_checker=None)
        others = [getattr(library, name).from_pipe(pipe) for name in AUTO]
        assert all(other.unet is pipe.unet for other in others)
        found.append([type(one).__name__ for one in (pipe, *others)])
    assert found[0] == found[1]


def test_what_it_cannot_do(folder: Path) -> None:
    for library in (minidiff, diffusers):
        with pytest.raises(OSError, match="from_pretrained"):
            library.AutoPipelineForInpainting()
    with pytest.raises(ConfigError, match="knows the families StableDiffusion and StableDiffusionXL, found Flux"):
        minidiff.AutoPipelineForInpainting._of("FluxPipeline")
    with pytest.raises(TypeError, match="got unknown arguments surprise"):
        minidiff.AutoPipelineForInpainting.from_pretrained(folder, surprise=1)


def test_the_config_of_a_pipeline_is_the_references_and_says_nothing_of_its_class(tmp_path: Path) -> None:
    folder, found, files = save_tiny(tmp_path), [], []
    for library in (minidiff, diffusers):
        kind = library.StableDiffusionPipeline
        files.append((kind.config_name, kind.load_config(folder, local_files_only=True)))
        pipe = library.AutoPipelineForText2Image.from_pretrained(folder)
        other = library.AutoPipelineForImage2Image.from_pipe(pipe)
        assert dict(other.config) == dict(pipe.config)
        found.append({name: value for name, value in pipe.config.items() if not name.startswith("_")})
    assert found[0] == found[1] and files[0] == files[1]
