"""What a caller asks of the pipelines that begin with an image, checked before anything is computed."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from minidiff.pipelines.request import Request, check_number


@dataclass(frozen=True)
class ImageRequest(Request):
    """The arguments of one image-to-image generation, with the reference's names and defaults.

    Besides the fields of ``Request``, of which those in ``absent`` have no meaning here:

    Attributes:
        image: what to begin with: PIL pictures (RGB), arrays (B, H, W, 3) or tensors (B, 3, H, W) in [0, 1] or [-1, 1],
            latents (B, 4, h, w), or a list of things of one of these kinds. Several are dealt out to the pictures in
            turn: 0, 1, 0, 1 for two images and four pictures.
        strength: 0 to 1, how much of it is redrawn; see ``minidiff.pipelines.strength`` for the number of steps.
    """

    absent: ClassVar[tuple[str, ...]] = ("height", "width", "latents", "guidance_rescale")

    image: Any = None
    strength: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.absent:
            value = getattr(self, name)
            if isinstance(value, Tensor) or value != type(self).__dataclass_fields__[name].default:
                why = ": the picture gets the size of the image" if name in ("height", "width") else ""
                raise TypeError(f"this task takes no {name}{why}")
        if self.image is None:
            raise ValueError("give an image to begin with")
        check_number("strength", self.strength, 0, 1)


@dataclass(frozen=True)
class AsksForInpainting:
    """What inpainting asks for besides the fields of a request with an ``image``, which it is mixed into.

    Attributes:
        mask_image: white (1) is repainted, black (0) is kept: PIL pictures in any mode, arrays (H, W), (B, H, W) or
            (B, H, W, 1), tensors (H, W), (B, H, W) or (B, 1, H, W), or a list of things of one of these kinds. Grey
            becomes black or white at 1/2.
        masked_image_latents: the encoded image without what is repainted, (B, 4, h, w), instead of encoding it.
        padding_mask_crop: repaint an enlarged view of the part around the mask, with so many pixels of its
            surroundings, and paste it back; for PIL pictures of any mode.
    """

    mask_image: Any = None
    masked_image_latents: Tensor | None = None
    padding_mask_crop: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_image is None:
            raise ValueError("inpainting needs a mask_image: white is repainted, black is kept")
        if self.padding_mask_crop is not None:
            self._check_crop()

    def _check_crop(self) -> None:
        from PIL import Image

        pad = self.padding_mask_crop
        if isinstance(pad, bool) or not isinstance(pad, int) or pad < 0:
            raise ValueError(f"padding_mask_crop should be a number of pixels, 0 or more, found {pad!r}")
        for name in ("image", "mask_image"):
            picture = getattr(self, name)
            if not isinstance(picture, Image.Image):
                found = type(picture).__name__
                raise ValueError(f"with padding_mask_crop {name} should be a PIL picture, found {found}")
        if self.image.size != self.mask_image.size:
            raise ValueError(
                f"with padding_mask_crop image and mask_image should have one size, found {self.image.size} and "
                f"{self.mask_image.size}"
            )


@dataclass(frozen=True)
class InpaintRequest(AsksForInpainting, ImageRequest):
    """The arguments of one inpainting, with the reference's names and defaults.

    Those of ``ImageRequest`` and of ``AsksForInpainting``, with

    Attributes:
        height, width: the size to work at, in pixels, which image and mask are brought to; default: what the UNet was
            trained on.
        latents: standard normal noise (B * N, C, height / f, width / f) instead of drawing it; the run begins with it
            alone, whatever the strength.
        strength: as of ``ImageRequest``; 1 begins with pure noise.
    """

    absent: ClassVar[tuple[str, ...]] = ("guidance_rescale",)

    strength: float = 1.0
