"""Editing pictures by instruction with Stable Diffusion XL.

The formula is in ``instruct_pix2pix``. Checked against ``diffusers.StableDiffusionXLInstructPix2PixPipeline``, seed for
seed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from minidiff.errors import ConfigError
from minidiff.networks.clip import CLIPTextModel, CLIPTextModelWithProjection
from minidiff.networks.unet import UNet2DConditionModel
from minidiff.networks.vae import AutoencoderKL
from minidiff.pipelines.callbacks import Callback
from minidiff.pipelines.common import Step, make_generators, make_plan
from minidiff.pipelines.instruct_pix2pix import Editing, EditingPipeline, EditRun, three_fold
from minidiff.pipelines.request import Generators, Prompt
from minidiff.pipelines.request_xl import Size, XLRequest
from minidiff.pipelines.stable_diffusion_xl import StableDiffusionXLPipelineOutput, XLPipeline, XLRun, steps_until
from minidiff.schedulers.base import Scheduler
from minidiff.text.tokenizer import CLIPTokenizer


@dataclass(frozen=True)
class XLEditRequest(Editing, XLRequest):
    """The arguments of one edit with SDXL, with the reference's names and defaults: of ``XLRequest`` and ``Editing``.

    The image is resized to ``height`` and ``width``. All three predictions of a step are told the same sizes.
    """

    num_inference_steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        negative = (self.negative_original_size, self.negative_target_size, *self.negative_crops_coords_top_left)
        if negative != (None, None, 0, 0):
            raise TypeError("an edit takes no negative sizes: all three predictions of a step are told the same ones")


@dataclass(kw_only=True)
class XLEditRun(EditRun, XLRun):
    """The state of one edit with the conditions that SDXL adds, all in the order text, image, nothing."""


class StableDiffusionXLInstructPix2PixPipeline(EditingPipeline, XLPipeline):
    """Edit pictures by instruction, with an SDXL UNet of 8 channels such as diffusers/sdxl-instructpix2pix-768.

    Args: as of ``StableDiffusionXLPipeline``, and
        is_cosxl_edit: whether the UNet reads the latents of the image scaled, as that of CosXL Edit does. (CosXL's own
            scheduler, EDMEulerScheduler, is not implemented.)

    Raises:
        ConfigError: if two components do not fit together, naming both.
    """

    _optional_components: ClassVar[tuple[str, ...]] = ()
    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = (*XLPipeline._callback_tensor_inputs, "image_latents")

    def __init__(
        self,
        vae: AutoencoderKL | None,
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
        components = {
            "vae": vae,
            "text_encoder": text_encoder,
            "text_encoder_2": text_encoder_2,
            "tokenizer": tokenizer,
            "tokenizer_2": tokenizer_2,
            "unet": unet,
            "scheduler": scheduler,
        }
        settings = {
            "force_zeros_for_empty_prompt": force_zeros_for_empty_prompt,
            "add_watermarker": add_watermarker,
            "is_cosxl_edit": is_cosxl_edit,
        }
        super().__init__(components, settings, time_ids=6)

    @torch.no_grad()
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
        handling = self._handling(
            output_type, callback_on_step_end, callback_on_step_end_tensor_inputs, not_implemented
        )
        request = XLEditRequest(
            prompt=prompt,
            prompt_2=prompt_2,
            image=image,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            denoising_end=denoising_end,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            guidance_rescale=guidance_rescale,
            original_size=original_size,
            crops_coords_top_left=crops_coords_top_left,
            target_size=target_size,
            seed=seed,
            seeds=seeds,
            long_prompt=long_prompt,
            cross_attention_kwargs=cross_attention_kwargs,
        )
        return self._respond(request, handling, return_dict)

    def steps(self, prompt: Prompt = None, **arguments: Any) -> Iterator[Step]:
        """Edit step by step; the arguments are the fields of ``XLEditRequest``, the steps those of a call."""
        return self._yield_steps(self._begin(XLEditRequest(prompt, **arguments)))

    @torch.no_grad()
    def _start(self, request: XLEditRequest) -> XLEditRun:
        H, W = self._latent_size(request.height, request.width)
        generator, seeds = make_generators(request)
        device = self.device
        plan = make_plan(self._core, request, device)
        conditions = self._conditions(request, device)
        if request.guided:
            conditions |= {name: three_fold(conditions[name]) for name in ("prompt_embeds", "add_text_embeds")}
        ctx = conditions["prompt_embeds"]
        shape = (request.count, self._latent_channels, H, W)
        size = (H * self.vae_scale_factor, W * self.vae_scale_factor)
        sizes = [*(request.original_size or size), *request.crops_coords_top_left, *(request.target_size or size)]
        return XLEditRun(
            plan=plan,
            latents=self._noise(shape, request, plan, generator, ctx),
            negative_prompt_embeds=None,
            guidance_scale=request.guidance_scale,
            guidance_rescale=request.guidance_rescale,
            generator=generator,
            seeds=seeds,
            stop=steps_until(self._core, plan, request.denoising_end),
            add_time_ids=torch.tensor([sizes] * len(ctx), dtype=ctx.dtype, device=device),
            image_latents=self._sized_latents(request, size, ctx),
            image_guidance_scale=request.image_guidance_scale,
            **conditions,
        )

    def _sized_latents(self, request: XLEditRequest, size: tuple[int, int], like: Tensor) -> Tensor:
        """Return what the UNet reads of the images, brought to the size in pixels."""
        shown = self._image_latents(request, like, *size)
        h, w = (side // self.vae_scale_factor for side in size)
        if shown.shape[-2:] != (h, w):
            found = tuple(shown.shape[-2:])
            raise ValueError(f"latents as image should be {(h, w)} high and wide for {size} pixels, found {found}")
        return self.vae.config.scaling_factor * shown if self._settings["is_cosxl_edit"] else shown
