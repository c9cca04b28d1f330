"""The same checkpoint in both libraries."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

import minidiff
from minidiff.checkpoints.model import Model
from minidiff.checkpoints.save import save_json

diffusers.utils.logging.disable_progress_bar()
diffusers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


@dataclass
class Both:
    """A pipeline of ours and one of theirs."""

    ours: Any
    theirs: Any

    def networks(self) -> dict[str, tuple[Model, nn.Module]]:
        """Return the networks by the names of the components."""
        parts = self.ours.components
        return {name: (one, getattr(self.theirs, name)) for name, one in parts.items() if isinstance(one, nn.Module)}


def load(
    checkpoint: str, reference: str | None = None, prediction_type: str | None = None, config: str | None = None
) -> Both:
    """Load a folder, a Hub id or a single file with both libraries, in float32.

    Args:
        reference: where theirs is loaded from, by default the same place. With a copy that is known to be good, the
            comparison finds what is wrong with ``checkpoint``.
        prediction_type: of a single file that cannot tell.
        config: a folder that describes a single file of no published family.
    """
    ours = _ours(checkpoint, prediction_type, config)
    theirs = _theirs(reference or checkpoint, ours, prediction_type)
    for name, component in theirs.components.items():
        if isinstance(component, nn.Module):
            component.to(torch.float32)  # transformers leaves a text encoder in the dtype of its file
            setattr(theirs, name, component.eval())
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    return Both(ours, theirs)


def _ours(checkpoint: str, prediction_type: str | None, config: str | None) -> Any:
    if not Path(checkpoint).is_file():
        return minidiff.DiffusionPipeline.from_pretrained(checkpoint)
    return minidiff.DiffusionPipeline.from_single_file(checkpoint, prediction_type=prediction_type, config=config)


def _theirs(checkpoint: str, ours: Any, prediction_type: str | None) -> Any:
    kind = getattr(diffusers, type(ours).__name__)
    checker = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in ours.components else {}
    if not Path(checkpoint).is_file():
        return kind.from_pretrained(checkpoint, torch_dtype=torch.float32, **checker)
    with tempfile.TemporaryDirectory() as folder:  # theirs asks the Hub for the configuration, unless it is given one
        _save_without_weights(ours, Path(folder))
        options = {"prediction_type": prediction_type} if prediction_type else {}
        return kind.from_single_file(checkpoint, config=folder, torch_dtype=torch.float32, **checker, **options)


def _save_without_weights(pipe: Any, folder: Path) -> None:
    save_json(pipe.config.to_dict(), folder / "model_index.json")
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            (folder / name).mkdir()
            fields = {"_class_name": type(component).__name__, **component.config.to_dict()}
            save_json(fields, folder / name / "config.json")
        elif component is not None:
            component.save_pretrained(folder / name)
