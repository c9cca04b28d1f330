"""Inpainting with Stable Diffusion 1.x and 2.x: redraw what a mask marks and keep the rest.

The formula is in ``minidiff.pipelines.inpainting``. Checked against ``diffusers.StableDiffusionInpaintPipeline``, seed
for seed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from minidiff.noise import Generators
from minidiff.pipelines.callbacks import Callback
from minidiff.pipelines.inpainting import Inpainting
from minidiff.pipelines.request import Prompt
from minidiff.pipelines.request_image import InpaintRequest
from minidiff.pipelines.stable_diffusion import StableDiffusion, StableDiffusionPipelineOutput


class StableDiffusionInpaintPipeline(Inpainting, StableDiffusion):
    """Inpainting with Stable Diffusion 1.x and 2.x: with a UNet of 9 channels, trained for it, or with any other.

    Args and errors: as of ``StableDiffusion``.
    """

    scheduler_corrections: ClassVar[Mapping[str, Any]] = {"steps_offset": 1, "skip_prk_steps": True}
    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = (
        "latents",
        "prompt_embeds",
        "negative_prompt_embeds",
        "mask",
        "masked_image_latents",
    )

    request = InpaintRequest

    def __call__(
        self,
        prompt: Prompt = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: Prompt = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        long_prompt: str = "cut",
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        **not_implemented: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any, None]:
        """Repaint parts of pictures.

        Args: the fields of ``InpaintRequest`` describe the generation; the rest is as for ``StableDiffusionPipeline``,
            with ``mask`` and ``masked_image_latents`` among the tensors that a callback may ask for.

        Raises:
            TypeError, ValueError: naming the argument, what was found and what was expected.
        """
        return self._respond(locals())
