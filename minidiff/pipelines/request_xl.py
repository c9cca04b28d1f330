"""What a caller asks of a Stable Diffusion XL pipeline, checked before anything is computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from minidiff.pipelines.request import Prompt, Request, check_number
from minidiff.pipelines.request_image import AsksForInpainting

Size = Sequence[int]  # (height, width) in pixels; of crops (top, left)


@dataclass(frozen=True)
class XLRequest(Request):
    """The arguments of one generation with SDXL, with the reference's names and defaults.

    Besides the fields of ``Request``:

    Attributes:
        prompt_2, negative_prompt_2: other texts for the second text encoder; default: those of the first.
        pooled_prompt_embeds, negative_pooled_prompt_embeds: (B, P), needed beside ``prompt_embeds`` and
            ``negative_prompt_embeds``.
        original_size: the size (height, width) that the picture is to look as if it had been scaled from; default: its
            own. Training pictures were small ones too: a small size here gives a blurred picture.
        crops_coords_top_left: where the picture is to look cut off; (0, 0) is a centred subject.
        target_size: the size of the picture in the sense of training; default: its own.
        negative_original_size, negative_crops_coords_top_left, negative_target_size: the same for the negative prompt;
            default: those of the prompt.
        denoising_end: stop when this share of the noise levels of training is done, 0 to 1: the latents go to a
            refiner that takes over there with ``denoising_start``.
    """

    guidance_scale: float = 5.0
    prompt_2: Prompt = None
    negative_prompt_2: Prompt = None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    original_size: Size | None = None
    crops_coords_top_left: Size = (0, 0)
    target_size: Size | None = None
    negative_original_size: Size | None = None
    negative_crops_coords_top_left: Size = (0, 0)
    negative_target_size: Size | None = None
    denoising_end: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("original_size", "target_size", "negative_original_size", "negative_target_size"):
            check_pair(name, getattr(self, name))
        for name in ("crops_coords_top_left", "negative_crops_coords_top_left"):
            check_pair(name, getattr(self, name), may_be_none=False)
        check_share("denoising_end", self.denoising_end)

    def _check_one_each(self) -> None:
        super()._check_one_each()
        for name, embeds in (("prompt_2", "prompt_embeds"), ("negative_prompt_2", "negative_prompt_embeds")):
            if getattr(self, name) is not None and getattr(self, embeds) is not None:
                raise ValueError(f"give either {name} or {embeds}, not both")
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            pooled = name.replace("prompt", "pooled_prompt")
            if (getattr(self, name) is None) != (getattr(self, pooled) is None):
                raise ValueError(f"give {name} and {pooled} together: both come from the same text encoders")

    def _check_texts(self) -> None:
        """Raise on texts that are none or too few; one negative text may stand for many, as in the reference."""
        for name in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2"):
            text = getattr(self, name)
            texts = text if isinstance(text, list) else [text]
            if text is not None and not (texts and all(isinstance(one, str) for one in texts)):
                raise ValueError(f"{name} should be a str or a list of at least one str, found {text!r}")
            if isinstance(text, list) and len(text) != self.batch:
                raise ValueError(f"{name} has {len(text)} texts for {self.batch} prompts")
        if isinstance(self.prompt_2, str) and self.prompt_2 and self.batch != 1:
            raise ValueError(f"prompt_2 has 1 text for {self.batch} prompts")

    def _check_embeddings(self) -> None:
        super()._check_embeddings()
        for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
            pooled = getattr(self, name)
            if pooled is not None and (pooled.ndim != 2 or len(pooled) != self.batch):
                raise ValueError(f"{name} should be ({self.batch}, P), found {tuple(pooled.shape)}")


@dataclass(frozen=True)
class XLImageRequest(XLRequest):
    """The arguments of one image-to-image generation with SDXL.

    Besides the fields of ``XLRequest``, of which those in ``absent`` have no meaning here:

    Attributes:
        image: what to begin with, as of ``ImageRequest``.
        strength: 0 to 1, how much of it is redrawn; see ``minidiff.pipelines.strength`` for the number of steps.
        denoising_start: take over where a run with this ``denoising_end`` stopped; no noise is added, and ``strength``
            plays no part.
        latents: the noisy latents to begin with, in place of ``image``.
        aesthetic_score, negative_aesthetic_score: how pleasing the picture is to be, 1 to 10, for UNets that are
            conditioned on it in place of the target size (the refiner).
    """

    absent: ClassVar[tuple[str, ...]] = ("height", "width")

    image: Any = None
    strength: float = 0.3
    denoising_start: float | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.absent:
            if getattr(self, name) is not None:
                raise TypeError(f"this task takes no {name}: the picture gets the size of the image")
        if self.image is None and self.latents is None:
            raise ValueError("image-to-image needs an image (or latents)")
        check_number("strength", self.strength, 0, 1)
        check_number("aesthetic_score", self.aesthetic_score, 0)
        check_number("negative_aesthetic_score", self.negative_aesthetic_score, 0)
        check_share("denoising_start", self.denoising_start)
        start, end = self.denoising_start, self.denoising_end
        if start is not None and (start == 1 or (end is not None and start >= end)):
            raise ValueError(f"denoising_start should be below denoising_end, found {start} and {end}")


@dataclass(frozen=True)
class XLInpaintRequest(AsksForInpainting, XLImageRequest):
    """The arguments of one inpainting with SDXL, with the reference's names and defaults.

    Those of ``XLImageRequest`` and of ``AsksForInpainting``, with

    Attributes:
        height, width: the size to work at, in pixels, which image and mask are brought to; default: what the UNet was
            trained on.
        latents: standard normal noise (B * N, C, height / f, width / f) instead of drawing it; the run begins with it
            alone, whatever the strength.
        strength: as of ``XLImageRequest``; only exactly 1 begins with pure noise, 0.9999 is all steps from the image
            under the most noise.
    """

    absent: ClassVar[tuple[str, ...]] = ()

    guidance_scale: float = 7.5
    strength: float = 0.9999

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image is None:
            raise ValueError("inpainting needs an image")
        if self.denoising_start is not None and self.latents is not None:
            raise ValueError("give denoising_start, which begins with the image as it is, or latents, not both")


def check_pair(name: str, value: Any, may_be_none: bool = True) -> None:
    """Raise if ``value`` is not a pair of numbers, or None where that is allowed."""
    if value is None and may_be_none:
        return
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(f"{name} should be a pair of integers such as (1024, 1024), found {value!r}")
    for one in value:
        check_number(name, one, 0)


def check_share(name: str, value: Any) -> None:
    """Raise if ``value`` is neither None nor a number in (0, 1]."""
    if value is None:
        return
    check_number(name, value, 0, 1)
    if value == 0:
        raise ValueError(f"{name} should be above 0, found {value}; leave it out for a whole run")
