"""Inpainting: redraw what a mask marks and keep the rest. What Stable Diffusion 1.x, 2.x and XL share.

A UNet that reads latents alone (4 channels) redraws everything; after each step the rest is put back as it would look
at the noise level reached, and after the last step as it is:

    x <- (1 - m) · (α x0 + σ noise) + m · x      m: the mask, x0: the encoded image, noise: always the same

Paper: Lugmayr et al. 2022 (RePaint, https://arxiv.org/abs/2201.09865), equation 8, without its resampling.

A UNet that was trained to inpaint (9 channels) sees at each step what there is around the hole:

    out = unet([x, m, encode(image · (1 - m))])

and nothing is put back: the rest comes out much like the image, not equal to it. The mask is made smaller by taking the
nearest pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.noise import initial_latents
from minidiff.pipelines.by_hand import InpaintByHand
from minidiff.pipelines.foreign import ByFace
from minidiff.pipelines.image_to_image import FromImage
from minidiff.pipelines.run import repeat_to_batch
from minidiff.pipelines.state import Run, computed
from minidiff.schedulers.base import Plan, Scheduler

if TYPE_CHECKING:
    from PIL import Image

    from minidiff.images.processor import VaeImageProcessor
    from minidiff.images.regions import Region
    from minidiff.images.tensors import Images
    from minidiff.pipelines.request_image import InpaintRequest


@dataclass(frozen=True)
class KnownRegion:
    """What is put back after each step, where the UNet does not read the mask."""

    x0: Tensor  # (B, C, h, w), the encoded image
    noise: Tensor  # (B, C, h, w)
    levels: list[tuple[float, float]] | None  # α and σ after each step but the last; None = ask the scheduler

    def __call__(self, run: Run, i: int, x: Tensor) -> Tensor:
        """Put it back at the noise level after step ``i``; after the last step without noise."""
        known = self.x0 if i == run.indices[-1] else self._noised(run, i + 1)
        m = run.tensors["mask"].chunk(run.passes)[0]
        return (1 - m) * known + m * x

    def _noised(self, run: Run, i: int) -> Tensor:
        """Return it at the noise level that step ``i`` begins with."""
        if self.levels is None:
            return run.core.noised(run.plan._replace(start=i), self.x0, self.noise)
        alpha, sigma = self.levels[i - 1 - run.plan.start]
        return alpha * self.x0 + sigma * self.noise


class View(NamedTuple):
    """The part of a picture that a run works on, and what it is pasted into."""

    mask: "Image.Image"
    picture: "Image.Image"
    region: "Region"


class Given(NamedTuple):
    """What the caller gave, prepared."""

    image: Tensor  # (B, 3, H, W) in [-1, 1], or latents (B, C, h, w)
    mask: Tensor  # (B, 1, H, W), 0 or 1
    masked: Tensor | None  # as the image, without what is repainted; None = nobody can tell, and no UNet asks
    view: View | None


class Inpainting(InpaintByHand, FromImage):
    """The task: the last steps, or all, and a mask that says where."""

    least_steps = 1

    unet_inputs: ClassVar[tuple[str, ...]] = ("latents", "mask")

    @computed
    def mask_processor(self) -> "VaeImageProcessor":
        """What prepares the masks of this pipeline; another may be assigned."""
        from minidiff.images.processor import mask_processor  # brings PIL

        return mask_processor(self.vae_scale_factor)

    @property
    def _reads_mask(self) -> bool:
        """Whether the UNet was trained to inpaint."""
        return self.unet.config.in_channels != self._latent_channels

    def _generate(self, request: "InpaintRequest", output_type: str | None = None) -> Iterator[Run]:
        if request.padding_mask_crop is not None and output_type not in (None, "pil"):
            raise ValueError(f"with padding_mask_crop output_type should be 'pil', found {output_type!r}")
        return super()._generate(request, output_type)

    def _size(self, request: "InpaintRequest") -> tuple[int, int]:
        return self._latent_size(request.height, request.width)

    def _first_latents(self, request: "InpaintRequest", run: Run, size: tuple[int, int]) -> Tensor:
        """Encode image and mask; return the latents that the run begins with.

        Random draws come in the reference's order: for the image's latents, where they are needed, then the noise, then
        for the masked image's, needed or not. With ``seed`` or ``seeds`` each picture's own generator draws all of
        its own; of a list of generators the first ones draw for the images, as in the reference.
        """
        count, like, generator = request.count, run.tensors["prompt_embeds"], run.generator
        noisy = run.denoising_start is None  # otherwise the image's latents are taken as they are
        drawn = request.strength == 1 or request.latents is not None  # whether the run begins with noise alone
        image, mask, masked, run.task_state = self._read(request, size)
        m = repeat_to_batch(F.interpolate(mask, size=size).to(like), count, "masks")

        each = run.seeds is not None
        encode = partial(self._encode_image, count=count, generator=generator, like=like, one_each=each)
        x0 = None if self._reads_mask and noisy and drawn else encode(image)
        shape = (count, self._latent_channels, *size)
        noise = initial_latents(shape, request.latents, generator, like.device, like.dtype)
        masked = None if masked is None else encode(masked)
        for name, rows in (("mask", m), ("masked_image_latents", masked)):
            run.tensors[name] = None if rows is None else torch.cat([rows] * run.passes)
        if self._reads_mask:
            run.beside = ("mask", "masked_image_latents")
        else:
            run.after_step = KnownRegion(x0, noise, levels_after(run.core, run.plan))
        if not noisy:
            return x0
        return noise * run.plan.init_noise_sigma if drawn else run.core.noised(run.plan, x0, noise)

    def _pictures(self, run: Run, output_type: str) -> "Images":
        images = super()._pictures(run, output_type)
        if run.task_state is None:
            return images
        from minidiff.images.regions import overlay  # brings PIL

        return [overlay(run.task_state.mask, run.task_state.picture, image, run.task_state.region) for image in images]

    def _read(self, request: "InpaintRequest", size: tuple[int, int]) -> Given:
        """Prepare the image, the mask and what is left of the image without it, and check that they fit together."""
        from minidiff.images.processor import mask_tensor  # brings PIL
        from minidiff.images.regions import crop_region

        f, Z = self.vae_scale_factor, self._latent_channels
        height, width = size[0] * f, size[1] * f
        region = view = None
        if request.padding_mask_crop is not None:
            region = crop_region(request.mask_image, width, height, request.padding_mask_crop)
            view = View(request.mask_image, request.image, region)
        # The reference rounds images to float32 before it masks them.
        image = self._read_image(request.image, height, width, region).float()
        mask = mask_tensor(request.mask_image, f, height, width, region, self.mask_processor)
        if len(image) != len(mask) and 1 not in (len(image), len(mask)):
            raise ValueError(f"{len(mask)} masks and {len(image)} images: give one mask, one image, or a mask for each")
        is_latent = image.shape[1] == Z
        if is_latent and image.shape[-2:] != size:
            raise ValueError(f"latents of an image should be (B, C, {size[0]}, {size[1]}), found {tuple(image.shape)}")
        masked = request.masked_image_latents
        if masked is not None and masked.shape[1:] not in ((Z, *size), (3, height, width)):
            expected = f"(B, {Z}, {size[0]}, {size[1]})"
            raise ValueError(f"masked_image_latents should be {expected}, found {tuple(masked.shape)}")
        if masked is None and is_latent and self._reads_mask:
            raise ValueError("an image of latents cannot be masked for this UNet: pass masked_image_latents too")
        if masked is None and not is_latent:
            masked = image * (mask < 0.5)
        return Given(image, mask, masked, view)


def levels_after(scheduler: Scheduler | ByFace, plan: Plan) -> list[tuple[float, float]] | None:
    """Return α and σ of the noise levels after each step of a plan, from ``plan.start``, but the last.

    None if ``add_noise`` is somebody else's.
    """
    if isinstance(scheduler, ByFace):
        return None
    return [tuple(map(float, scheduler.level(plan, i))) for i in range(plan.start + 1, len(plan.coefficients))]
