"""What a caller asks of a text-to-image pipeline, checked before anything is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from minidiff.adapters.lora import scale_argument
from minidiff.errors import MOST, check_choice, check_count, check_number
from minidiff.noise import Generators

Prompt = str | list[str] | None
LONG_PROMPT = ("cut", "chunk")


@dataclass(frozen=True)
class Request:
    """The arguments of one generation, with the reference's names, order and defaults.

    Attributes:
        prompt: a text or a list of B texts; or pass ``prompt_embeds`` instead.
        height, width: in pixels, divisible by the pipeline's ``vae_scale_factor``; default: what the UNet was trained
            on.
        num_inference_steps: UNet evaluations (for most schedulers).
        timesteps, sigmas: custom ones instead, for the schedulers that take them.
        guidance_scale: how strongly the prompt counts against the negative prompt; up to 1 means no guidance.
        negative_prompt: what to stay away from, of the type of ``prompt``; default: the empty text.
        num_images_per_prompt: N; the result has B * N pictures, those of one prompt side by side.
        eta: stochasticity of DDIM, 0 to 1; other schedulers ignore it, as in the reference.
        generator: one, drawing for the whole batch, or a list with one per picture; default: torch's global one.
        latents: standard normal (B * N, C, height / f, width / f) instead of drawing them.
        prompt_embeds, negative_prompt_embeds: text embeddings (B, L, D) instead of texts.
        guidance_rescale: 0 to 1, see ``guide``; 0.7 suits models with zero terminal SNR.
        clip_skip: 1 conditions on the state before the last CLIP layer ("clip skip 2" in A1111), and so on.
        seed, seeds: one CPU generator per picture: ``seeds`` lists them, ``seed=s`` means s, s + 1...
        long_prompt: what to do with a text of more than 77 tokens: "cut" it and return what was dropped, or "chunk":
            encode it in windows, see ``minidiff.text.windows``.
        cross_attention_kwargs: ``{"scale": s}`` multiplies all LoRA adapters that are not fused with s in this call.

    Raises:
        TypeError, ValueError: naming the argument, what was found and what was expected.
    """

    prompt: Prompt = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 50
    timesteps: Sequence[int] | None = None
    sigmas: Sequence[float] | None = None
    guidance_scale: float = 7.5
    negative_prompt: Prompt = None
    num_images_per_prompt: int = 1
    eta: float = 0.0
    generator: Generators = None
    latents: Tensor | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    guidance_rescale: float = 0.0
    clip_skip: int | None = None
    seed: int | None = None
    seeds: Sequence[int] | None = None
    long_prompt: str = "cut"
    cross_attention_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        as_python(self)
        check_count("num_images_per_prompt", self.num_images_per_prompt, MOST)
        check_number("guidance_scale", self.guidance_scale, 0)
        check_number("guidance_rescale", self.guidance_rescale, 0, 1)
        check_number("eta", self.eta, 0, 1)
        check_choice("long_prompt", self.long_prompt, LONG_PROMPT)
        scale_argument(self.cross_attention_kwargs)
        if self.timesteps is not None and self.sigmas is not None:
            raise ValueError("give timesteps= or sigmas=, not both")
        self._check_one_each()
        self._check_texts()
        self._check_embeddings()
        check_count("the number of prompts times num_images_per_prompt", self.count, MOST)

    @property
    def batch(self) -> int:
        """The number of prompts, B."""
        if self.prompt is None:
            return len(self.prompt_embeds)
        return 1 if isinstance(self.prompt, str) else len(self.prompt)

    @property
    def count(self) -> int:
        """The number of pictures, B * N."""
        return self.batch * self.num_images_per_prompt

    @property
    def lora_scale(self) -> float:
        """What LoRA adapters are multiplied with."""
        return scale_argument(self.cross_attention_kwargs)

    def _check_one_each(self) -> None:
        if (self.prompt is None) == (self.prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds" + (", not both" if self.prompt is not None else ""))
        if self.negative_prompt is not None and self.negative_prompt_embeds is not None:
            raise ValueError("give either negative_prompt or negative_prompt_embeds, not both")

    def _check_texts(self) -> None:
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            texts = text if isinstance(text, list) else [text]
            if text is not None and not (texts and all(isinstance(one, str) for one in texts)):
                raise ValueError(f"{name} should be a str or a list of at least one str, found {text!r}")
        prompt, negative = self.prompt, self.negative_prompt
        if prompt is not None and negative is not None and type(prompt) is not type(negative):
            raise TypeError(
                f"negative_prompt should be of the type of prompt ({type(prompt).__name__}), found "
                f"{type(negative).__name__}"
            )
        if isinstance(negative, list) and len(negative) != self.batch:
            raise ValueError(f"negative_prompt has {len(negative)} texts for {self.batch} prompts")

    def _check_embeddings(self) -> None:
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            embeds = getattr(self, name)
            if embeds is not None and not isinstance(embeds, Tensor):
                raise TypeError(f"{name} should be a tensor, found {type(embeds).__name__}")
            if embeds is not None and (embeds.ndim != 3 or len(embeds) != self.batch):
                raise ValueError(f"{name} should be ({self.batch}, L, D), found {tuple(embeds.shape)}")


def as_python(request: Any) -> None:
    """Replace the numbers of NumPy and torch in a frozen record by Python's: the rest may then rely on them."""
    for name, value in vars(request).items():
        if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0):
            object.__setattr__(request, name, value.item())
