"""Editing pictures by instruction with Stable Diffusion 1.x: "make the mountains snowy".

The formula is in ``instruct_pix2pix``. Checked against ``diffusers.StableDiffusionInstructPix2PixPipeline``, seed for
seed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from minidiff.pipelines.callbacks import Callback
from minidiff.pipelines.common import Step, make_generators, make_plan
from minidiff.pipelines.instruct_pix2pix import Editing, EditingPipeline, EditRun, three_fold
from minidiff.pipelines.request import Generators, Prompt, Request
from minidiff.pipelines.stable_diffusion import SDPipeline, StableDiffusionPipelineOutput


@dataclass(frozen=True)
class EditRequest(Editing, Request):
    """The arguments of one edit, with the reference's names and defaults: those of ``Request`` and of ``Editing``.

    The result has the size of the image, so there are no ``height`` and ``width``.
    """

    num_inference_steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.height is not None or self.width is not None:
            raise TypeError("an edit takes no height and width: the result has the size of the image")


class StableDiffusionInstructPix2PixPipeline(EditingPipeline, SDPipeline):
    """Edit pictures by instruction, with a UNet of 8 channels such as timbrooks/instruct-pix2pix.

    Args and errors: as of ``StableDiffusionPipeline``.
    """

    scheduler_corrections: ClassVar[Mapping[str, Any]] = {}  # the reference leaves outdated configs as they are here
    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = ("latents", "prompt_embeds", "image_latents")

    @torch.no_grad()
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
        handling = self._handling(
            output_type, callback_on_step_end, callback_on_step_end_tensor_inputs, not_implemented
        )
        request = EditRequest(
            prompt=prompt,
            image=image,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            eta=eta,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            seed=seed,
            seeds=seeds,
            long_prompt=long_prompt,
            cross_attention_kwargs=cross_attention_kwargs,
        )
        return self._respond(request, handling, return_dict)

    def steps(self, prompt: Prompt = None, **arguments: Any) -> Iterator[Step]:
        """Edit step by step; the arguments are the fields of ``EditRequest``, the steps those of a call."""
        return self._yield_steps(self._begin(EditRequest(prompt, **arguments)))

    @torch.no_grad()
    def _start(self, request: EditRequest) -> EditRun:
        generator, seeds = make_generators(request)
        device = self.device
        plan = make_plan(self._core, request, device)
        texts = self._encode_texts(request, device)
        if request.guided:
            texts["prompt_embeds"] = three_fold(texts["prompt_embeds"])
        ctx = texts["prompt_embeds"]
        shown = self._image_latents(request, ctx)
        shape = (request.count, *shown.shape[1:])
        return EditRun(
            plan=plan,
            latents=self._noise(shape, request, plan, generator, ctx),
            guidance_scale=request.guidance_scale,
            guidance_rescale=request.guidance_rescale,
            generator=generator,
            seeds=seeds,
            image_latents=shown,
            image_guidance_scale=request.image_guidance_scale,
            **texts,
        )
