"""What every pipeline over latents has around its run: pictures to latents and back, and what a UNet reads."""

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from minidiff.adapters.lora_loader import LoraLoader
from minidiff.adapters.textual_inversion import TextualInversionLoader
from minidiff.errors import LONGEST_SIDE, ConfigError
from minidiff.networks.unet import UNet2DConditionModel
from minidiff.networks.vae import AutoencoderKL, DiagonalGaussian
from minidiff.networks.vae_tiny import AutoencoderTiny
from minidiff.noise import Generators
from minidiff.pipelines.base import DiffusionPipeline
from minidiff.pipelines.by_hand import ByHand
from minidiff.pipelines.foreign import STEPS, first, overridden
from minidiff.pipelines.request import check_count
from minidiff.pipelines.run import LatentGeneration, repeat_to_batch
from minidiff.pipelines.state import computed

if TYPE_CHECKING:
    from minidiff.images.processor import VaeImageProcessor
    from minidiff.images.regions import Region


class LatentPipeline(ByHand, LatentGeneration, LoraLoader, TextualInversionLoader, DiffusionPipeline):
    """What every family of pipelines over latents has: an autoencoder, a UNet, and what fits them."""

    _optional_components: ClassVar[tuple[str, ...]] = ("image_encoder", "feature_extractor")
    unet_inputs: ClassVar[tuple[str, ...]] = ("latents",)  # what its UNets may read: keys of ``UNET_INPUTS``
    _layers_before_the_last: ClassVar[int] = 0  # that are never read
    _calls: ClassVar[tuple[str, ...]] = ("encode_prompt", "prepare_extra_step_kwargs", "prepare_latents")

    @computed
    def vae_scale_factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae is not None else 8

    def _decoder(self) -> AutoencoderKL | AutoencoderTiny:
        """Return the autoencoder in the dtype that it is to decode in."""
        return self.vae

    def _encoder(self) -> AutoencoderKL | AutoencoderTiny:
        """Return the autoencoder in the dtype that it is to encode in."""
        return self.vae

    def _unscaled(self, latents: Tensor, vae: AutoencoderKL) -> Tensor:
        """Return what the autoencoder decodes of latents of the diffusion process."""
        return latents / vae.config.scaling_factor

    def _scaled(self, latents: Tensor, vae: AutoencoderKL) -> Tensor:
        """Return what the diffusion process takes of latents that the autoencoder has encoded."""
        return vae.config.scaling_factor * latents

    @computed
    def image_processor(self) -> "VaeImageProcessor":
        """What prepares the images of this pipeline and makes pictures; another may be assigned."""
        from minidiff.images.processor import VaeImageProcessor  # brings PIL

        return VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, vae_latent_channels=self._latent_channels)

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Attenuate the UNet's skips by s and amplify the rest by b; see ``minidiff.networks.freeu``."""
        self.unet.enable_freeu(s1, s2, b1, b2)

    def disable_freeu(self) -> None:
        """Let the UNet compute as it was trained."""
        self.unet.disable_freeu()

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Do nothing, and say so: ``optimize`` is minidiff's way to be faster."""
        self.unet.fuse_qkv_projections()

    def unfuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Do nothing: nothing was fused."""

    @property
    def _latent_channels(self) -> int:
        return self.unet.config.out_channels if self.vae is None else self.vae.config.latent_channels

    def _read_image(
        self, image: Any, height: int | None = None, width: int | None = None, region: "Region | None" = None
    ) -> Tensor:
        """Return pixels (B, 3, H, W) in [-1, 1] or latents, see ``to_tensor``."""
        from minidiff.images.processor import to_tensor  # brings PIL

        channels = 3 if self.vae is None else self.vae.config.in_channels
        own = (self.vae_scale_factor, self._latent_channels, channels)
        return to_tensor(image, *own, height, width, region, self.image_processor)

    def _encode_image(
        self, x: Tensor, count: int, generator: Generators, like: Tensor, one_each: bool = True
    ) -> Tensor:
        """Return clean latents (count, Z, h, w), dealt out to the pictures in turn, in dtype and on the device of like.

        Args:
            x: pixels (B, 3, H, W) in [-1, 1], whose latents are drawn from the autoencoder's Gaussian (those of a tiny
                one are certain) and scaled; or latents (B, Z, h, w), which are taken as they are.
            generator: of a list, each draws for the picture it belongs to (``one_each``), or the first ones draw for
                the images.

        Raises:
            ValueError: if the images cannot be dealt out evenly, or there is no autoencoder for pixels.
        """
        if x.shape[1] == self._latent_channels:
            return repeat_to_batch(x.to(like), count)
        if self.vae is None:
            raise ValueError("this pipeline has no vae: pass latents as image")
        vae = self._encoder()
        encoded = vae.encode(x.to(like).to(vae.dtype))
        if hasattr(encoded, "latents"):
            return repeat_to_batch(self._scaled(encoded.latents.to(like), vae), count)
        posterior = first(encoded, "latent_dist")
        if isinstance(generator, (list, tuple)) and one_each:
            posterior = DiagonalGaussian(repeat_to_batch(posterior.parameters, count))
        elif isinstance(generator, (list, tuple)):
            generator = generator[: len(x)]
        return repeat_to_batch(self._scaled(posterior.sample(generator).to(like), vae), count)

    def _check_clip_skip(self, clip_skip: int | None) -> None:
        encoders = [getattr(self, name, None) for name in ("text_encoder", "text_encoder_2")]
        layers = [encoder.config.num_hidden_layers for encoder in encoders if encoder is not None]
        if clip_skip is None or not layers:
            return
        last = min(layers) - self._layers_before_the_last
        if isinstance(clip_skip, bool) or not isinstance(clip_skip, int) or not 0 <= clip_skip <= last:
            raise ValueError(f"clip_skip should be None or 0 to {last}, found {clip_skip!r}")

    # --- one run -----------------------------------------------------------------------------------------------------

    def _refuse_what_is_not_called(self) -> None:
        """Raise if a program overrides a method that the reference's call goes through and ours does not."""
        for name in STEPS:
            if name not in self._calls and overridden(self, name):
                raise TypeError(
                    f"{type(self).__name__}.{name} is overridden, and a call does not go through it: override "
                    f"{' or '.join(self._calls)}, or write a __call__ of your own"
                )

    def _latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return height and width in latents; a side that was not given is what the UNet was trained on."""
        f = self.vae_scale_factor
        default = self._trained_size()
        sizes = []
        for name, pixels, latent in (("height", height, default[0]), ("width", width, default[1])):
            if pixels is None and latent is None:
                raise ValueError(f"{name} must be given: this UNet's config has no sample_size")
            if pixels is None:
                pixels = latent * f
            check_count(name, pixels, LONGEST_SIDE)
            if pixels % f:
                raise ValueError(f"{name} should be divisible by {f}, found {pixels}; {pixels - pixels % f} would do")
            sizes.append(pixels // f)
        return sizes[0], sizes[1]

    def _trained_size(self) -> tuple[int | None, int | None]:
        """Return the latent height and width that the UNet was trained on, (None, None) if its config does not say."""
        size = self.unet.config.sample_size
        return (size[0], size[1]) if isinstance(size, list) else (size, size)

    def _check_width(self, name: str, embeds: Tensor | None) -> None:
        D = self.unet.config.cross_attention_dim
        if embeds is not None and embeds.shape[-1] != D:
            raise ValueError(
                f"{name} should be (B, L, {D}) for this UNet ({family(D)}), found {tuple(embeds.shape)} "
                f"({family(embeds.shape[-1])})"
            )


class UNetInput(NamedTuple):
    """What a UNet reads: that many of the autoencoder's latents, and further channels."""

    latents: int
    further: int
    what: str
    pipeline: str  # the end of the name of the pipeline that shows it this


