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

from minidiff.clip import CLIPTextModel
from minidiff.errors import ConfigError
from minidiff.outputs import Output
from minidiff.pipelines.base import DiffusionPipeline
from minidiff.pipelines.callbacks import Callback, Callbacks
from minidiff.pipelines.common import Run, Step, denoise, initial_latents, make_generators, make_plan
from minidiff.pipelines.request import Generators, Prompt, Request, check_choice, check_count
from minidiff.schedulers.base import Scheduler
from minidiff.tokenizer import CLIPTokenizer
from minidiff.unet import UNet2DConditionModel
from minidiff.vae import AutoencoderKL

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

logger = logging.getLogger("minidiff")

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class StableDiffusionPipelineOutput(Output):
    """What a call returns: the pictures and, if ``seed`` or ``seeds`` was given, the seed of each."""

    images: "list[Image.Image] | np.ndarray | Tensor"
    nsfw_content_detected: None = None  # as in the reference without a safety checker
    seeds: list[int] | None = None


class StableDiffusionPipeline(Callbacks, DiffusionPipeline):
    """Text to image with Stable Diffusion 1.x and 2.x.

    Args:
        vae, text_encoder, tokenizer, unet, scheduler: the components; ``text_encoder`` and ``tokenizer`` may be None
            if embeddings are passed in, ``vae`` may be None if latents are taken out.
        safety_checker, feature_extractor, image_encoder: not implemented, must be None.
        requires_safety_checker: of the reference's signature; kept in ``config``.

    Raises:
        ConfigError: if two components do not fit together, naming both.
    """

    optional_components: ClassVar[tuple[str, ...]] = ("safety_checker", "feature_extractor", "image_encoder")

    def __init__(
        self,
        vae: AutoencoderKL | None,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
        safety_checker: None = None,
        feature_extractor: None = None,
        image_encoder: None = None,
        requires_safety_checker: bool = True,
    ) -> None:
        absent = {
            "safety_checker": safety_checker,
            "feature_extractor": feature_extractor,
            "image_encoder": image_encoder,
        }
        for name, component in absent.items():
            if component is not None:
                raise ConfigError(f"{name} is not implemented: pass {name}=None, found {type(component).__name__}")
        _check_fit(vae, text_encoder, tokenizer, unet)
        components = {
            "vae": vae,
            "text_encoder": text_encoder,
            "tokenizer": tokenizer,
            "unet": unet,
            "scheduler": _updated(scheduler),
            **absent,
        }
        Callbacks.__init__(self)
        DiffusionPipeline.__init__(self, components, {"requires_safety_checker": requires_safety_checker})

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae is not None else 8

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
        _refuse(not_implemented)
        check_choice("output_type", output_type, _OUTPUT_TYPES)
        names = callback_on_step_end_tensor_inputs
        for name in names:
            check_choice("callback_on_step_end_tensor_inputs", name, self._callback_tensor_inputs)
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
        )
        run = self._start(request)
        order, evaluations = self.scheduler.order, len(run.plan.steps)
        warmup = evaluations - run.plan.num_inference_steps * order
        with self.progress_bar(total=run.plan.num_inference_steps) as bar:
            for i, _, _ in denoise(self._network, self.scheduler, run):
                if callback_on_step_end is not None:
                    self._call_back(callback_on_step_end, run, i, names)
                if i == evaluations - 1 or (i + 1 > warmup and (i + 1) % order == 0):
                    bar.update()
        images = self.decode(run.latents, output_type)
        return StableDiffusionPipelineOutput(images, None, run.seeds) if return_dict else (images, None)

    def steps(self, *args: Any, **kwargs: Any) -> Iterator[Step]:
        """Generate step by step: yield a ``Step`` after each, with the latents and the clean latents predicted.

        The arguments are those of a call that concern the generation: the fields of ``Request``. Leaving the loop early
        stops the generation::

            for step in pipe.steps("red apple", num_inference_steps=20, seed=7):
                preview = pipe.decode(step.denoised)
        """
        return self._yield_steps(self._start(Request(*args, **kwargs)))  # wrong arguments are said now, not at next()

    @torch.no_grad()
    def _yield_steps(self, run: Run) -> Iterator[Step]:
        for i, x, out in denoise(self._network, self.scheduler, run):
            yield Step(i, run.plan.timesteps[i], run.latents, self.scheduler.denoised(run.plan, i, x, out))

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pil") -> "list[Image.Image] | np.ndarray | Tensor":
        """Turn latents of the diffusion process (B, C, H, W) into pictures, as ``output_type`` of a call says.

        Raises:
            ValueError: if the decoded pictures hold NaN or infinity, naming the fix.
        """
        from minidiff import images  # brings PIL

        if output_type == "latent":
            return latents
        if self.vae is None:
            raise ValueError("this pipeline has no vae: take the latents with output_type='latent'")
        x = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return {"pil": images.to_pil, "np": images.to_numpy, "pt": images.to_unit}[output_type](x)

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
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Encode prompts and, under guidance, negative prompts: two (B * N, L, D), each text repeated N times."""
        positive = self._encode(prompt, device, clip_skip) if prompt_embeds is None else prompt_embeds
        batch = len(positive)
        dtype = self.text_encoder.dtype if self.text_encoder is not None else self.unet.dtype
        negative = negative_prompt_embeds
        if do_classifier_free_guidance and negative is None:
            texts = [negative_prompt or ""] * batch if not isinstance(negative_prompt, list) else negative_prompt
            # The negative text is encoded to the same number of tokens, and never with clip_skip, as in the reference.
            negative = self._encode(texts, device, None, max_length=positive.shape[1])
        N = num_images_per_prompt
        positive = positive.to(device, dtype).repeat_interleave(N, dim=0)
        if not do_classifier_free_guidance:
            return positive, None
        return positive, negative.to(device, dtype).repeat_interleave(N, dim=0)

    def _encode(
        self, texts: str | list[str], device: torch.device | str, clip_skip: int | None, max_length: int | None = None
    ) -> Tensor:
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "this pipeline has no text encoder or tokenizer: pass prompt_embeds (and, under guidance, "
                "negative_prompt_embeds)"
            )
        length = max_length or self.tokenizer.model_max_length
        tokens = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids = tokens.input_ids.to(device)
        if clip_skip is None:
            return self.text_encoder(ids).last_hidden_state
        states = self.text_encoder(ids, output_hidden_states=True).hidden_states
        return self.text_encoder.norm_out(states[-(clip_skip + 1)])

    # --- one run -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _start(self, request: Request) -> Run:
        """Encode the texts, plan the steps and draw the first latents."""
        self._check_clip_skip(request.clip_skip)
        self._check_width("prompt_embeds", request.prompt_embeds)
        self._check_width("negative_prompt_embeds", request.negative_prompt_embeds)
        H, W = self._latent_size(request.height, request.width)
        generator, seeds = make_generators(request)
        device = self.device
        plan = make_plan(self.scheduler, request, device)
        positive, negative = self.encode_prompt(
            request.prompt,
            device,
            request.num_images_per_prompt,
            request.guided,
            request.negative_prompt,
            request.prompt_embeds,
            request.negative_prompt_embeds,
            request.clip_skip,
        )
        shape = (request.count, self.unet.config.in_channels, H, W)
        noise = initial_latents(shape, request.latents, generator, device, positive.dtype)
        return Run(
            plan=plan,
            latents=noise * plan.init_noise_sigma,
            prompt_embeds=torch.cat([negative, positive]) if request.guided else positive,
            negative_prompt_embeds=negative,
            guidance_scale=request.guidance_scale,
            guidance_rescale=request.guidance_rescale,
            generator=generator,
            seeds=seeds,
        )

    def _network(self, x: Tensor, t: Tensor, ctx: Tensor) -> Tensor:
        return self.unet(x, t, ctx).sample

    def _latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return height and width in latents; a side that was not given is what the UNet was trained on."""
        f = self.vae_scale_factor
        default = _trained_size(self.unet)
        sizes = []
        for name, pixels, latent in (("height", height, default[0]), ("width", width, default[1])):
            if pixels is None and latent is None:
                raise ValueError(f"{name} must be given: this UNet's config has no sample_size")
            if pixels is None:
                pixels = latent * f
            check_count(name, pixels)
            if pixels % f:
                raise ValueError(f"{name} should be divisible by {f}, found {pixels}; {pixels - pixels % f} would do")
            sizes.append(pixels // f)
        return sizes[0], sizes[1]

    def _check_clip_skip(self, clip_skip: int | None) -> None:
        if clip_skip is None or self.text_encoder is None:
            return
        layers = self.text_encoder.config.num_hidden_layers
        if isinstance(clip_skip, bool) or not isinstance(clip_skip, int) or not 0 <= clip_skip <= layers:
            raise ValueError(f"clip_skip should be None or 0 to {layers}, found {clip_skip!r}")

    def _check_width(self, name: str, embeds: Tensor | None) -> None:
        D = self.unet.spec.levels[-1].D_ctx
        if embeds is not None and embeds.shape[-1] != D:
            raise ValueError(
                f"{name} should be (B, L, {D}) for this UNet ({_family(D)}), found {tuple(embeds.shape)} "
                f"({_family(embeds.shape[-1])})"
            )


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_fit(
    vae: AutoencoderKL | None,
    text_encoder: CLIPTextModel | None,
    tokenizer: CLIPTokenizer | None,
    unet: UNet2DConditionModel,
) -> None:
    """Raise ``ConfigError`` if two components were not made for each other."""
    if text_encoder is not None:
        D, D_ctx = text_encoder.config.hidden_size, unet.spec.levels[-1].D_ctx
        if D_ctx != D:
            raise ConfigError(
                f"text_encoder and unet do not fit: hidden_size {D} of the text encoder ({_family(D)}) against "
                f"cross_attention_dim {D_ctx} of the UNet ({_family(D_ctx)})"
            )
        if tokenizer is not None and len(tokenizer) > text_encoder.config.vocab_size:
            raise ConfigError(
                f"tokenizer and text_encoder do not fit: {len(tokenizer)} tokens against vocab_size "
                f"{text_encoder.config.vocab_size}"
            )
    if vae is not None:
        Z = vae.config.latent_channels
        if (unet.config.in_channels, unet.config.out_channels) != (Z, Z):
            raise ConfigError(
                f"vae and unet do not fit for text to image: latent_channels {Z} of the VAE against in_channels "
                f"{unet.config.in_channels} and out_channels {unet.config.out_channels} of the UNet (9 in: an "
                "inpainting UNet, 8 in: instruct-pix2pix)"
            )


def _family(D: int) -> str:
    return {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL refiner", 2048: "SDXL base"}.get(D, "no published family")


def _updated(scheduler: Scheduler) -> Scheduler:
    """Return the scheduler with two fields that the reference corrects in outdated configs of Stable Diffusion."""
    outdated = {
        name: right
        for name, right in (("steps_offset", 1), ("clip_sample", False))
        if scheduler.config.get(name, right) != right
    }
    if not outdated:
        return scheduler
    logger.info("scheduler config updated for Stable Diffusion, as the reference does: %s", outdated)
    return type(scheduler).from_config({**scheduler.config, **outdated})


def _trained_size(unet: UNet2DConditionModel) -> tuple[int | None, int | None]:
    """Return the latent height and width that the UNet was trained on, (None, None) if its config does not say."""
    size = unet.config.sample_size
    if isinstance(size, list):
        return size[0], size[1]
    # The first published UNet configs said 32 by mistake; the reference reads anything below 64 from before 0.9 as 64.
    found = re.match(r"(\d+)\.(\d+)", unet.config.get("_diffusers_version", ""))
    if found and (int(found[1]), int(found[2])) < (0, 9) and size is not None and size < 64:
        size = 64
    return size, size


def _refuse(arguments: Mapping[str, Any]) -> None:
    """Raise on arguments that are unknown or whose feature is not implemented; None asks for nothing."""
    if asked := [name for name, value in arguments.items() if value is not None]:
        raise TypeError(f"StableDiffusionPipeline does not implement the argument(s) {', '.join(asked)}")
