"""``CLIPImageProcessor``: pictures -> what a CLIP vision encoder reads, (B, 3, 224, 224).

    convert to RGB  ->  resize  ->  cut out the middle  ->  x = pixel / 255  ->  (x - mean) / std

Bit for bit ``transformers.CLIPImageProcessorPil``, which is what ``transformers.CLIPImageProcessor`` means where
torchvision is not installed, and which resizes with PIL as CLIP was trained. The processor on torchvision (0.28) rounds
elsewhere when it resizes: of noise 0.5% of the pixels differ, by 1 or 2 of 255; of smooth pictures and hard edges none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minidiff.checkpoints.hub import Repo
from minidiff.checkpoints.save import save_json
from minidiff.config import read_json
from minidiff.errors import CheckpointError, ConfigError, check_count, check_number
from minidiff.networks.specs.fields import complete
from minidiff.outputs import Output

FILE = "preprocessor_config.json"
_TYPES = ("CLIPImageProcessor", "CLIPFeatureExtractor", "CLIPImageProcessorFast", "CLIPImageProcessorPil")
# What versions of transformers write besides, with the values that ask for nothing.
_ONLY: dict[str, tuple[Any, ...]] = {
    "image_processor_type": _TYPES,
    "feature_extractor_type": (None, *_TYPES),
    "processor_class": (None, "CLIPProcessor"),
    "default_to_square": (False, None),
    "do_pad": (None, False),
    "data_format": (None, "channels_first"),
    **dict.fromkeys(("device", "disable_grouping", "input_data_format", "pad_size", "return_tensors"), (None,)),
}
_SIZES = {"size": ({"height", "width"}, {"shortest_edge"}), "crop_size": ({"height", "width"},)}


@dataclass
class Features(Output):
    """What the processor returns: ``pixel_values``, (B, C, H, W) or a list of B arrays (C, H, W)."""

    pixel_values: Any

    def to(self, *args: Any, **kwargs: Any) -> "Features":
        """Move the tensor, or convert it: the arguments are those of ``Tensor.to``."""
        return Features(self.pixel_values.to(*args, **kwargs))


@dataclass(kw_only=True, eq=False)
class CLIPImageProcessor:
    """Prepare pictures for a CLIP vision encoder.

    Attributes:
        do_convert_rgb: whether to convert to RGB; what is transparent becomes white.
        do_resize, size: whether to resize, and to what: ``{"shortest_edge": n}``, or n, keeps the proportions (the
            longer side is rounded down); ``{"height": h, "width": w}`` or (h, w) does not.
        resample: how PIL mixes pixels: 0 nearest, 1 lanczos, 2 bilinear, 3 bicubic, 4 box, 5 hamming.
        do_center_crop, crop_size: whether to cut out the middle, and how much: ``{"height": h, "width": w}``, n or
            (h, w). Smaller pictures are padded with 0, which is black before normalisation.
        do_rescale, rescale_factor: whether to multiply with a number, 1/255.
        do_normalize, image_mean, image_std: whether to subtract the mean and divide by the standard deviation, of each
            channel or of all.

    Raises:
        ConfigError: naming a field whose value is not one of these.
    """

    do_convert_rgb: bool = True
    do_resize: bool = True
    size: Any = None
    resample: int = 3
    do_center_crop: bool = True
    crop_size: Any = None
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: Any = (0.48145466, 0.4578275, 0.40821073)
    image_std: Any = (0.26862954, 0.26130258, 0.27577711)

    _defaults: ClassVar[dict[str, Any]] = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is None:
                setattr(self, field.name, self._defaults.get(field.name, field.default))
        self.size = _size("size", self.size, square=False)
        self.crop_size = _size("crop_size", self.crop_size, square=True)
        check_number("rescale_factor", self.rescale_factor)
        for name in [field.name for field in fields(self) if field.name.startswith("do_")]:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"CLIPImageProcessor: {name} should be true or false, found {getattr(self, name)!r}")
        if isinstance(self.resample, bool) or self.resample not in range(6):
            raise ConfigError(f"CLIPImageProcessor: resample should be 0 to 5, found {self.resample!r}")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        force_download: bool = False,
        **overrides: Any,
    ) -> "CLIPImageProcessor":
        """Read ``preprocessor_config.json`` of a folder or a Hub repository; ``overrides`` are fields to use instead.

        Raises ``CheckpointNotFoundError`` if there is none, ``ConfigError`` naming a field that is not implemented.
        """
        where = (subfolder, revision, cache_dir, bool(local_files_only), token, force_download)
        return cls.from_dict(read_json(Repo(pretrained_model_name_or_path, *where).file(FILE)), **overrides)

    @classmethod
    def from_dict(cls, image_processor_dict: Mapping[str, Any], **overrides: Any) -> "CLIPImageProcessor":
        """Make a processor of the fields of a file. Raises ``ConfigError`` naming those that are not implemented."""
        defaults = {field.name: None for field in fields(cls)}
        given = complete(cls.__name__, {**image_processor_dict, **overrides}, defaults, _ONLY)
        return cls(**{name: given[name] for name in defaults})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of the file, as transformers writes them."""
        return {**asdict(self), "image_processor_type": _TYPES[0]}

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``preprocessor_config.json``, which transformers reads too."""
        folder = Path(save_directory)
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file; save_pretrained needs a folder")
        folder.mkdir(parents=True, exist_ok=True)
        save_json(self.to_dict(), folder / FILE)

    def __call__(self, images: Any, *, return_tensors: str | None = None, **options: Any) -> Features:
        """Prepare pictures.

        Args:
            images: a PIL picture; an array or tensor (C, H, W), (H, W, C) or a batch of them, with 1, 3 or 4 channels,
                of 0 to 255 or, if floating, of [0, 1] where they are resized; or a list of these. Where both the first
                and the last axis may be the channels, the first is.
            return_tensors: "pt", "np", or None for a list of arrays.
            options: fields of the processor to use instead.

        Raises:
            TypeError, ValueError: for anything else, naming what was found.
        """
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors should be 'pt', 'np' or None, found {return_tensors!r}")
        how = replace(self, **options) if options else self
        arrays = [how._prepared(image) for image in _flat(images)]
        if return_tensors is None:
            return Features(arrays)
        if len(shapes := {array.shape for array in arrays}) > 1:
            raise ValueError(f"pictures of one batch should have one size, found {sorted(shapes)}: crop or resize them")
        batch = np.stack(arrays)
        return Features(torch.from_numpy(batch) if return_tensors == "pt" else batch)

    preprocess = __call__

    def _prepared(self, image: "Image.Image | np.ndarray") -> np.ndarray:
        """Return one picture as (C, H, W)."""
        if isinstance(image, Image.Image):
            image = np.asarray(_on_white(image) if self.do_convert_rgb else image)
            x = image[None] if image.ndim == 2 else np.moveaxis(image, -1, 0)
        else:
            x = np.moveaxis(image, _channel_axis(image), 0)
            x = _three_channels(x) if self.do_convert_rgb else x
        x = self._resized(x) if self.do_resize else x
        x = _middle(x, self.crop_size["height"], self.crop_size["width"]) if self.do_center_crop else x
        x = _times(x, self.rescale_factor) if self.do_rescale else x
        return self._normalized(x) if self.do_normalize else x

    def _resized(self, x: np.ndarray) -> np.ndarray:
        """Resize (C, H, W) with PIL, which knows 8 bits: fractions are rounded down to 255ths before."""
        fractions = _are_fractions(x)
        pixels = (_times(x, 255) if fractions else x).astype(np.uint8)
        picture = Image.fromarray(pixels[0] if len(x) == 1 else np.ascontiguousarray(np.moveaxis(pixels, 0, -1)))
        H, W = x.shape[1:]
        if "shortest_edge" in self.size:
            short = self.size["shortest_edge"]
            size = (int(short * H / W), short) if W <= H else (short, int(short * W / H))
        else:
            size = self.size["height"], self.size["width"]
        resized = np.asarray(picture.resize(size[::-1], self.resample))
        resized = resized[None] if resized.ndim == 2 else np.moveaxis(resized, -1, 0)
        return _times(resized, 1 / 255) if fractions else resized

    def _normalized(self, x: np.ndarray) -> np.ndarray:
        x = x if np.issubdtype(x.dtype, np.floating) else x.astype(np.float32)
        mean, std = (self._per_channel(name, len(x)).astype(x.dtype) for name in ("image_mean", "image_std"))
        return (x - mean) / std

    def _per_channel(self, name: str, channels: int) -> np.ndarray:
        values = np.asarray(getattr(self, name))
        if values.ndim and len(values) != channels:
            raise ValueError(f"{name} has {len(values)} values, and the picture {channels} channels")
        return values.reshape(-1, 1, 1)


# --- one picture -----------------------------------------------------------------------------------------------------


def _flat(images: Any) -> list[Any]:
    """Return pictures of PIL and arrays with three axes, from one of them, batches, and lists of all these."""
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, (list, tuple)) and images:
        return [picture for image in images for picture in _flat(image)]
    x = images.numpy(force=True) if isinstance(images, Tensor) else images
    if isinstance(x, np.ndarray) and x.ndim in (3, 4):
        return [x] if x.ndim == 3 else list(x)
    found = f"{type(x).__name__} of shape {x.shape}" if isinstance(x, np.ndarray) else repr(images)[:80]
    raise ValueError(f"images should be PIL pictures, arrays or tensors (C, H, W) or batches of them; found {found}")


def _channel_axis(x: np.ndarray) -> int:
    axis = next((axis for axis in (0, -1) if x.shape[axis] in (1, 3, 4)), None)
    if axis is None:
        raise ValueError(f"a picture should have 1, 3 or 4 channels in front or behind, found shape {x.shape}")
    return axis


def _on_white(picture: Image.Image) -> Image.Image:
    """Convert to RGB; what is transparent shows white."""
    if "A" not in picture.getbands() and picture.info.get("transparency") is None:
        return picture.convert("RGB")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")


def _three_channels(x: np.ndarray) -> np.ndarray:
    """Make RGB (3, H, W) of grey or RGBA."""
    if len(x) == 1:
        return np.repeat(x, 3, axis=0)
    if len(x) == 3:
        return x
    whole = np.issubdtype(x.dtype, np.integer)
    if not whole and not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(f"floating RGBA should be in [0, 1], found {x.min()} to {x.max()}")
    white = 255 if whole else 1.0
    alpha = x[3:] / white
    mixed = alpha * x[:3] + (1 - alpha) * white
    return (np.round(mixed) if whole else mixed).astype(x.dtype)


def _are_fractions(x: np.ndarray) -> bool:
    """Say whether pixels are in [0, 1] and not whole numbers up to 255; raise ``ValueError`` if neither."""
    if x.dtype == np.uint8:
        return False
    low, high = x.min(), x.max()
    whole = low >= 0 and high <= 255 and np.allclose(x, x.astype(int))
    if not whole and not (low >= 0 and high <= 1):
        raise ValueError(f"pixels should be whole numbers of 0 to 255 or fractions of [0, 1], found {low} to {high}")
    return not whole


def _middle(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cut the middle out of (C, H, W); where the picture is smaller, 0 is beside it."""
    for axis, wanted in ((1, height), (2, width)):
        missing = max(wanted - x.shape[axis], 0)
        x = np.pad(x, [((missing + 1) // 2, missing // 2) if k == axis else (0, 0) for k in range(3)])
        start = (x.shape[axis] - wanted) // 2
        x = x[(slice(None),) * axis + (slice(start, start + wanted),)]
    return x


def _times(x: np.ndarray, factor: float) -> np.ndarray:
    """Multiply in float64 and round to float32, as the reference."""
    return (x.astype(np.float64) * factor).astype(np.float32)


def _size(name: str, value: Any, *, square: bool) -> dict[str, int]:
    """Return a size as a dict: a number is both sides (``square``) or the shorter one, two are height and width."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    elif isinstance(value, Sequence) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    if not isinstance(value, Mapping) or set(value) not in _SIZES[name]:
        expected = " or ".join(str(sorted(keys)) for keys in _SIZES[name])
        raise ConfigError(f"CLIPImageProcessor: {name} should be a number, two, or have {expected}; found {value!r}")
    for side in value:
        check_count(f"{name}[{side!r}]", value[side])
    return dict(value)
