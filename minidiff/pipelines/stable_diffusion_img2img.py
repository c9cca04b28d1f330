"""Image to image with Stable Diffusion 1.x and 2.x: a prompt redraws a picture.

    x = noised(encode(image), t_start);  then the last steps of a run

The more noise, the less is left of the image: its share is the ``strength``, and ``minidiff.pipelines.strength`` has
the number of steps.

Paper: Meng et al. 2022 (SDEdit, https://arxiv.org/abs/2108.01073). Checked against
``diffusers.StableDiffusionImg2ImgPipeline``, seed for seed.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from minidiff.noise import randn
from minidiff.pipelines.by_hand import ImageByHand
from minidiff.pipelines.callbacks import Callback
from minidiff.pipelines.common import Run, Step, make_generators, make_plan
from minidiff.pipelines.request import Generators, Prompt
from minidiff.pipelines.request_image import ImageRequest
from minidiff.pipelines.stable_diffusion import SDPipeline, StableDiffusionPipelineOutput
from minidiff.pipelines.strength import begin


class StableDiffusionImg2ImgPipeline(ImageByHand, SDPipeline):
    """Image to image with Stable Diffusion 1.x and 2.x.

    It is made of the same components as text to image: ``StableDiffusionImg2ImgPipeline(**pipe.components)``. Args and
    errors: as of ``SDPipeline``.
    """

    _calls: ClassVar[tuple[str, ...]] = ("encode_prompt", "prepare_extra_step_kwargs")

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt = None,
        image: Any = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: Prompt = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
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
        """Generate pictures from pictures.

        Args: the fields of ``ImageRequest`` describe the generation; the rest is as for ``StableDiffusionPipeline``.

        Raises:
            TypeError, ValueError: naming the argument, what was found and what was expected.
        """
        handling = self._handling(
            output_type, callback_on_step_end, callback_on_step_end_tensor_inputs, not_implemented
        )
        request = ImageRequest(
            prompt=prompt,
            image=image,
            strength=strength,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            generator=generator,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            clip_skip=clip_skip,
            seed=seed,
            seeds=seeds,
            long_prompt=long_prompt,
            cross_attention_kwargs=cross_attention_kwargs,
        )
        return self._respond(request, handling, return_dict)

    def steps(self, prompt: Prompt = None, image: Any = None, **arguments: Any) -> Iterator[Step]:
        """Generate step by step; the arguments are the fields of ``ImageRequest``, the steps those of a call."""
        return self._yield_steps(self._begin(ImageRequest(prompt, image=image, **arguments)))

    @torch.no_grad()
    def _start(self, request: ImageRequest) -> Run:
        """Encode texts and images, and noise these to where the run begins."""
        generator, seeds = make_generators(request)
        device = self.device
        plan = begin(self._core, make_plan(self._core, request, device), request)
        image = self._read_image(request.image)
        texts = self._encode_texts(request, device)
        x0 = self._encode_image(image, request.count, generator, like=texts["prompt_embeds"])
        noise = randn(x0.shape, generator, x0.device, x0.dtype)
        return Run(
            plan=plan,
            latents=self._core.noised(plan, x0, noise),
            **texts,
            guidance_scale=request.guidance_scale,
            guidance_rescale=0.0,
            generator=generator,
            seeds=seeds,
        )
