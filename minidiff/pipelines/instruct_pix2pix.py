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

from minidiff.pipelines.callbacks import Fact
from minidiff.pipelines.common import Run, rescaled
from minidiff.pipelines.latent import LatentPipeline, dealt
from minidiff.pipelines.request import Generators, check_number


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
class Editing:
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

    @property
    def guided(self) -> bool:
        """Whether each step asks the UNet three times."""
        return self.guidance_scale > 1 and self.image_guidance_scale >= 1


@dataclass(kw_only=True)
class EditRun(Run):
    """The state of one edit; under guidance conditions stand in the order text, image, nothing."""

    per_copy: ClassVar[tuple[str, ...]] = ("image_latents",)

    image_latents: Tensor  # (B, C, H, W) or (3 B, C, H, W), not scaled
    image_guidance_scale: float

    @property
    def guided(self) -> bool:
        """Whether this step asks the UNet three times."""
        return self.guidance_scale > 1 and self.image_guidance_scale >= 1

    @property
    def passes(self) -> int:
        """How many copies of the latents this step shows the UNet."""
        return 3 if self.guided else 1

    def combine(self, out: Tensor) -> Tensor:
        """Return the guided prediction (B, C, H, W) from those for all copies (passes * B, C, H, W)."""
        if not self.guided:
            return out
        text, image, nothing = out.chunk(3)
        guided = guide_twice(text, image, nothing, self.guidance_scale, self.image_guidance_scale)
        return rescaled(guided, text, self.guidance_rescale)


def three_fold(both: Tensor) -> Tensor:
    """Put conditions (negative, positive) of two passes in the order of three: positive, negative, negative."""
    negative, positive = both.chunk(2)
    return torch.cat([positive, negative, negative])


class EditingPipeline(LatentPipeline):
    """Adds to a pipeline what editing needs."""

    unet_inputs: ClassVar[tuple[str, ...]] = ("image",)

    image_guidance_scale, _image_guidance_scale = Fact(), Fact()

    def _encode_prompt(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the embeddings of the three passes as one tensor, or of the one without guidance."""
        positive, negative = self.encode_prompt(*args, **kwargs)
        return positive if negative is None else torch.cat([positive, negative, negative])

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
            x = vae.encode(x.to(device, vae.dtype)).latent_dist.mode()
        x = dealt(x.to(device, dtype), batch_size * num_images_per_prompt)
        return torch.cat([x, x, torch.zeros_like(x)]) if do_classifier_free_guidance else x

    def _network(self, x: Tensor, t: Tensor, run: EditRun) -> Tensor:
        return super()._network(torch.cat([x, run.image_latents], dim=1), t, run)

    def _image_latents(
        self, request: Editing, like: Tensor, height: int | None = None, width: int | None = None
    ) -> Tensor:
        """Return what the UNet reads of the images of a request, brought to ``height`` x ``width`` pixels."""
        x = self._read_image(request.image, height, width)
        return self.prepare_image_latents(x, request.count, 1, like.dtype, like.device, request.guided)
