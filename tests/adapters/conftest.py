"""The tiny pipelines of both libraries, in float64."""

from collections.abc import Iterator

import pytest
import torch

import minidiff
from tests.loras import Pipes, cleaned
from tests.theirs import diffusers
from tests.tiny import save_tiny
from tests.tiny_xl import save_base

KINDS = {"sd": (save_tiny, "StableDiffusionPipeline"), "xl": (save_base, "StableDiffusionXLPipeline")}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pipes]:
    """Ours and theirs of each kind."""
    found = {}
    for kind, (save, name) in KINDS.items():
        folder = save(tmp_path_factory.mktemp(kind))
        pair = [getattr(library, name).from_pretrained(folder) for library in (minidiff, diffusers)]
        for pipe in pair:
            pipe.to(torch.float64)
            pipe.set_progress_bar_config(disable=True)
        found[kind] = tuple(pair)
    return found


@pytest.fixture(params=KINDS)
def pipes(request: pytest.FixtureRequest, loaded: dict[str, Pipes]) -> Iterator[Pipes]:
    """Ours and theirs, without adapters."""
    yield from cleaned(loaded[request.param])


@pytest.fixture
def sd(loaded: dict[str, Pipes]) -> Iterator[Pipes]:
    """Those of Stable Diffusion, without adapters."""
    yield from cleaned(loaded["sd"])


@pytest.fixture
def xl(loaded: dict[str, Pipes]) -> Iterator[Pipes]:
    """Those of SDXL, without adapters."""
    yield from cleaned(loaded["xl"])
