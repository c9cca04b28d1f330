"""Editing by instruction: a picture and a sentence that says what to change, each with a guidance scale of its own.

    out = out_0 + s_I (out_I - out_0) + s_T (out_T - out_I)

    out_T   sees the picture and the sentence
    out_I   sees the picture and the negative (or empty) sentence
    out_0   sees neither: zeros in place of the picture

The UNet reads the noisy latents and, as further channels, the encoded picture. ``image_guidance_scale`` s_I is how
closely the result keeps to the picture, ``guidance_scale`` s_T how closely to the sentence.

Paper: Brooks et al. 2023 (InstructPix2Pix, https://arxiv.org/abs/2211.09800), equation 3, with ``image_guidance_scale``
and ``guidance_scale`` for its s_I and s_T.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from minidiff.noise import Generators
from minidiff.pipelines.by_hand import retrieve_latents
from minidiff.pipelines.callbacks import Fact
from minidiff.pipelines.request import check_number
from minidiff.pipelines.run import TextToImage, repeat_to_batch, rescaled
from minidiff.pipelines.state import Run


def guide_twice(text: Tensor, image: Tensor, nothing: Tensor, text_scale: float, image_scale: float) -> Tensor:
    """Return nothing + image_scale (image - nothing) + text_scale (text - image).

    Args:
        text: prediction with image and prompt, (B, C, H, W).
        image: prediction with the image and the negative (or empty) prompt.
        nothing: prediction with the negative prompt and zeros for the image.
        text_scale, image_scale: 7.5 and 1.5 are usual.
    """
    return nothing + text_scale * (text - image) + image_scale * (image - nothing)


@dataclass(frozen=True)
class AsksForEdit:
    """What an edit asks for besides the fields of a request, which it is mixed into.

    Attributes:
        image: the picture to edit, as for image-to-image, or its latents as the autoencoder's mean gives them, not
            scaled. Several are dealt out to the pictures in turn.
        image_guidance_scale: how closely the result keeps to the image; below 1, or with a ``guidance_scale`` of up to
            1, nothing is guided.
    """

    image: Any = None
    image_guidance_scale: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image is None:
            raise ValueError("an edit needs an image")
        check_number("image_guidance_scale", self.image_guidance_scale, 0)


class DualGuidance:
    """Guidance by two scales: the UNet is asked three times, in the order text, image, nothing."""

    copies: ClassVar[int] = 3

    def wanted(self, run: Run) -> bool:
        """Whether the scales of the run ask for guidance."""
        return run.guidance_scale > 1 and run.image_guidance_scale >= 1

    def rows(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Return what the UNet is shown in one batch: two predictions see the negative text."""
        return torch.cat([positive, negative, negative])

    def combine(self, out: Tensor, run: Run) -> Tensor:
        """Return the guided prediction (B, C, H, W) from the three (3 B, C, H, W)."""
        text, image, nothing = out.chunk(3)
        guided = guide_twice(text, image, nothing, run.guidance_scale, run.image_guidance_scale)
        return rescaled(guided, text, run.guidance_rescale)


class Editing(TextToImage):
    """The task: all steps from noise, with the encoded picture beside the latents."""

    guidance = DualGuidance()
    unet_inputs: ClassVar[tuple[str, ...]] = ("image",)

    image_guidance_scale, _image_guidance_scale = Fact(), Fact()

    def prepare_image_latents(
        self,
        image: Tensor,
        batch_size: int,
        num_images_per_prompt: int,
        dtype: torch.dtype,
        device: torch.device,
        do_classifier_free_guidance: bool,
        generator: Generators = None,
    ) -> Tensor:
        """Return what the UNet reads of pixels or latents: (B, C, h, w), or (3 B, C, h, w) under guidance.

        Of pixels it is the mean of the autoencoder's Gaussian, not scaled; nothing is drawn. The last third is zeros.
        """
        x = image
        if x.shape[1] != self._latent_channels:
            if self.vae is None:
                raise ValueError("this pipeline has no vae: pass latents as image")
            vae = self._encoder()
            x = retrieve_latents(vae.encode(x.to(device, vae.dtype)), sample_mode="argmax")
        x = repeat_to_batch(x.to(device, dtype), batch_size * num_images_per_prompt)
        return torch.cat([x, x, torch.zeros_like(x)]) if do_classifier_free_guidance else x

    def _image_latents(self, request: AsksForEdit, run: Run, size: tuple[int, int] | None) -> Tensor:
        """Return what the UNet reads of the images of a request, brought to a size in latents."""
        f, like = self.vae_scale_factor, run.tensors["prompt_embeds"]
        x = self._read_image(request.image, *((side * f for side in size) if size else ()))
        return self.prepare_image_latents(x, request.count, 1, like.dtype, like.device, run.guided)

    def _first_latents(self, request: AsksForEdit, run: Run, size: tuple[int, int] | None) -> Tensor:
        shown = self._image_latents(request, run, size)
        run.tensors["image_latents"], run.beside = shown, ("image_latents",)
        return self._noise(request, run, (request.count, self._latent_channels, *shown.shape[2:]))
