"""Stable Diffusion 1.x and 2.x: a prompt -> text embeddings -> denoised latents -> pictures.

Paper: Rombach et al. 2022 (LDM, https://arxiv.org/abs/2112.10752). Checked against
``diffusers.StableDiffusionPipeline``, seed for seed.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from minidiff.adapters.lora import lora_scaled
from minidiff.compat.paths import names_at
from minidiff.errors import ConfigError
from minidiff.networks.clip import CLIPTextModel
from minidiff.networks.safety_checker import StableDiffusionSafetyChecker
from minidiff.networks.unet import UNet2DConditionModel
from minidiff.networks.vae import AutoencoderKL
from minidiff.networks.vae_tiny import AutoencoderTiny
from minidiff.noise import Generators
from minidiff.outputs import Output
from minidiff.pipelines.callbacks import Callback
from minidiff.pipelines.foreign import first
from minidiff.pipelines.latent import LatentPipeline, check_channels, family
from minidiff.pipelines.request import Prompt, Request
from minidiff.pipelines.run import TextToImage
from minidiff.pipelines.state import Run
from minidiff.schedulers.base import Scheduler
from minidiff.text.tokenizer import CLIPTokenizer
from minidiff.text.windows import Dropped, Read, TextEncoder, embed, negative_texts, plain, prompts_of

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

logger = logging.getLogger("minidiff")
_UNCHECKED = (
    "%s has no safety checker: keep to the conditions of the checkpoint's licence, and do not show the public pictures "
    "that nobody has looked at. requires_safety_checker=False says that none is needed"
)


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


class StableDiffusion(LatentPipeline):
    """The family: Stable Diffusion 1.x and 2.x, their components and how their text becomes a condition.

    Args:
        vae, text_encoder, tokenizer, unet, scheduler: the components; ``text_encoder`` and ``tokenizer`` may be None
            if embeddings are passed in, ``vae`` may be None if latents are taken out.
        safety_checker: what looks at the decoded pictures and flags some, the checkpoint's or a function or network of
            your own, see ``run_safety_checker``; None leaves it out.
        feature_extractor: prepares the pictures for the safety checker.
        image_encoder: kept, shared and saved; nothing here asks it.
        requires_safety_checker: whether to warn if there is none: published checkpoints of SD 1.x were released under
            the condition that there is one.

    Raises:
        ConfigError: if two components do not fit together, naming both.
    """

    _optional_components: ClassVar[tuple[str, ...]] = ("safety_checker", "feature_extractor", "image_encoder")
    output_class = StableDiffusionPipelineOutput
    _by_position = ("prompt", "device", "num_images_per_prompt", "do_classifier_free_guidance", "negative_prompt")
    scheduler_corrections: ClassVar[Mapping[str, Any]] = {"steps_offset": 1, "clip_sample": False}

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderTiny | None,
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
        if isinstance(safety_checker, StableDiffusionSafetyChecker) and feature_extractor is None:
            raise ConfigError("a safety_checker needs a feature_extractor: pass a CLIPImageProcessor, or no checker")
        if safety_checker is None and requires_safety_checker:
            logger.warning(_UNCHECKED, type(self).__name__)
        _check_fit(text_encoder, tokenizer, unet)
        check_channels(type(self), vae, unet)
        scheduler = _corrected(scheduler, self.scheduler_corrections)
        self._set_up(StableDiffusion, locals())

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
        with lora_scaled(lora_scale):
            positive, negative, _ = self._embed(locals())
        return positive, negative

    def _encode_prompt(
        self,
        prompt: Prompt,
        device: torch.device | str,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Return what ``encode_prompt`` does as one tensor, under guidance as the UNet is shown it."""
        positive, negative = self.encode_prompt(
            prompt, device, num_images_per_prompt, do_classifier_free_guidance, *args, **kwargs
        )
        return self.guidance.rows(positive, negative) if do_classifier_free_guidance else positive

    def _embed(self, asked: Mapping[str, Any], read: Read = plain) -> tuple[Tensor, Tensor | None, Dropped | None]:
        """Return what ``encode_prompt`` does, and what was cut off; ``asked`` are its arguments."""
        texts = {"": [("prompt", prompts_of(asked))]}
        if asked["do_classifier_free_guidance"]:
            texts["negative_"] = [("negative_prompt", negative_texts(asked))]
        found, dropped = embed(self._encoders, texts, asked, asked["device"], read)
        like, N = self.text_encoder if self.text_encoder is not None else self.unet, asked["num_images_per_prompt"]
        states = [z.to(asked["device"], like.dtype).repeat_interleave(N, dim=0) for z, _ in found]
        return states[0], states[1] if len(states) == 2 else None, dropped

    def _encoders(self) -> list[TextEncoder]:
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "this pipeline has no text encoder or tokenizer: pass prompt_embeds (and, under guidance, "
                "negative_prompt_embeds of the same shape)"
            )
        return [TextEncoder(self.tokenizer, self._states)]

    def _states(self, ids: Tensor, clip_skip: int | None) -> tuple[Tensor, None]:
        if clip_skip is None:
            return first(self.text_encoder(ids), "last_hidden_state"), None
        states = self.text_encoder(ids, output_hidden_states=True).hidden_states
        return self.text_encoder.norm_out(states[-(clip_skip + 1)]), None

    def _text_tensors(self, run: Run, positive: Tensor, negative: Tensor | None) -> dict[str, Tensor]:
        both = run.guidance.rows(positive, negative) if run.guided else positive
        return {"prompt_embeds": both, "negative_prompt_embeds": negative}

    def _trained_size(self) -> tuple[int | None, int | None]:
        # The first published UNet configs said 32 by mistake; the reference reads less than 64 from before 0.9 as 64.
        config = self.unet.config
        found = re.match(r"(\d+)\.(\d+)", config.get("_diffusers_version", ""))
        old = found is not None and (int(found[1]), int(found[2])) < (0, 9)
        if old and isinstance(config.sample_size, int) and config.sample_size < 64:
            return 64, 64
        return super()._trained_size()


class StableDiffusionPipeline(TextToImage, StableDiffusion):
    """Text to image with Stable Diffusion 1.x and 2.x; components and errors are those of ``StableDiffusion``."""

    request = Request

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
        return self._respond(locals())


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
