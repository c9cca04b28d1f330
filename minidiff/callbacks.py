"""Ready-made callbacks: ``pipe(..., callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.4))``.

A callback names the tensors that it reads in ``tensor_inputs``, so ``callback_on_step_end_tensor_inputs`` need not.
Checked against ``diffusers.callbacks``.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from minidiff.config import Config
from minidiff.pipelines.base import DiffusionPipeline

Tensors = Mapping[str, Tensor]


class PipelineCallback:
    """Base of callbacks with a step at which they do something; a subclass has ``tensor_inputs`` and ``callback_fn``.

    Args:
        cutoff_step_ratio: that step as a share of all, from 0 to 1.
        cutoff_step_index: or its number; then ``cutoff_step_ratio`` must be None.

    Raises:
        ValueError: if both are given or none, or the ratio is no float in [0, 1].
    """

    tensor_inputs: ClassVar[Sequence[str]]

    def __init__(self, cutoff_step_ratio: float | None = 1.0, cutoff_step_index: int | None = None) -> None:
        if (cutoff_step_ratio is None) == (cutoff_step_index is None):
            raise ValueError("give either cutoff_step_ratio or cutoff_step_index, and the other one as None")
        if cutoff_step_ratio is not None and not (isinstance(cutoff_step_ratio, float) and 0 <= cutoff_step_ratio <= 1):
            raise ValueError(f"cutoff_step_ratio should be a float from 0.0 to 1.0, found {cutoff_step_ratio!r}")
        self.config = Config({"cutoff_step_ratio": cutoff_step_ratio, "cutoff_step_index": cutoff_step_index})

    def cutoff_step(self, pipeline: DiffusionPipeline) -> int:
        """Return the step at which the callback does something in the pipeline's call."""
        index = self.config.cutoff_step_index
        return int(pipeline.num_timesteps * self.config.cutoff_step_ratio) if index is None else index

    def callback_fn(self, pipeline: DiffusionPipeline, step_index: int, timestep: Tensor, tensors: Tensors) -> Tensors:
        """Do what is to be done after a step; return the tensors, changed or not."""
        raise NotImplementedError(f"{type(self).__name__} has no callback_fn")

    def __call__(self, pipeline: DiffusionPipeline, step_index: int, timestep: Tensor, tensors: Tensors) -> Tensors:
        """Do what is to be done after a step."""
        return self.callback_fn(pipeline, step_index, timestep, tensors)


class MultiPipelineCallbacks:
    """Several callbacks, called one after the other."""

    def __init__(self, callbacks: Sequence[PipelineCallback]) -> None:
        self.callbacks = list(callbacks)

    @property
    def tensor_inputs(self) -> list[str]:
        """What they read, in their order."""
        return [name for callback in self.callbacks for name in callback.tensor_inputs]

    def __call__(self, pipeline: DiffusionPipeline, step_index: int, timestep: Tensor, tensors: Tensors) -> Tensors:
        """Hand the tensors from one to the next."""
        for callback in self.callbacks:
            tensors = callback(pipeline, step_index, timestep, tensors)
        return tensors


class SDCFGCutoffCallback(PipelineCallback):
    """End guidance after the step: from then on the UNet is asked once, for the prompt alone."""

    tensor_inputs = ("prompt_embeds",)

    def callback_fn(self, pipeline: DiffusionPipeline, step_index: int, timestep: Tensor, tensors: Tensors) -> Tensors:
        """Cut the negative half off what is read, and set the guidance scale to 0."""
        if step_index != self.cutoff_step(pipeline):
            return tensors
        pipeline._guidance_scale = 0.0
        return {**tensors, **{name: tensors[name].chunk(2)[-1] for name in self.tensor_inputs}}


class SDXLCFGCutoffCallback(SDCFGCutoffCallback):
    """The same for Stable Diffusion XL."""

    tensor_inputs = ("prompt_embeds", "add_text_embeds", "add_time_ids")
