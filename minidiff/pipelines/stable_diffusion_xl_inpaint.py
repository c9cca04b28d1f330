"""Inpainting with Stable Diffusion XL: redraw what a mask marks and keep the rest.

The formula is in ``minidiff.pipelines.inpainting``. Checked against ``diffusers.StableDiffusionXLInpaintPipeline``,
seed for seed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from minidiff.pipelines.callbacks import Callback
from minidiff.pipelines.common import Step, make_generators
from minidiff.pipelines.inpainting import InpaintingPipeline, InpaintRun
from minidiff.pipelines.request import Generators, Prompt
from minidiff.pipelines.request_xl import Size, XLInpaintRequest
from minidiff.pipelines.stable_diffusion_xl import StableDiffusionXLPipelineOutput, XLRun, steps_until, time_ids
from minidiff.pipelines.stable_diffusion_xl_img2img import XLImagePipeline


@dataclass(kw_only=True)
class XLInpaintRun(InpaintRun, XLRun):
    """The state of one inpainting with the conditions that SDXL adds."""


class StableDiffusionXLInpaintPipeline(InpaintingPipeline, XLImagePipeline):
    """Inpainting with Stable Diffusion XL: with a UNet of 9 channels, trained for it, or with base or refiner.

    Args and errors: as of ``XLImagePipeline``.
    """

    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = (
        *XLImagePipeline._callback_tensor_inputs,
        "mask",
        "masked_image_latents",
    )

    @torch.no_grad()
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
        handling = self._handling(
            output_type, callback_on_step_end, callback_on_step_end_tensor_inputs, not_implemented
        )
        if padding_mask_crop is not None and output_type != "pil":
            raise ValueError(f"with padding_mask_crop output_type should be 'pil', found {output_type!r}")
        request = XLInpaintRequest(
            prompt=prompt,
            prompt_2=prompt_2,
            image=image,
            mask_image=mask_image,
            masked_image_latents=masked_image_latents,
            height=height,
            width=width,
            padding_mask_crop=padding_mask_crop,
            strength=strength,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            denoising_start=denoising_start,
            denoising_end=denoising_end,
            guidance_scale=guidance_scale,
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
            negative_original_size=negative_original_size,
            negative_crops_coords_top_left=negative_crops_coords_top_left,
            negative_target_size=negative_target_size,
            aesthetic_score=aesthetic_score,
            negative_aesthetic_score=negative_aesthetic_score,
            clip_skip=clip_skip,
            seed=seed,
            seeds=seeds,
            long_prompt=long_prompt,
            cross_attention_kwargs=cross_attention_kwargs,
        )
        return self._respond(request, handling, return_dict)

    def steps(
        self, prompt: Prompt = None, image: Any = None, mask_image: Any = None, **arguments: Any
    ) -> Iterator[Step]:
        """Generate step by step; the arguments are the fields of ``XLInpaintRequest``, the steps those of a call.

        With ``padding_mask_crop`` they show the part that is worked on.
        """
        request = XLInpaintRequest(prompt, image=image, mask_image=mask_image, **arguments)
        return self._yield_steps(self._begin(request))

    @torch.no_grad()
    def _start(self, request: XLInpaintRequest) -> XLInpaintRun:
        size = self._latent_size(request.height, request.width)
        generator, seeds = make_generators(request)
        device = self.device
        plan = self._plan_part(request, device, minimum=1)
        conditions = self._conditions(request, device)
        ctx = conditions["prompt_embeds"]
        pixels = (size[0] * self.vae_scale_factor, size[1] * self.vae_scale_factor)
        return XLInpaintRun(
            plan=plan,
            **self._prepare(request, plan, generator, ctx, size, noisy=request.denoising_start is None),
            negative_prompt_embeds=None,
            guidance_scale=request.guidance_scale,
            guidance_rescale=request.guidance_rescale,
            generator=generator,
            seeds=seeds,
            stop=steps_until(self._core, plan, request.denoising_end),
            add_time_ids=time_ids(*self._sizes(request, pixels), request, ctx),
            **conditions,
        )
