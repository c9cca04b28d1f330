"""Stable Diffusion 1.x and 2.x: a prompt -> text embeddings -> denoised latents -> pictures.

Paper: Rombach et al. 2022 (LDM, https://arxiv.org/abs/2112.10752). Checked against
``diffusers.StableDiffusionPipeline``, seed for seed.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from minidiff.adapters.lora import lora_scaled
from minidiff.compat.paths import names_at
from minidiff.errors import ConfigError
from minidiff.networks.clip import CLIPTextModel
from minidiff.networks.unet import UNet2DConditionModel
from minidiff.networks.vae import AutoencoderKL
from minidiff.outputs import Output
from minidiff.pipelines.callbacks import Callback
from minidiff.pipelines.common import Run, Step, make_generators, make_plan
from minidiff.pipelines.foreign import encoding, first, overridden
from minidiff.pipelines.latent import LatentPipeline, check_channels, family
from minidiff.pipelines.request import Generators, Prompt, Request
from minidiff.schedulers.base import Scheduler
from minidiff.text.tokenizer import CLIPTokenizer
from minidiff.text.windows import Dropped, Embedded, Encoder, Side, Texts, embed

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

logger = logging.getLogger("minidiff")


@dataclass
class StableDiffusionPipelineOutput(Output):
    """What a call returns: the pictures and, if ``seed`` or ``seeds`` was given, the seed of each.

    ``dropped`` is None if every text was read to its end. Otherwise it holds, by the name of the argument, what was cut
    off each of its texts: ``{"prompt": ["", "in the style of..."]}``.
    """

    reference_fields: ClassVar[tuple[str, ...]] = ("images", "nsfw_content_detected")  # the tuple of return_dict=False

    images: "list[Image.Image] | np.ndarray | Tensor"
    nsfw_content_detected: list[bool] | None = None  # None without a safety checker
    seeds: list[int] | None = None
    dropped: Dropped | None = None


class SDPipeline(LatentPipeline):
    """What all tasks with Stable Diffusion 1.x and 2.x share: components and the text.

    Args:
        vae, text_encoder, tokenizer, unet, scheduler: the components; ``text_encoder`` and ``tokenizer`` may be None
            if embeddings are passed in, ``vae`` may be None if latents are taken out.
        safety_checker: a function or network of your own, see ``run_safety_checker``; a checkpoint's is not loaded.
        feature_extractor: kept, shared and saved; only a safety checker asks it.
        image_encoder: kept, shared and saved; nothing here asks it.
        requires_safety_checker: of the reference's signature; kept in ``config``.

    Raises:
        ConfigError: if two components do not fit together, naming both.
    """

    _optional_components: ClassVar[tuple[str, ...]] = ("safety_checker", "feature_extractor", "image_encoder")
    output_class = StableDiffusionPipelineOutput
    scheduler_corrections: ClassVar[Mapping[str, Any]] = {"steps_offset": 1, "clip_sample": False}

    def __init__(
        self,
        vae: AutoencoderKL | None,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        unet: UNet2DConditionModel | None,
        scheduler: Scheduler | None,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        requires_safety_checker: bool = True,
    ) -> None:
        if safety_checker is not None and not callable(safety_checker):
            raise ConfigError(f"safety_checker should be None or called, found {type(safety_checker).__name__}")
        _check_fit(text_encoder, tokenizer, unet)
        check_channels(type(self), vae, unet)
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=_corrected(scheduler, self.scheduler_corrections),
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        self.register_to_config(requires_safety_checker=requires_safety_checker)

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | str,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: Prompt = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        *,
        long_prompt: str = "cut",
    ) -> tuple[Tensor, Tensor | None]:
        """Encode prompts and, under guidance, negative prompts: two (B * N, L, D), each text repeated N times.

        ``long_prompt`` is "cut" or "chunk", see ``minidiff.text.windows``; ``lora_scale`` is what LoRA adapters are
        multiplied with.
        """
        texts = Texts(
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            num_images_per_prompt=num_images_per_prompt,
            guided=do_classifier_free_guidance,
            clip_skip=clip_skip,
            long_prompt=long_prompt,
        )
        with lora_scaled(lora_scale):
            found = self._embed(texts, device)
        return found.prompt_embeds, found.negative_prompt_embeds

    def _encode_prompt(
        self,
        prompt: Prompt,
        device: torch.device | str,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Return what ``encode_prompt`` does as one tensor, under guidance the negative embeddings first."""
        positive, negative = self.encode_prompt(
            prompt, device, num_images_per_prompt, do_classifier_free_guidance, *args, **kwargs
        )
        return torch.cat([negative, positive]) if do_classifier_free_guidance else positive

    def _embed(self, texts: Texts, device: torch.device | str) -> Embedded:
        positive, negative = texts.prompts, texts.negative_prompts
        sides = [Side([("prompt", positive)], texts.clip_skip, texts.prompt_embeds)]
        if texts.guided:  # the negative side is never encoded with clip_skip, as in the reference
            sides.append(Side([("negative_prompt", negative)], None, texts.negative_prompt_embeds))
        found, dropped = embed(self._encoders, sides, texts, device)
        dtype = self.text_encoder.dtype if self.text_encoder is not None else self.unet.dtype
        states = [z.to(device, dtype).repeat_interleave(texts.num_images_per_prompt, dim=0) for z, _ in found]
        return Embedded(states[0], states[1] if texts.guided else None, dropped=dropped)

    def _encoders(self) -> list[Encoder]:
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "this pipeline has no text encoder or tokenizer: pass prompt_embeds (and, under guidance, "
                "negative_prompt_embeds of the same shape)"
            )
        return [Encoder(self.tokenizer, self._states)]

    def _states(self, ids: Tensor, clip_skip: int | None) -> tuple[Tensor, None]:
        if clip_skip is None:
            return first(self.text_encoder(ids), "last_hidden_state"), None
        states = self.text_encoder(ids, output_hidden_states=True).hidden_states
        return self.text_encoder.norm_out(states[-(clip_skip + 1)]), None

    def _encode_texts(self, request: Request, device: torch.device) -> dict[str, Any]:
        """Check and encode the texts of a request; return what goes into its run."""
        self._check_clip_skip(request.clip_skip)
        self._check_width("prompt_embeds", request.prompt_embeds)
        self._check_width("negative_prompt_embeds", request.negative_prompt_embeds)
        if overridden(self, "encode_prompt"):
            asked = encoding(request, device)
            first_ones = ("prompt", "device", "num_images_per_prompt", "do_classifier_free_guidance", "negative_prompt")
            positive, negative = self.encode_prompt(*[asked.pop(name) for name in first_ones], **asked)
            dropped = None
        else:
            positive, negative, *_, dropped = self._embed(Texts.of(request), device)
        both = torch.cat([negative, positive]) if request.guided else positive
        return {"prompt_embeds": both, "negative_prompt_embeds": negative, "dropped": dropped}

    def _network(self, x: Tensor, t: Tensor, run: Run) -> Tensor:
        return first(self.unet(x, t, encoder_hidden_states=run.prompt_embeds, **run.told), "sample")

    def _trained_size(self) -> tuple[int | None, int | None]:
        # The first published UNet configs said 32 by mistake; the reference reads less than 64 from before 0.9 as 64.
        config = self.unet.config
        found = re.match(r"(\d+)\.(\d+)", config.get("_diffusers_version", ""))
        old = found is not None and (int(found[1]), int(found[2])) < (0, 9)
        if old and isinstance(config.sample_size, int) and config.sample_size < 64:
            return 64, 64
        return super()._trained_size()

    def _check_clip_skip(self, clip_skip: int | None) -> None:
        if clip_skip is None or self.text_encoder is None:
            return
        layers = self.text_encoder.config.num_hidden_layers
        if isinstance(clip_skip, bool) or not isinstance(clip_skip, int) or not 0 <= clip_skip <= layers:
            raise ValueError(f"clip_skip should be None or 0 to {layers}, found {clip_skip!r}")


