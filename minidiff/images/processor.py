"""Pictures and masks that a caller begins with, as the tensors that the networks read.

    pictures  x = 2 · pixel - 1         with pixels in [0, 1]
    masks     m = 1 if pixel ≥ 1/2 else 0     1 is to be repainted

on a grid that the autoencoder divides evenly. ``to_tensor`` and ``mask_tensor`` are what pipelines call: they refuse
what no autoencoder could read. ``VaeImageProcessor`` is the reference's tool with all its switches, for code that uses
it.

Checked bit for bit against ``diffusers.image_processor.VaeImageProcessor``.
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from minidiff.config import Config
from minidiff.errors import LONGEST_SIDE, check_choice, check_count
from minidiff.images import tensors as images
from minidiff.images.regions import Region, crop_region, overlay, resized

RESAMPLING = {
    "linear": Image.Resampling.BILINEAR,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
_MODES = {1: "L", 3: "RGB"}  # number of channels -> PIL's name of such pictures


def to_tensor(
    image: Any,
    f: int,
    latent_channels: int,
    channels: int = 3,
    height: int | None = None,
    width: int | None = None,
    region: Region | None = None,
    processor: "VaeImageProcessor | None" = None,
) -> Tensor:
    """Turn pictures into pixels (B, channels, H, W) in [-1, 1]; latents (B, latent_channels, h, w) pass through.

    Args:
        image: pictures of PIL; arrays (H, W, channels) or (B, H, W, channels) or tensors (channels, H, W) or
            (B, channels, H, W), floating and in [0, 1], or in [-1, 1] if they have values below 0; latents as a
            tensor; or a list of things of one of these kinds. PIL pictures in a list all take one size.
        f: pixels per latent along each side; sides that it does not divide are made smaller.
        latent_channels, channels: of the autoencoder.
        height, width: the size in pixels to bring the pictures to; default: that of the first. Latents keep theirs.
        region: cut this rectangle out of PIL pictures, and fill ``height`` x ``width`` with it; they become RGB.
        processor: what turns them into a tensor, instead of one that is made for ``f`` and ``latent_channels``.

    Raises:
        TypeError, ValueError: for anything else, naming what was found.
    """
    items = image if isinstance(image, list) else [image]
    wanted = _MODES.get(channels)
    for picture in items if region is None else []:
        if isinstance(picture, Image.Image) and picture.mode != wanted:
            raise ValueError(
                f"image should be a picture of mode {wanted}, found mode {picture.mode}: use image.convert('{wanted}')"
            )
    processor = processor or VaeImageProcessor(vae_scale_factor=f, vae_latent_channels=latent_channels)
    x = processor.preprocess(image, height, width, "default" if region is None else "fill", region)
    if isinstance(items[0], Tensor) and x.shape[1] == latent_channels:
        return _checked(x, "latents")
    if x.shape[1] != channels:
        expected = (
            f"an array (H, W, {channels}) or (B, H, W, {channels})"
            if isinstance(items[0], np.ndarray)
            else f"a tensor (B, {channels}, H, W), or latents (B, {latent_channels}, h, w)"
        )
        raise ValueError(f"image should be {expected}, found {', '.join(str(tuple(one.shape)) for one in items)}")
    return x


def mask_tensor(
    mask: Any,
    f: int,
    height: int,
    width: int,
    region: Region | None = None,
    processor: "VaeImageProcessor | None" = None,
) -> Tensor:
    """Turn masks into a tensor (B, 1, height, width) of 0 (keep) and 1 (repaint).

    Args:
        mask: pictures of PIL in any mode, of which the grey counts; arrays (H, W), (H, W, 1), (B, H, W) or
            (B, H, W, 1) or tensors (H, W), (1, H, W), (B, H, W) or (B, 1, H, W), floating, of integers or bool, where
            1/2 is already white; or a list of things of one of these kinds.
        f: pixels per latent along each side; ``height`` and ``width`` are rounded down to multiples of it.
        region: cut this rectangle out of PIL pictures, and fill ``height`` x ``width`` with it.
        processor: what turns them into a tensor, instead of ``mask_processor(f)``.

    Raises:
        TypeError, ValueError: for anything else, naming what was found.
    """
    processor = processor or mask_processor(f)
    m = processor.preprocess(mask, height, width, "default" if region is None else "fill", region)
    if m.shape[1] != 1:
        raise ValueError(
            f"mask_image should have one channel, (H, W), (B, 1, H, W) as a tensor or (B, H, W, 1) as an array; found "
            f"{m.shape[1]} channels"
        )
    return m


def mask_processor(f: int) -> "VaeImageProcessor":
    """Return the processor of masks for an autoencoder with ``f`` pixels per latent."""
    return VaeImageProcessor(vae_scale_factor=f, do_normalize=False, do_binarize=True, do_convert_grayscale=True)


@dataclass(frozen=True)
class VaeImageProcessor:
    """Turn pictures into what an autoencoder reads, and back.

    Attributes:
        do_resize: whether to bring pictures to a size that the autoencoder divides evenly.
        vae_scale_factor: pixels per latent along each side.
        vae_latent_channels: tensors with as many channels are latents, and pass through.
        resample: how PIL mixes pixels: nearest, bilinear (or linear), bicubic or lanczos. Arrays and tensors are
            resized by taking the nearest pixel, as in the reference.
        reducing_gap: PIL's short cut for much smaller sizes.
        do_normalize: whether to map [0, 1] to [-1, 1].
        do_binarize: whether to round to 0 and 1, halves up.
        do_convert_rgb, do_convert_grayscale: whether to convert PIL pictures (after resizing), at most one of them.

    Raises:
        ValueError: if both conversions are asked for, or ``resample`` is another.
    """

    do_resize: bool = True
    vae_scale_factor: int = 8
    vae_latent_channels: int = 4
    resample: str = "lanczos"
    reducing_gap: float | None = None
    do_normalize: bool = True
    do_binarize: bool = False
    do_convert_rgb: bool = False
    do_convert_grayscale: bool = False

    def __post_init__(self) -> None:
        if self.do_convert_rgb and self.do_convert_grayscale:
            raise ValueError("do_convert_rgb and do_convert_grayscale exclude each other")
        check_choice("resample", self.resample, tuple(RESAMPLING))

    def preprocess(
        self,
        image: Any,
        height: int | None = None,
        width: int | None = None,
        resize_mode: str = "default",
        crops_coords: Region | None = None,
    ) -> Tensor:
        """Turn pictures into a tensor (B, C, H, W), by the switches of this processor.

        Args:
            image: PIL pictures, arrays (B, H, W, C), (H, W, C) or (H, W), tensors (B, C, H, W) or (C, H, W), or a list
                of things of one of these kinds; tensors of latents come back as they are.
            height, width: the size to bring them to, rounded down to multiples of ``vae_scale_factor``; default: that
                of the first picture.
            resize_mode: of PIL pictures, see ``resized``.
            crops_coords: a rectangle (left, top, right, bottom) to cut out of PIL pictures first.

        Raises:
            TypeError, ValueError: for anything else, for NaN and infinity, and for pixels from 0 to 255.
        """
        items = image if isinstance(image, list) else [image]
        if items and all(isinstance(one, Image.Image) for one in items):
            return self._scaled(self._from_pil(items, height, width, resize_mode, crops_coords))
        if items and all(isinstance(one, np.ndarray) for one in items):
            x = self._from_arrays(items, isinstance(image, list))
        elif items and all(isinstance(one, Tensor) for one in items):
            x = self._from_tensors(items, isinstance(image, list))
            if x.shape[1] == self.vae_latent_channels:
                return x
        else:
            kinds = ", ".join(dict.fromkeys(type(one).__name__ for one in items)) or "an empty list"
            raise TypeError(
                f"an image should be a PIL picture, an array, a tensor, or a list of one of them; found {kinds}"
            )
        if resize_mode != "default" or crops_coords is not None:
            raise ValueError("resize_mode and crops_coords are for PIL pictures; arrays and tensors can be sliced")
        if self.do_binarize and x.dtype in (torch.bool, torch.int32, torch.int64):
            x = x.float()  # a mask, which needs no fractions
        return self._scaled(self._resized(_checked(x, "pixels"), height, width))

    def postprocess(
        self, image: Tensor, output_type: str = "pil", do_denormalize: Sequence[bool] | None = None
    ) -> "list[Image.Image] | np.ndarray | Tensor":
        """Turn decoded pixels (B, C, H, W) into pictures: "pil", "np" (B, H, W, C), "pt", or "latent" (as they are).

        ``do_denormalize`` says for each picture whether it is in [-1, 1]; default: all as ``do_normalize`` says. Raises
        ``ValueError`` for NaN and infinity.
        """
        check_choice("output_type", output_type, ("pil", "np", "pt", "latent"))
        if output_type == "latent":
            return image
        signed = [self.do_normalize] * len(image) if do_denormalize is None else do_denormalize
        if len(signed) != len(image):
            raise ValueError(f"do_denormalize should have a flag for each of {len(image)} pictures, found {signed}")
        unit = images.to_unit(image)
        x = torch.stack([new if yes else old for new, old, yes in zip(unit, image, signed, strict=True)])
        if output_type == "pt":
            return x
        array = images.as_array(x)
        return array if output_type == "np" else images.as_pictures(array)

    @property
    def config(self) -> Config:
        """The switches by name."""
        return Config(asdict(self))

    def resize(
        self, image: Any, height: int, width: int, resize_mode: str = "default"
    ) -> "Image.Image | np.ndarray | Tensor":
        """Bring a picture, an array (B, H, W, C) or a tensor (B, C, H, W) to a size; see ``preprocess`` for how."""
        if isinstance(image, Image.Image):
            return resized(image, width, height, resize_mode, RESAMPLING[self.resample], self.reducing_gap)
        if resize_mode != "default":
            raise ValueError(f"resize_mode {resize_mode!r} is for PIL pictures, found {type(image).__name__}")
        if isinstance(image, np.ndarray):
            return self.pt_to_numpy(F.interpolate(self.numpy_to_pt(image), size=(height, width)))
        return F.interpolate(image, size=(height, width))

    def get_default_height_width(
        self, image: Any, height: int | None = None, width: int | None = None
    ) -> tuple[int, int]:
        """Return the size that ``preprocess`` brings a picture, an array or a tensor to."""
        if isinstance(image, Image.Image):
            return self._size(image.height, image.width, height, width)
        axes = (2, 3) if isinstance(image, Tensor) else (1, 2)
        return self._size(*(image.shape[axis] for axis in axes), height, width)

    @staticmethod
    def binarize(image: Tensor) -> Tensor:
        """Round to 0 and 1, halves up."""
        return (image >= 0.5).to(image.dtype)

    @staticmethod
    def normalize(images: "np.ndarray | Tensor") -> "np.ndarray | Tensor":
        """Map [0, 1] to [-1, 1]."""
        return 2.0 * images - 1.0

    @staticmethod
    def denormalize(images: Tensor) -> Tensor:
        """Map [-1, 1] to [0, 1], and cut off what lies outside."""
        return (images * 0.5 + 0.5).clamp(0, 1)

    @staticmethod
    def numpy_to_pt(images: np.ndarray) -> Tensor:
        """Turn pixels (B, H, W, C) or (B, H, W) into a tensor (B, C, H, W)."""
        return torch.from_numpy(images if images.ndim == 4 else images[..., None]).permute(0, 3, 1, 2)

    @staticmethod
    def pil_to_numpy(images: "list[Image.Image] | Image.Image") -> np.ndarray:
        """Turn B pictures, or one, into pixels (B, H, W, C) or (B, H, W) in [0, 1], float32."""
        pictures = images if isinstance(images, list) else [images]
        return np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures]) / np.float32(255)

    @staticmethod
    def convert_to_rgb(image: Image.Image) -> Image.Image:
        """Return the picture in RGB."""
        return image.convert("RGB")

    @staticmethod
    def convert_to_grayscale(image: Image.Image) -> Image.Image:
        """Return the picture in grey."""
        return image.convert("L")

    @staticmethod
    def blur(image: Image.Image, blur_factor: int = 4) -> Image.Image:
        """Return the picture (often a mask, for soft seams) blurred by a Gaussian of that many pixels."""
        return image.filter(ImageFilter.GaussianBlur(blur_factor))

    numpy_to_pil: ClassVar[Any] = staticmethod(images.as_pictures)
    pt_to_numpy: ClassVar[Any] = staticmethod(images.as_array)
    get_crop_region: ClassVar[Any] = staticmethod(crop_region)
    apply_overlay: ClassVar[Any] = staticmethod(overlay)

    # --- each kind of input to (B, C, H, W) --------------------------------------------------------------------------

    def _from_pil(
        self,
        pictures: list[Image.Image],
        height: int | None,
        width: int | None,
        resize_mode: str,
        region: Region | None,
    ) -> Tensor:
        if region is not None:
            pictures = [picture.crop(region) for picture in pictures]
        if self.do_resize:
            H, W = self._size(pictures[0].height, pictures[0].width, height, width)
            pictures = [self.resize(picture, H, W, resize_mode) for picture in pictures]
        if self.do_convert_rgb or self.do_convert_grayscale:
            convert = self.convert_to_rgb if self.do_convert_rgb else self.convert_to_grayscale
            pictures = [convert(picture) for picture in pictures]
        kinds = {(picture.mode, *picture.size) for picture in pictures}
        if len(kinds) > 1:
            raise ValueError(f"pictures of one list should have one mode and size, found {sorted(kinds)}")
        return self.numpy_to_pt(self.pil_to_numpy(pictures))

    def _from_arrays(self, arrays: list[np.ndarray], listed: bool) -> Tensor:
        if self.do_convert_grayscale and not listed and arrays[0].ndim == 3:  # (H, W, 1) or (B, H, W)
            arrays = [arrays[0][None] if arrays[0].shape[-1] == 1 else arrays[0][..., None]]
        rank = _common_rank(arrays, (2, 3, 4), listed)
        return self.numpy_to_pt(np.concatenate(arrays) if rank == 4 else np.stack(arrays))

    def _from_tensors(self, tensors: list[Tensor], listed: bool) -> Tensor:
        if self.do_convert_grayscale and not listed and tensors[0].ndim == 3:  # (1, H, W) or (B, H, W)
            tensors = [tensors[0][:, None]]
        rank = _common_rank(tensors, (2, 3, 4) if self.do_convert_grayscale else (3, 4), listed)
        x = torch.cat(tensors) if rank == 4 else torch.stack(tensors)
        return x[:, None] if rank == 2 else x

    # --- size and values ---------------------------------------------------------------------------------------------

    def _size(self, H: int, W: int, height: int | None, width: int | None) -> tuple[int, int]:
        """Return height and width on the autoencoder's grid; what is not given is that of the picture."""
        f = self.vae_scale_factor
        for name, side in (("height", height), ("width", width)):
            if side is not None:
                check_count(name, side, LONGEST_SIDE)
        if not (H and W):
            raise ValueError(f"an image or a mask has no pixels: its size is {(W, H)}")
        H, W = H if height is None else height, W if width is None else width
        if min(H, W) < f:
            raise ValueError(f"image should be at least {f} pixels wide and high, found {(W, H)}")
        return H - H % f, W - W % f

    def _resized(self, x: Tensor, height: int | None, width: int | None) -> Tensor:
        """Take the nearest pixels: rows and columns are dropped or repeated, spread evenly."""
        return F.interpolate(x, size=self._size(*x.shape[-2:], height, width)) if self.do_resize else x

    def _scaled(self, x: Tensor) -> Tensor:
        if self.do_normalize:
            x = _signed(x)
        return self.binarize(x) if self.do_binarize else x


