"""Image to image with Stable Diffusion XL, and its refiner.

    x = noised(encode(image), t_start);  then the last steps of a run

The refiner was trained on the last fifth of the noise levels alone. It takes over from base in the middle of a run:
``base(..., denoising_end=0.8, output_type="latent")`` stops before the timesteps below T (1 - 0.8), and
``refiner(..., denoising_start=0.8, image=latents)`` takes exactly those, without adding noise.

Papers: Meng et al. 2022 (SDEdit, https://arxiv.org/abs/2108.01073); Podell et al. 2023 (SDXL,
https://arxiv.org/abs/2307.01952), section 2.5. Checked against ``diffusers.StableDiffusionXLImg2ImgPipeline``, seed for
seed.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from minidiff.networks.clip import CLIPTextModel, CLIPTextModelWithProjection
from minidiff.networks.unet import UNet2DConditionModel
from minidiff.networks.vae import AutoencoderKL
from minidiff.noise import randn
from minidiff.pipelines.by_hand import ImageByHand
from minidiff.pipelines.callbacks import Callback
from minidiff.pipelines.common import Step, make_generators, make_plan
from minidiff.pipelines.request import Generators, Prompt
from minidiff.pipelines.request_xl import Size, XLImageRequest
from minidiff.pipelines.stable_diffusion_xl import (
    StableDiffusionXLPipelineOutput,
    XLPipeline,
    XLRun,
    cut_timestep,
    steps_until,
    time_ids,
)
from minidiff.pipelines.strength import begin
from minidiff.schedulers.base import Plan, Scheduler
from minidiff.text.tokenizer import CLIPTokenizer


class XLImagePipeline(XLPipeline):
    """What the tasks that begin with an image share.

    Args: as of ``StableDiffusionXLPipeline``, and
        requires_aesthetics_score: whether the UNet is conditioned on an aesthetic score in place of the target size, as
            the refiner is.

    Raises:
        ConfigError: if two components do not fit together, naming both.
    """

    _calls: ClassVar[tuple[str, ...]] = ("encode_prompt", "prepare_extra_step_kwargs")

    def __init__(
        self,
        vae: AutoencoderKL | None,
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
        components = {
            "vae": vae,
            "text_encoder": text_encoder,
            "text_encoder_2": text_encoder_2,
            "tokenizer": tokenizer,
            "tokenizer_2": tokenizer_2,
            "unet": unet,
            "scheduler": scheduler,
            "image_encoder": image_encoder,
            "feature_extractor": feature_extractor,
        }
        settings = {
            "requires_aesthetics_score": requires_aesthetics_score,
            "force_zeros_for_empty_prompt": force_zeros_for_empty_prompt,
            "add_watermarker": add_watermarker,
        }
        super().__init__(components, settings, time_ids=5 if requires_aesthetics_score else 6)

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

    def _plan_part(self, request: XLImageRequest, device: torch.device, minimum: int = 0) -> Plan:
        """Plan the part of a run that is asked for: by its strength, at least ``minimum`` steps, or the rest of one."""
        plan = make_plan(self._core, request, device)
        if request.denoising_start is None:
            return begin(self._core, plan, request, minimum)
        return take_over(self._core, plan, request.denoising_start)

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


class StableDiffusionXLImg2ImgPipeline(ImageByHand, XLImagePipeline):
    """Image to image with Stable Diffusion XL: redraw a picture, or refine the latents of another run.

    Args and errors: as of ``XLImagePipeline``.
    """

    @torch.no_grad()
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
        handling = self._handling(
            output_type, callback_on_step_end, callback_on_step_end_tensor_inputs, not_implemented
        )
        request = XLImageRequest(
            prompt=prompt,
            prompt_2=prompt_2,
            image=image,
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

    def steps(self, prompt: Prompt = None, **arguments: Any) -> Iterator[Step]:
        """Generate step by step; the arguments are the fields of ``XLImageRequest``, the steps those of a call."""
        return self._yield_steps(self._begin(XLImageRequest(prompt, **arguments)))

    @torch.no_grad()
    def _start(self, request: XLImageRequest) -> XLRun:
        generator, seeds = make_generators(request)
        device = self.device
        plan = self._plan_part(request, device)
        conditions = self._conditions(request, device)
        ctx = conditions["prompt_embeds"]
        latents = self._first_latents(request, plan, generator, ctx)
        size = tuple(side * self.vae_scale_factor for side in latents.shape[-2:])
        return XLRun(
            plan=plan,
            latents=latents,
            negative_prompt_embeds=None,
            guidance_scale=request.guidance_scale,
            guidance_rescale=request.guidance_rescale,
            generator=generator,
            seeds=seeds,
            stop=steps_until(self._core, plan, request.denoising_end),
            add_time_ids=time_ids(*self._sizes(request, size), request, ctx),
            **conditions,
        )

    def _first_latents(self, request: XLImageRequest, plan: Plan, generator: Generators, like: Tensor) -> Tensor:
        """Return the latents (B, C, h, w) that the run begins with."""
        C, count = self.unet.config.in_channels, request.count
        if request.latents is not None:
            if request.latents.ndim != 4 or request.latents.shape[:2] != (count, C):
                raise ValueError(f"latents should be ({count}, {C}, h, w), found {tuple(request.latents.shape)}")
            return request.latents.to(like)
        x0 = self._encode_image(self._read_image(request.image), count, generator, like)
        if request.denoising_start is not None:
            return x0
        return self._core.noised(plan, x0, randn(x0.shape, generator, like.device, like.dtype))


def take_over(scheduler: Scheduler, plan: Plan, denoising_start: float) -> Plan:
    """Return the plan of the steps that a run with this ``denoising_end`` left.

    Raises:
        ValueError: if no step is left.
    """
    cut = cut_timestep(scheduler, denoising_start)
    left = sum(t < cut for t in plan.times)
    if not left:
        raise ValueError(
            f"denoising_start={denoising_start} of {plan.num_inference_steps} steps leaves no step to take: ask for "
            "more steps, or a larger part of them"
        )
    if scheduler.order == 2 and left % 2 == 0:
        left += 1  # base stopped within a step of two evaluations, which begins again
    return scheduler.start_at(plan, len(plan.times) - left)