class StableDiffusionPipeline(SDPipeline):
    """Text to image with Stable Diffusion 1.x and 2.x; components and errors are those of ``SDPipeline``."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt = None,
        height: int | None = None,
        width: int | None = None,
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
        guidance_rescale: float = 0.0,
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
        """Generate pictures.

        Args: the fields of ``Request`` describe the generation; besides them
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent".
            return_dict: whether to return a record or the tuple (images, None).
            callback_on_step_end: called as f(pipe, index, timestep, tensors) after each step; returns a dict whose
                tensors replace those of the run. It may set ``pipe._interrupt = True`` to stop, and
                ``pipe._guidance_scale``.
            callback_on_step_end_tensor_inputs: which tensors it gets: latents, prompt_embeds, negative_prompt_embeds.

        Raises:
            TypeError, ValueError: naming the argument, what was found and what was expected.
        """
        handling = self._handling(
            output_type, callback_on_step_end, callback_on_step_end_tensor_inputs, not_implemented
        )
        request = Request(
            prompt,
            height,
            width,
            num_inference_steps,
            timesteps,
            sigmas,
            guidance_scale,
            negative_prompt,
            num_images_per_prompt,
            eta,
            generator,
            latents,
            prompt_embeds,
            negative_prompt_embeds,
            guidance_rescale,
            clip_skip,
            seed,
            seeds,
            long_prompt,
            cross_attention_kwargs,
        )
        return self._respond(request, handling, return_dict)

    def steps(self, *args: Any, **kwargs: Any) -> Iterator[Step]:
        """Generate step by step: yield a ``Step`` after each, with the latents and the clean latents predicted.

        The arguments are those of a call that concern the generation: the fields of ``Request``. Leaving the loop early
        stops the generation::

            for step in pipe.steps("red apple", num_inference_steps=20, seed=7):
                preview = pipe.decode(step.denoised)
        """
        return self._yield_steps(self._begin(Request(*args, **kwargs)))  # wrong arguments are said now, not at next()

    @torch.no_grad()
    def _start(self, request: Request) -> Run:
        """Encode the texts, plan the steps and draw the first latents."""
        H, W = self._latent_size(request.height, request.width)
        generator, seeds = make_generators(request)
        device = self.device
        plan = make_plan(self._core, request, device)
        texts = self._encode_texts(request, device)
        shape = (request.count, self.unet.config.in_channels, H, W)
        return Run(
            plan=plan,
            latents=self._noise(shape, request, plan, generator, texts["prompt_embeds"]),
            **texts,
            guidance_scale=request.guidance_scale,
            guidance_rescale=request.guidance_rescale,
            generator=generator,
            seeds=seeds,
        )


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_fit(
    text_encoder: CLIPTextModel | None, tokenizer: CLIPTokenizer | None, unet: UNet2DConditionModel | None
) -> None:
    """Raise ``ConfigError`` if two components were not made for each other."""
    if text_encoder is not None:
        D = text_encoder.config.hidden_size
        D_ctx = unet.spec.levels[-1].D_ctx if hasattr(unet, "spec") else D
        if D_ctx != D:
            raise ConfigError(
                f"text_encoder and unet do not fit: hidden_size {D} of the text encoder ({family(D)}) against "
                f"cross_attention_dim {D_ctx} of the UNet ({family(D_ctx)})"
            )
        if tokenizer is not None and len(tokenizer) > text_encoder.config.vocab_size:
            raise ConfigError(
                f"tokenizer and text_encoder do not fit: {len(tokenizer)} tokens against vocab_size "
                f"{text_encoder.config.vocab_size}"
            )


def _corrected(scheduler: Scheduler | None, corrections: Mapping[str, Any]) -> Scheduler | None:
    """Correct what the reference corrects in outdated configurations, in the object that was given, as it does.

    Wherever the wrong value comes from: a file, or the default of a class where the file says nothing.
    """
    if scheduler is None:
        return None
    outdated = {name: right for name, right in corrections.items() if scheduler.config.get(name, right) != right}
    if outdated:
        logger.info("scheduler config updated for Stable Diffusion, as the reference does: %s", outdated)
        scheduler.register_to_config(**outdated)
    return scheduler


__path__, __getattr__ = [], names_at(__name__)  # the reference has a package of this name
