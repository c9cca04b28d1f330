"""Inpainting with Stable Diffusion XL: redraw what a mask marks and keep the rest.

The formula is in ``minidiff.pipelines.inpainting``. Checked against ``diffusers.StableDiffusionXLInpaintPipeline``,
seed for seed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from minidiff.noise import Generators
from minidiff.pipelines.callbacks import Callback
from minidiff.pipelines.inpainting import Inpainting
from minidiff.pipelines.request import Prompt
from minidiff.pipelines.request_xl import Size, XLInpaintRequest
from minidiff.pipelines.stable_diffusion_xl import StableDiffusionXLPipelineOutput
from minidiff.pipelines.stable_diffusion_xl_img2img import XLFromImage


class StableDiffusionXLInpaintPipeline(Inpainting, XLFromImage):
    """Inpainting with Stable Diffusion XL: with a UNet of 9 channels, trained for it, or with base or refiner.

    Args and errors: as of ``XLFromImage``.
    """

    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = (
        *XLFromImage._callback_tensor_inputs,
        "mask",
        "masked_image_latents",
    )

    request = XLInpaintRequest

    def __call__(
        self,
        prompt: Prompt = None,
        prompt_2: Prompt = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 0.9999,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: Prompt = None,
        negative_prompt_2: Prompt = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_rescale: float = 0.0,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size = (0, 0),
        negative_target_size: Size | None = None,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        long_prompt: str = "cut",
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        **not_implemented: Any,
    ) -> StableDiffusionXLPipelineOutput | tuple[Any]:
        """Repaint parts of pictures.

        Args: the fields of ``XLInpaintRequest`` describe the generation; the rest is as for
            ``StableDiffusionXLPipeline``, with ``mask`` and ``masked_image_latents`` among the tensors that a callback
            may ask for.

        Raises:
            TypeError, ValueError: naming the argument, what was found and what was expected.
        """
        return self._respond(locals())