UNET_INPUTS = {
    "latents": UNetInput(1, 0, "a text-to-image UNet", "Pipeline"),
    "image": UNetInput(2, 0, "an instruct-pix2pix UNet, which also reads the image", "InstructPix2PixPipeline"),
    "mask": UNetInput(2, 1, "an inpainting UNet, which also reads mask and masked image", "InpaintPipeline"),
}


def check_channels(
    pipeline: type[LatentPipeline], vae: AutoencoderKL | AutoencoderTiny | None, unet: UNet2DConditionModel | None
) -> None:
    """Raise ``ConfigError`` if the UNet does not read what the pipeline shows it, naming the pipeline that does."""
    if not hasattr(unet, "spec"):  # absent, or of another make
        return
    Z = unet.config.out_channels if vae is None else vae.config.latent_channels
    channels = {name: kind.latents * Z + kind.further for name, kind in UNET_INPUTS.items()}
    expected = [channels[name] for name in pipeline.unet_inputs]
    found = unet.config.in_channels
    if unet.config.out_channels == Z and found in expected:
        return
    for name, kind in UNET_INPUTS.items():
        if channels[name] == found and unet.config.out_channels == Z:
            family = "StableDiffusion" if unet.spec.added is None else "StableDiffusionXL"
            advice = f"this is {kind.what}: use {family}{kind.pipeline}"
            break
    else:
        advice = "no pipeline of minidiff takes this UNet"
    raise ConfigError(
        f"vae and unet do not fit {pipeline.__name__}: for {Z} latent channels it takes a UNet with in_channels "
        f"{' or '.join(map(str, expected))} and out_channels {Z}, found in_channels {found} and out_channels "
        f"{unet.config.out_channels}; {advice}"
    )


def latent_moments(vae: AutoencoderKL, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the mean and the deviation (1, Z, 1, 1) of an autoencoder's latents, None if its config lacks either."""
    moments = [getattr(vae.config, name, None) for name in ("latents_mean", "latents_std")]
    if None in moments:
        return None
    mean, std = torch.tensor(moments)[:, None, :, None, None].to(like)  # by way of float32, as in the reference
    return mean, std


def family(D: int) -> str:
    """Return which published models have text embeddings of width ``D``."""
    return {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL refiner", 2048: "SDXL base"}.get(D, "no published family")