def _signed(x: Tensor) -> Tensor:
    """Map pixels from [0, 1] to [-1, 1]; with values below 0 they are taken to be there already."""
    low, high = x.min().item(), x.max().item()
    if not x.is_floating_point() or max(-low, high) > 2:  # filters that sharpen overshoot, but not so far
        raise ValueError(
            f"image should be floating and in [0, 1], found {x.dtype} from {low:g} to {high:g}; divide pixels of 0 to "
            "255 by 255"
        )
    if low < 0:
        warnings.warn(
            f"image has values from {low:g} to {high:g} and is taken to be in [-1, 1]; pictures are expected in [0, 1]",
            FutureWarning,  # the reference's category
            stacklevel=2,
        )
        return x
    return VaeImageProcessor.normalize(x)


def _common_rank(items: list[np.ndarray] | list[Tensor], ranks: tuple[int, ...], listed: bool) -> int:
    """Return the number of axes of all items; raise if they cannot be put together."""
    shapes = [tuple(one.shape) for one in items]
    rank = len(shapes[0])
    sizes = {shape[1:] if rank == 4 else shape for shape in shapes}
    if rank not in ranks or any(len(shape) != rank for shape in shapes) or len(sizes) > 1:
        expected = {np.ndarray: "(B, H, W, C), (H, W, C) or (H, W)"}.get(type(items[0]), "(B, C, H, W) or (C, H, W)")
        raise ValueError(f"images should be {expected}, all of one size; found {', '.join(map(str, shapes))}")
    if rank == 4 and listed:
        warnings.warn("a list of batches is put together to one batch; pass that instead", FutureWarning, stacklevel=2)
    return rank


def _checked(x: Tensor, what: str) -> Tensor:
    """Return ``x``; raise if it is of a kind that cannot be computed with, or holds NaN or infinity."""
    if not x.is_floating_point() and x.dtype != torch.uint8:
        raise ValueError(f"{what} of an image or a mask should be floating, found {x.dtype}: convert them first")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{what} of an image or a mask hold NaN or infinity")
    return x
