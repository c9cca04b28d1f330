"""What the tests of pipelines share: a pipeline of both libraries from the same files, and pictures compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import minidiff
from tests.theirs import diffusers, relative_error

IN_FLOAT32 = (  # within whose steps the reference rounds to float32, whatever the dtype of the latents
    "DPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "LMSDiscreteScheduler",
)


def seeded(seed: int = 0) -> torch.Generator:
    """Return a new generator."""
    return torch.Generator("cpu").manual_seed(seed)


def quiet(pipe: Any) -> Any:
    """Take the progress bar away; return the pipeline."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(cls: Any, folder: Path, **options: Any) -> Any:
    """Load a pipeline of either library, in float64 so that only a wrong formula can make a difference."""
    pipe = cls.from_pretrained(folder, torch_dtype=torch.float64, **options)
    return quiet(pipe.to(torch.float64))  # transformers takes the dtype of text encoders from their files


def load_both(name: str, folder: Path, **options: Any) -> tuple[Any, Any]:
    """Load ours and theirs from the same files, in float64."""
    ours, theirs = (load(getattr(library, name), folder, **options) for library in (minidiff, diffusers))
    return ours, theirs


def with_scheduler(pipe: Any, library: Any, name: str, call: Callable[[Any], Any], **fields: Any) -> Any:
    """Return what ``call`` makes of the pipeline with another scheduler, configured the same but for ``fields``."""
    if name.startswith("EDM"):  # no bounds, in the files of Euler
        fields = {"sigma_min": 0.002, "sigma_max": 80.0} | fields
    original = pipe.scheduler
    pipe.scheduler = getattr(library, name).from_config({**original.config, **fields})
    try:
        return call(pipe)
    finally:
        pipe.scheduler = original


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Compare pictures in [0, 1]: measured 0 to 1.8e-7 (float32 pictures of float64 runs)."""
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.05  # not a flat picture
    np.testing.assert_allclose(ours, theirs, atol=2e-7, rtol=0)


def assert_same_latents(ours: Tensor, theirs: Tensor, scheduler: str = "") -> None:
    """Compare latents of float64 runs: measured at most 2e-14, or 4.6e-8 where the reference rounds to float32."""
    assert theirs.std() > 0.1
    assert relative_error(ours, theirs) < (2e-7 if scheduler in IN_FLOAT32 else 1e-12)
