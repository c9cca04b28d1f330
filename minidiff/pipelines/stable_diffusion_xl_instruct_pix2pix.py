"""Editing pictures by instruction with Stable Diffusion XL.

The formula is in ``minidiff.pipelines.editing``. Checked seed for seed against
``diffusers.StableDiffusionXLInstructPix2PixPipeline``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from minidiff.errors import ConfigError
from minidiff.networks.clip import CLIPTextModel, CLIPTextModelWithProjection
from minidiff.networks.unet import UNet2DConditionModel
from minidiff.networks.vae import AutoencoderKL
from minidiff.networks.vae_tiny import AutoencoderTiny
from minidiff.noise import Generators
from minidiff.pipelines.callbacks import Callback
from minidiff.pipelines.editing import AsksForEdit, Editing
from minidiff.pipelines.request import Prompt
from minidiff.pipelines.request_xl import Size, XLRequest
from minidiff.pipelines.stable_diffusion_xl import StableDiffusionXL, StableDiffusionXLPipelineOutput
from minidiff.pipelines.state import Run
from minidiff.schedulers.base import Scheduler
from minidiff.text.tokenizer import CLIPTokenizer


@dataclass(frozen=True)
class XLEditRequest(AsksForEdit, XLRequest):
    """The arguments of one edit with SDXL: those of ``XLRequest`` and ``AsksForEdit``, with the reference's defaults.

    The image is resized to ``height`` and ``width``. All three predictions of a step are told the same sizes.
    """

    num_inference_steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        negative = (self.negative_original_size, self.negative_target_size, *self.negative_crops_coords_top_left)
        if negative != (None, None, 0, 0):
            raise TypeError("an edit takes no negative sizes: all three predictions of a step are told the same ones")


class StableDiffusionXLInstructPix2PixPipeline(Editing, StableDiffusionXL):
    """Edit pictures by instruction, with an SDXL UNet of 8 channels such as diffusers/sdxl-instructpix2pix-768.

    Args: as of ``StableDiffusionXLPipeline``, and
        is_cosxl_edit: whether the UNet reads the latents of the image scaled, as that of CosXL Edit does.

    Raises:
        ConfigError: if two components do not fit together, naming both.
    """

    _optional_components: ClassVar[tuple[str, ...]] = ()
    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = (*StableDiffusionXL._callback_tensor_inputs, "image_latents")

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny | None,
        text_encoder: CLIPTextModel | None,
        text_encoder_2: CLIPTextModelWithProjection | None,
        tokenizer: CLIPTokenizer | None,
        tokenizer_2: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        is_cosxl_edit: bool = False,
    ) -> None:
        if is_cosxl_edit and vae is None:
            raise ConfigError("is_cosxl_edit=True needs a vae: it scales latents by the scaling_factor in its config")
        self._set_up_xl(StableDiffusionXLInstructPix2PixPipeline, locals())

    request = XLEditRequest

    def __call__(
        self,
        prompt: Prompt = None,
        prompt_2: Prompt = None,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 100,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        image_guidance_scale: float = 1.5,
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
        *,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        long_prompt: str = "cut",
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        **not_implemented: Any,
    ) -> StableDiffusionXLPipelineOutput | tuple[Any]:
        """Edit pictures.

        Args: the fields of ``XLEditRequest`` describe the edit; the rest is as for ``StableDiffusionXLPipeline``, with
            ``image_latents`` among the tensors that a callback may ask for. (The reference has only the old
            ``callback`` here, which is not implemented.)

        Raises:
            TypeError, ValueError: naming the argument, what was found and what was expected.
        """
        return self._respond(locals())

    def _sizes(self, request: XLEditRequest, size: tuple[int, int]) -> tuple[list[float], list[float]]:
        positive, _ = super()._sizes(request, size)
        return positive, positive

    def _image_latents(self, request: XLEditRequest, run: Run, size: tuple[int, int]) -> Tensor:
        """Return what the UNet reads of the images, brought to the size."""
        shown = super()._image_latents(request, run, size)
        if shown.shape[-2:] != size:
            pixels = tuple(side * self.vae_scale_factor for side in size)
            found = tuple(shown.shape[-2:])
            raise ValueError(f"latents as image should be {size} high and wide for {pixels} pixels, found {found}")
        return self.vae.config.scaling_factor * shown if self._settings["is_cosxl_edit"] else shown
