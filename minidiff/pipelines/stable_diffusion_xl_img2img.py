"""Image to image with Stable Diffusion XL, and its refiner.

    x = noised(encode(image), t_start);  then the last steps of a run

The refiner was trained on the last fifth of the noise levels alone. It takes over from base in the middle of a run:
``base(..., denoising_end=0.8, output_type="latent")`` stops before the timesteps below T (1 - 0.8), and
``refiner(..., denoising_start=0.8, image=latents)`` takes exactly those, without adding noise.

Papers: Meng et al. 2022 (SDEdit, https://arxiv.org/abs/2108.01073); Podell et al. 2023 (SDXL,
https://arxiv.org/abs/2307.01952), section 2.5. Checked against ``diffusers.StableDiffusionXLImg2ImgPipeline``, seed for
seed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from minidiff.networks.clip import CLIPTextModel, CLIPTextModelWithProjection
from minidiff.networks.unet import UNet2DConditionModel
from minidiff.networks.vae import AutoencoderKL
from minidiff.networks.vae_tiny import AutoencoderTiny
from minidiff.noise import Generators
from minidiff.pipelines.callbacks import Callback
from minidiff.pipelines.image_to_image import ImageToImage
from minidiff.pipelines.latent import latent_moments
from minidiff.pipelines.request import Prompt
from minidiff.pipelines.request_xl import Size, XLImageRequest
from minidiff.pipelines.stable_diffusion_xl import StableDiffusionXL, StableDiffusionXLPipelineOutput
from minidiff.schedulers.base import Scheduler
from minidiff.text.tokenizer import CLIPTokenizer


class XLFromImage(StableDiffusionXL):
    """The family where a task begins with an image: the refiner is told how pleasing the picture is to be.

    Args: as of ``StableDiffusionXLPipeline``, and
        requires_aesthetics_score: whether the UNet is conditioned on an aesthetic score in place of the target size, as
            the refiner is.

    Raises:
        ConfigError: if two components do not fit together, naming both.
    """

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny | None,
        text_encoder: CLIPTextModel | None,
        text_encoder_2: CLIPTextModelWithProjection | None,
        tokenizer: CLIPTokenizer | None,
        tokenizer_2: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        requires_aesthetics_score: bool = False,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        self._set_up_xl(XLFromImage, locals(), time_ids=5 if requires_aesthetics_score else 6)

    def _get_add_time_ids(
        self,
        original_size: Size,
        crops_coords_top_left: Size,
        target_size: Size,
        aesthetic_score: float,
        negative_aesthetic_score: float,
        negative_original_size: Size,
        negative_crops_coords_top_left: Size,
        negative_target_size: Size,
        dtype: torch.dtype,
        text_encoder_projection_dim: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the numbers that the prompt and the negative prompt are conditioned on, (1, n) each."""
        positive = [*original_size, *crops_coords_top_left, *target_size]
        negative = [*negative_original_size, *crops_coords_top_left, *negative_target_size]
        if self._settings["requires_aesthetics_score"]:
            positive = [*original_size, *crops_coords_top_left, aesthetic_score]
            negative = [*negative_original_size, *negative_crops_coords_top_left, negative_aesthetic_score]
        return torch.tensor([positive], dtype=dtype), torch.tensor([negative], dtype=dtype)

    def _sizes(self, request: XLImageRequest, size: tuple[int, int]) -> tuple[list[float], list[float]]:
        """Return the numbers that the prompt and the negative prompt are conditioned on."""
        original, target = request.original_size or size, request.target_size or size
        negative_original = request.negative_original_size or original
        crop, negative_crop = request.crops_coords_top_left, request.negative_crops_coords_top_left
        if self._settings["requires_aesthetics_score"]:
            return [*original, *crop, request.aesthetic_score], [
                *negative_original,
                *negative_crop,
                request.negative_aesthetic_score,
            ]
        if tuple(negative_crop) not in ((0, 0), tuple(crop)):  # the reference reads the prompt's crop here
            raise ValueError("negative_crops_coords_top_left counts only where requires_aesthetics_score is true")
        return [*original, *crop, *target], [*negative_original, *crop, *(request.negative_target_size or target)]


class StableDiffusionXLImg2ImgPipeline(ImageToImage, XLFromImage):
    """Image to image with Stable Diffusion XL: redraw a picture, or refine the latents of another run.

    Args and errors: as of ``XLFromImage``.
    """

    request = XLImageRequest

    def __call__(
        self,
        prompt: Prompt = None,
        prompt_2: Prompt = None,
        image: Any = None,
        strength: float = 0.3,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
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
        """Generate pictures from pictures.

        Args: the fields of ``XLImageRequest`` describe the generation; the rest as for ``StableDiffusionXLPipeline``.

        Raises:
            TypeError, ValueError: naming the argument, what was found and what was expected.
        """
        return self._respond(locals())

    def _scaled(self, latents: Tensor, vae: AutoencoderKL) -> Tensor:
        moments = latent_moments(vae, latents)  # inpainting, in the reference, does not look at them here
        if moments is None:
            return super()._scaled(latents, vae)
        mean, std = moments
        return (latents - mean) * vae.config.scaling_factor / std
