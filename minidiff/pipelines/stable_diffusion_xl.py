"""Stable Diffusion XL: two text encoders, and pictures conditioned on the sizes that training pictures had.

    ctx    = [penultimate state of encoder 1, penultimate state of encoder 2]          (B, 77, 768 + 1280)
    pooled = text_embeds of encoder 2                                                   (B, 1280)
    out    = unet(x, t, ctx, pooled, (original size, crop, target size))

The refiner, an image-to-image model for the last part of the noise levels, has encoder 2 alone.

Paper: Podell et al. 2023 (SDXL, https://arxiv.org/abs/2307.01952), sections 2.1, 2.2 and 2.5. Checked against
``diffusers.StableDiffusionXLPipeline``, seed for seed.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from minidiff.adapters.lora import lora_scaled
from minidiff.compat.paths import names_at
from minidiff.errors import ConfigError
from minidiff.networks.clip import CLIPTextModel, CLIPTextModelWithProjection
from minidiff.networks.unet import UNet2DConditionModel
from minidiff.networks.vae import AutoencoderKL
from minidiff.networks.vae_tiny import AutoencoderTiny
from minidiff.noise import Generators
from minidiff.outputs import Output
from minidiff.pipelines.callbacks import Callback
from minidiff.pipelines.latent import LatentPipeline, check_channels, latent_moments
from minidiff.pipelines.request import Prompt
from minidiff.pipelines.request_xl import Size, XLRequest
from minidiff.pipelines.run import TextToImage
from minidiff.pipelines.state import Condition, Run
from minidiff.schedulers.base import Scheduler
from minidiff.text.tokenizer import CLIPTokenizer
from minidiff.text.windows import Dropped, Read, TextEncoder, embed, negative_texts, plain, prompts_of

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

logger = logging.getLogger("minidiff")


@dataclass
class StableDiffusionXLPipelineOutput(Output):
    """What a call returns: the pictures, their seeds and what was cut off, as ``StableDiffusionPipelineOutput``.

    A text that both tokenizers read is reported once, by the name of the argument that it came from.
    """

    reference_fields: ClassVar[tuple[str, ...]] = ("images",)  # the tuple of return_dict=False

    images: "list[Image.Image] | np.ndarray | Tensor"
    seeds: list[int] | None = None
    dropped: Dropped | None = None


class StableDiffusionXL(LatentPipeline):
    """The family: components, texts and the sizes that pictures are conditioned on.

    Args:
        vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2, unet, scheduler: the components; text encoders and
            tokenizers may be None if embeddings are passed in, ``vae`` may be None if latents are taken out.
        image_encoder, feature_extractor: kept, shared and saved; nothing here asks them.
        force_zeros_for_empty_prompt: whether the embeddings of an absent negative prompt are zeros.
        add_watermarker: not implemented, must be None or False.

    Raises:
        ConfigError: if two components do not fit together, naming both.
    """

    output_class = StableDiffusionXLPipelineOutput
    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = ("latents", "prompt_embeds", "add_text_embeds", "add_time_ids")
    _layers_before_the_last = 1

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
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        self._set_up_xl(StableDiffusionXL, locals())

    def _set_up_xl(self, kind: type["StableDiffusionXL"], arguments: Mapping[str, Any], time_ids: int = 6) -> None:
        """Check a constructor's arguments and register them; ``time_ids`` is how many sizes the UNet is told."""
        if arguments["add_watermarker"]:
            raise ConfigError("add_watermarker=True is not implemented: pictures get no invisible watermark")
        _check_fit(arguments, time_ids)
        check_channels(type(self), arguments["vae"], arguments["unet"])
        self._set_up(kind, arguments)

    def _decoder(self) -> AutoencoderKL | AutoencoderTiny:
        return self._in_float32(torch.float16)

    def _encoder(self) -> AutoencoderKL | AutoencoderTiny:
        return self._in_float32(torch.float16, torch.bfloat16)

    def _in_float32(self, *dtypes: torch.dtype) -> AutoencoderKL | AutoencoderTiny:
        """Return the autoencoder, or a float32 copy if it has one of ``dtypes`` and its config says it overflows there.

        A copy, because another thread may be using the autoencoder as it is.
        """
        upcast = self.vae.dtype in dtypes and self.vae.config.force_upcast
        return copy.deepcopy(self.vae).float() if upcast else self.vae

    def _unscaled(self, latents: Tensor, vae: AutoencoderKL) -> Tensor:
        moments = latent_moments(vae, latents)
        if moments is None:
            return super()._unscaled(latents, vae)
        mean, std = moments
        return latents * std / vae.config.scaling_factor + mean

    # --- texts -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: Prompt,
        prompt_2: Prompt = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Prompt = None,
        negative_prompt_2: Prompt = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        *,
        long_prompt: str = "cut",
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Encode prompts and, under guidance, negative prompts, each repeated N = ``num_images_per_prompt`` times.

        ``long_prompt`` is "cut" or "chunk", see ``minidiff.text.windows``; ``lora_scale`` is what LoRA adapters are
        multiplied with.

        Returns:
            embeddings (B * N, L, D), negative ones, pooled embeddings (B * N, P), negative ones. Without a negative
            prompt the negative ones are zeros if the checkpoint says ``force_zeros_for_empty_prompt``.

        Raises:
            ValueError: if there is no text encoder for a text.
        """
        device = self.device if device is None else device
        with lora_scaled(lora_scale):
            *found, _ = self._embed(locals())
        return tuple(found)

    def _embed(
        self, asked: Mapping[str, Any], read: Read = plain
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Dropped | None]:
        """Return what ``encode_prompt`` does, and what was cut off; ``asked`` are its arguments."""
        guided = asked["do_classifier_free_guidance"]
        absent = asked["negative_prompt"] is None and asked["negative_prompt_embeds"] is None
        zeros = guided and absent and self._settings["force_zeros_for_empty_prompt"]
        if zeros and asked["negative_prompt_2"] is not None:
            raise ValueError("negative_prompt_2 counts only beside a negative_prompt, which may be ''")
        texts = {"": self._for_each("prompt", prompts_of(asked), asked["prompt_2"])}
        if guided and not zeros:
            negatives = negative_texts(asked)
            texts["negative_"] = self._for_each("negative_prompt", negatives, asked["negative_prompt_2"])
        found, dropped = embed(self._encoders, texts, asked, asked["device"], read)
        if zeros:
            found.append(tuple(torch.zeros_like(z) for z in found[0]))
        dtype, N = (self.text_encoder_2 or self.unet).dtype, asked["num_images_per_prompt"]
        copies = [[z.to(asked["device"], dtype).repeat_interleave(N, dim=0) for z in side] for side in found]
        (positive, pooled), (negative, negative_pooled) = copies if guided else [*copies, (None, None)]
        return positive, negative, pooled, negative_pooled, dropped

    def _for_each(self, name: str, texts: list[str] | None, texts_2: Prompt) -> list[tuple[str, list[str]]]:
        """Return what each encoder reads, by argument; without texts of its own the second reads the same."""
        if texts is None:
            return []
        second = (name, texts)
        if texts_2:
            second = (f"{name}_2", [texts_2] * len(texts) if isinstance(texts_2, str) else texts_2)
        if None not in (self.text_encoder, self.tokenizer):
            return [(name, texts), second]
        if second[1] != texts:
            logger.warning("prompt_2 and negative_prompt_2 are not used: this pipeline has one text encoder")
        return [(name, texts)]

    def _encoders(self) -> list[TextEncoder]:
        """Return the text encoders that there are, with their tokenizers."""
        pairs = [(self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)]
        if None in pairs[1]:
            raise ValueError(
                "this pipeline has no text_encoder_2 or tokenizer_2: pass prompt_embeds and pooled_prompt_embeds (and, "
                "under guidance, those of the negative prompt, of the same shape)"
            )
        return [TextEncoder(pair[0], partial(_states, pair[1])) for pair in pairs if None not in pair]

    def _get_add_time_ids(
        self,
        original_size: Size,
        crops_coords_top_left: Size,
        target_size: Size,
        dtype: torch.dtype,
        text_encoder_projection_dim: int | None = None,
    ) -> Tensor:
        """Return the six numbers that a picture is conditioned on, (1, 6)."""
        return torch.tensor([[*original_size, *crops_coords_top_left, *target_size]], dtype=dtype)

    # --- one run -----------------------------------------------------------------------------------------------------

    def _text_tensors(
        self, run: Run, positive: Tensor, negative: Tensor | None, pooled: Tensor, negative_pooled: Tensor | None
    ) -> dict[str, Tensor]:
        if run.guided:
            positive, pooled = run.guidance.rows(positive, negative), run.guidance.rows(pooled, negative_pooled)
        return {"prompt_embeds": positive, "add_text_embeds": pooled}

    def _conditions(self, request: XLRequest, run: Run) -> list[Condition]:
        """Add what XL shows its UNet at every step: the pooled text, and sizes."""
        like, f = run.tensors["prompt_embeds"], self.vae_scale_factor
        size = tuple(side * f for side in run.latents.shape[-2:])
        positive, negative = (
            torch.tensor([numbers] * request.count, dtype=like.dtype, device=like.device)
            for numbers in self._sizes(request, size)
        )
        run.tensors["add_time_ids"] = run.guidance.rows(positive, negative) if run.guided else positive
        return [*super()._conditions(request, run), text_and_sizes]

    def _sizes(self, request: XLRequest, size: tuple[int, int]) -> tuple[list[float], list[float]]:
        """Return the six numbers that the prompt and the negative prompt are conditioned on."""
        positive = [*(request.original_size or size), *request.crops_coords_top_left, *(request.target_size or size)]
        original, target = request.negative_original_size, request.negative_target_size
        if original is None and target is None:
            if tuple(request.negative_crops_coords_top_left) != (0, 0):
                raise ValueError(
                    "negative_crops_coords_top_left counts only beside negative_original_size and negative_target_size"
                )
            return positive, positive
        if original is None or target is None:
            raise ValueError("give negative_original_size and negative_target_size together")
        return positive, [*original, *request.negative_crops_coords_top_left, *target]


def text_and_sizes(x: Tensor, t: Tensor, run: Run) -> dict[str, Any]:
    """Return what XL shows its UNet besides the text: ``minidiff.pipelines.state.Condition``."""
    names = {"text_embeds": "add_text_embeds", "time_ids": "add_time_ids"}
    return {"added_cond_kwargs": {name: run.tensors[ours] for name, ours in names.items()}}


def _states(encoder: CLIPTextModel, ids: Tensor, clip_skip: int | None) -> tuple[Tensor, Tensor | None]:
    """Return the states before the last layer, or further back, and the pooled embedding of the second encoder."""
    out = encoder(ids, output_hidden_states=True)
    pooled = out.text_embeds if isinstance(encoder, CLIPTextModelWithProjection) else None
    return out.hidden_states[-((clip_skip or 0) + 2)], pooled


class StableDiffusionXLPipeline(TextToImage, StableDiffusionXL):
    """Text to image with Stable Diffusion XL; components and errors are those of ``StableDiffusionXL``."""

    request = XLRequest

    def __call__(
        self,
        prompt: Prompt = None,
        prompt_2: Prompt = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
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
        """Generate pictures.

        Args: the fields of ``XLRequest`` describe the generation; besides them
            output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent".
            return_dict: whether to return a record or the tuple (images,).
            callback_on_step_end: called as f(pipe, index, timestep, tensors) after each step; returns a dict whose
                tensors replace those of the run. It may set ``pipe._interrupt = True`` to stop, and
                ``pipe._guidance_scale``.
            callback_on_step_end_tensor_inputs: which tensors it gets: latents, prompt_embeds, add_text_embeds,
                add_time_ids.

        Raises:
            TypeError, ValueError: naming the argument, what was found and what was expected.
        """
        return self._respond(locals())


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_fit(components: Mapping[str, Any], time_ids: int) -> None:
    """Raise ``ConfigError`` if two components were not made for each other."""
    if hasattr(components["unet"], "spec"):  # otherwise it is absent, or of another make
        _check_unet(components, time_ids)
    for suffix in ("", "_2"):
        tokenizer, encoder = components[f"tokenizer{suffix}"], components[f"text_encoder{suffix}"]
        if tokenizer is not None and encoder is not None and len(tokenizer) > encoder.config.vocab_size:
            raise ConfigError(
                f"tokenizer{suffix} and text_encoder{suffix} do not fit: {len(tokenizer)} tokens against vocab_size "
                f"{encoder.config.vocab_size}"
            )


def _check_unet(components: Mapping[str, Any], time_ids: int) -> None:
    """Raise ``ConfigError`` if the UNet was not made for the text encoders."""
    unet, encoder_2 = components["unet"], components["text_encoder_2"]
    encoders = [one for one in (components["text_encoder"], encoder_2) if one is not None]
    if unet.spec.added is None:
        raise ConfigError("unet has no addition_embed_type 'text_time': it is not one of Stable Diffusion XL")
    widths = [encoder.config.hidden_size for encoder in encoders]
    D = unet.spec.levels[-1].D_ctx
    if encoder_2 is not None and sum(widths) != D:
        raise ConfigError(
            f"text encoders and unet do not fit: hidden_size {' + '.join(map(str, widths))} against "
            f"cross_attention_dim {D} of the UNet (SDXL base: 768 + 1280 = 2048, the refiner: 1280 alone)"
        )
    if encoder_2 is not None:
        P, features = encoder_2.config.projection_dim, unet.spec.added_features
        if P + time_ids * features != unet.spec.added:
            raise ConfigError(
                f"unet takes added conditions of width {unet.spec.added}, but projection_dim {P} of text_encoder_2 and "
                f"{time_ids} sizes of width {features} make {P + time_ids * features}; requires_aesthetics_score of "
                "the image-to-image pipeline should be true for the refiner (5 sizes) and false for base (6)"
            )


__path__, __getattr__ = [], names_at(__name__)  # the reference has a package of this name
