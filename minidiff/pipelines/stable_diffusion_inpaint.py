"""Inpainting with Stable Diffusion 1.x and 2.x: redraw what a mask marks and keep the rest.

The formula is in ``minidiff.pipelines.inpainting``. Checked against ``diffusers.StableDiffusionInpaintPipeline``, seed
for seed.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from minidiff.pipelines.callbacks import Callback
from minidiff.pipelines.common import Step, make_generators, make_plan
from minidiff.pipelines.inpainting import InpaintingPipeline, InpaintRun
from minidiff.pipelines.request import Generators, Prompt
from minidiff.pipelines.request_image import InpaintRequest
from minidiff.pipelines.stable_diffusion import SDPipeline, StableDiffusionPipelineOutput
from minidiff.pipelines.strength import begin


class StableDiffusionInpaintPipeline(InpaintingPipeline, SDPipeline):
    """Inpainting with Stable Diffusion 1.x and 2.x: with a UNet of 9 channels, trained for it, or with any other.

    Args and errors: as of ``SDPipeline``.
    """

    scheduler_corrections: ClassVar[Mapping[str, Any]] = {"steps_offset": 1, "skip_prk_steps": True}
    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = (
        "latents",
        "prompt_embeds",
        "negative_prompt_embeds",
        "mask",
        "masked_image_latents",
    )

    @torch.no_grad()
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
        handling = self._handling(
            output_type, callback_on_step_end, callback_on_step_end_tensor_inputs, not_implemented
        )
        if padding_mask_crop is not None and output_type != "pil":
            raise ValueError(f"with padding_mask_crop output_type should be 'pil', found {output_type!r}")
        request = InpaintRequest(
            prompt=prompt,
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
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
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
        """Generate step by step; the arguments are the fields of ``InpaintRequest``, the steps those of a call.

        With ``padding_mask_crop`` they show the part that is worked on.
        """
        return self._yield_steps(self._begin(InpaintRequest(prompt, image=image, mask_image=mask_image, **arguments)))

    @torch.no_grad()
    def _start(self, request: InpaintRequest) -> InpaintRun:
        """Encode texts, image and mask, plan the steps and make the first latents."""
        size = self._latent_size(request.height, request.width)
        generator, seeds = make_generators(request)
        device = self.device
        plan = begin(self._core, make_plan(self._core, request, device), request, minimum=1)
        texts = self._encode_texts(request, device)
        return InpaintRun(
            plan=plan,
            **self._prepare(request, plan, generator, texts["prompt_embeds"], size),
            **texts,
            guidance_scale=request.guidance_scale,
            guidance_rescale=0.0,
            generator=generator,
            seeds=seeds,
        )
