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

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.pipelines.by_hand import InpaintByHand
from minidiff.pipelines.callbacks import Handling
from minidiff.pipelines.common import Run, initial_latents
from minidiff.pipelines.foreign import ByFace
from minidiff.pipelines.latent import LatentPipeline, computed, dealt
from minidiff.pipelines.request import Generators
from minidiff.schedulers.base import Plan, Scheduler

if TYPE_CHECKING:
    from PIL import Image

    from minidiff.images.processor import VaeImageProcessor
    from minidiff.images.regions import Region
    from minidiff.pipelines.latent import Images
    from minidiff.pipelines.request_image import InpaintRequest


class Kept(NamedTuple):
    """What is put back after each step."""

    x0: Tensor  # (B, C, h, w), the encoded image
    noise: Tensor  # (B, C, h, w)
    levels: list[tuple[float, float]] | None  # α and σ after each step but the last; None = ask the scheduler


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


@dataclass(kw_only=True)
class InpaintRun(Run):
    """The state of one inpainting. Under guidance ``mask`` and ``masked_image_latents`` stand there twice."""

    per_copy: ClassVar[tuple[str, ...]] = ("mask", "masked_image_latents")

    mask: Tensor  # (B, 1, h, w) or (2 B, 1, h, w): 1 is repainted
    masked_image_latents: Tensor | None  # (B, C, h, w) or (2 B, C, h, w); None = the image came as latents
    kept: Kept | None  # None = the UNet reads the mask
    view: View | None

    def settle(self, i: int, x: Tensor) -> Tensor:
        """Put back what is kept, at the noise level after step ``i``; after the last step without noise."""
        if self.kept is None:
            return x
        known = self.kept.x0
        if i != self.indices[-1]:
            known = self._noised(i + 1, known)
        m = self.mask.chunk(self.passes)[0]
        return (1 - m) * known + m * x

    def _noised(self, i: int, x0: Tensor) -> Tensor:
        """Return what is kept at the noise level that step ``i`` begins with."""
        if self.kept.levels is None:
            return self.core.noised(self.plan._replace(start=i), x0, self.kept.noise)
        alpha, sigma = self.kept.levels[i - 1 - self.plan.start]
        return alpha * x0 + sigma * self.kept.noise


class InpaintingPipeline(InpaintByHand, LatentPipeline):
    """Adds to a pipeline what inpainting needs."""

    _calls: ClassVar[tuple[str, ...]] = ("encode_prompt", "prepare_extra_step_kwargs")
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

    def _network(self, x: Tensor, t: Tensor, run: InpaintRun) -> Tensor:
        if self._reads_mask:
            x = torch.cat([x, run.mask, run.masked_image_latents], dim=1)
        return super()._network(x, t, run)

    def _finish(self, run: InpaintRun, handling: Handling) -> "Images":
        images = super()._finish(run, handling)
        if run.view is None:
            return images
        from minidiff.images.regions import overlay  # brings PIL

        return [overlay(run.view.mask, run.view.picture, image, run.view.region) for image in images]

    def _prepare(
        self,
        request: "InpaintRequest",
        plan: Plan,
        generator: Generators,
        like: Tensor,
        size: tuple[int, int],
        noisy: bool = True,
    ) -> dict[str, Any]:
        """Encode image and mask; return what goes into the run: ``latents`` and the fields of ``InpaintRun``.

        Random draws come in the reference's order: for the image's latents, where they are needed, then the noise, then
        for the masked image's, needed or not. With ``seed`` or ``seeds`` each picture's own generator draws all of
        its own; of a list of generators the first ones draw for the images, as in the reference.

        Args:
            size: (h, w) in latents.
            noisy: whether the run begins with noise, alone or added; False takes the image's latents as they are.
        """

        def twice(x: Tensor) -> Tensor:
            return torch.cat([x, x]) if request.guided else x

        count, pure = request.count, request.strength == 1
        one_each = request.seed is not None or request.seeds is not None
        image, mask, masked, view = self._read(request, size)
        m = dealt(F.interpolate(mask, size=size).to(like), count, "masks")

        x0 = None
        if not self._reads_mask or not noisy or (request.latents is None and not pure):
            x0 = self._encode_image(image, count, generator, like, one_each)
        shape = (count, self._latent_channels, *size)
        noise = initial_latents(shape, request.latents, generator, like.device, like.dtype)
        if not noisy:
            latents = x0
        elif pure or request.latents is not None:
            latents = noise * plan.init_noise_sigma
        else:
            latents = self._core.noised(plan, x0, noise)
        if masked is not None:
            masked = self._encode_image(masked, count, generator, like, one_each)
        return {
            "latents": latents,
            "mask": twice(m),
            "masked_image_latents": None if masked is None else twice(masked),
            "kept": None if self._reads_mask else Kept(x0, noise, levels_after(self._core, plan)),
            "view": view,
        }

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

    All schedulers add noise as x = α x0 + σ noise. Two numbers per step, known before the run, spare the loop the look
    into the scheduler's tables, which wait for the device. None if ``add_noise`` is somebody else's.
    """
    if isinstance(scheduler, ByFace):
        return None
    plan = plan._replace(timesteps=plan.timesteps.cpu())
    x0, noise = torch.eye(2, dtype=torch.float64)
    return [
        tuple(scheduler.noised(plan._replace(start=i), x0, noise).tolist())
        for i in range(plan.start + 1, len(plan.steps))
    ]
