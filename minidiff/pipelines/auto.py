"""A pipeline by its task: which class that is depends on the family of the checkpoint, which its index names.

The classes below are never instances; they load or make the pipeline that is meant. Checked against
``diffusers.AutoPipelineForText2Image``, ``AutoPipelineForImage2Image`` and ``AutoPipelineForInpainting``.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from minidiff.errors import ConfigError
from minidiff.pipelines.base import DiffusionPipeline
from minidiff.registry import HOME, public

FAMILIES = ("StableDiffusion", "StableDiffusionXL", "LatentConsistencyModel")
TASKS = ("Pipeline", "Img2ImgPipeline", "InpaintPipeline")  # how the names of a family's classes end


class AutoPipeline(DiffusionPipeline):
    """Base of the classes that stand for a task."""

    task: ClassVar[str]

    def __init__(self) -> None:
        raise OSError(f"{type(self).__name__} stands for a task: call its from_pretrained or from_pipe")  # as theirs

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **arguments: Any) -> DiffusionPipeline:
        """Make the pipeline of this task from the components of another; see ``DiffusionPipeline.from_pipe``.

        Raises:
            ConfigError: if there is none for the other's family, or the components do not fit it.
        """
        return cls._of(type(pipeline).__name__).from_pipe(pipeline, **arguments)

    @classmethod
    def _class_for(cls, index: Mapping[str, Any], path: Path) -> type[DiffusionPipeline]:
        return cls._of(index.get("_class_name"))

    @classmethod
    def _of(cls, name: object) -> type[DiffusionPipeline]:
        """Return the class of this task in the family of the class with this name."""
        for family in FAMILIES:
            if name in [family + task for task in TASKS] and family + cls.task in HOME:
                return public(family + cls.task)
        known = [family for family in FAMILIES if family + cls.task in HOME]
        raise ConfigError(f"{cls.__name__} knows the families {' and '.join(known)}, found {name}")


class AutoPipelineForText2Image(AutoPipeline):
    """Text to image: ``AutoPipelineForText2Image.from_pretrained(...)`` makes the class that fits the checkpoint."""

    task = "Pipeline"


class AutoPipelineForImage2Image(AutoPipeline):
    """Image to image: ``AutoPipelineForImage2Image.from_pretrained(...)`` makes the class that fits the checkpoint."""

    task = "Img2ImgPipeline"


class AutoPipelineForInpainting(AutoPipeline):
    """Inpainting: ``AutoPipelineForInpainting.from_pretrained(...)`` makes the class that fits the checkpoint."""

    task = "InpaintPipeline"
