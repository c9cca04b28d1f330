"""Editing pictures by instruction with Stable Diffusion 1.x: "make the mountains snowy".

The formula is in ``minidiff.pipelines.editing``. Checked seed for seed against
``diffusers.StableDiffusionInstructPix2PixPipeline``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from minidiff.noise import Generators
from minidiff.pipelines.callbacks import Callback
from minidiff.pipelines.editing import AsksForEdit, Editing
from minidiff.pipelines.request import Prompt, Request
from minidiff.pipelines.stable_diffusion import StableDiffusion, StableDiffusionPipelineOutput


@dataclass(frozen=True)
class EditRequest(AsksForEdit, Request):
    """The arguments of one edit, with the reference's names and defaults: those of ``Request`` and of ``AsksForEdit``.

    The result has the size of the image, so there are no ``height`` and ``width``.
    """

    num_inference_steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.height is not None or self.width is not None:
            raise TypeError("an edit takes no height and width: the result has the size of the image")


class StableDiffusionInstructPix2PixPipeline(Editing, StableDiffusion):
    """Edit pictures by instruction, with a UNet of 8 channels such as timbrooks/instruct-pix2pix.

    Args and errors: as of ``StableDiffusionPipeline``.
    """

    scheduler_corrections: ClassVar[Mapping[str, Any]] = {}  # the reference leaves outdated configs as they are here
    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = ("latents", "prompt_embeds", "image_latents")

    request = EditRequest

    def __call__(
        self,
        prompt: Prompt = None,
        image: Any = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 7.5,
        image_guidance_scale: float = 1.5,
        negative_prompt: Prompt = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        long_prompt: str = "cut",
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        **not_implemented: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any, None]:
        """Edit pictures.

        Args: the fields of ``EditRequest`` describe the edit; the rest is as for ``StableDiffusionPipeline``, with
            ``image_latents`` among the tensors that a callback may ask for.

        Raises:
            TypeError, ValueError: naming the argument, what was found and what was expected.
        """
        return self._respond(locals())

    def _size(self, request: EditRequest) -> None:
        return None
