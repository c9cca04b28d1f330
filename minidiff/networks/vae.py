"""The KL-regularised autoencoder: pictures (B, 3, H, W) in [-1, 1] <-> latents (B, 4, H/8, W/8).

The encoder ends in the mean and log-variance of a diagonal Gaussian over latents, the decoder turns a latent back
into a picture. Diffusion runs on ``latent * scaling_factor``, which has about unit variance.

Paper: Rombach et al. 2022 (LDM, https://arxiv.org/abs/2112.10752), section 3.1, appendices D.1 and G.
Checked against ``diffusers.AutoencoderKL``.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.checkpoints.casting import LayerwiseCasting
from minidiff.checkpoints.model import Model
from minidiff.checkpoints.names import canonical_vae_name, vae_rows
from minidiff.checkpoints.original.single_file import SingleFileModel
from minidiff.checkpoints.remap import Row
from minidiff.compat.attention import Attending
from minidiff.compat.published import Published
from minidiff.networks.layers import Downsample, PixelAttention, ResBlock, Upsample, silu
from minidiff.networks.recompute import GradientCheckpointing
from minidiff.networks.specs import VAESpec
from minidiff.networks.specs.fields import show_fields
from minidiff.networks.specs.vae import vae_config, vae_spec
from minidiff.networks.tiles import SavesMemory, in_tiles
from minidiff.noise import randn
from minidiff.outputs import Output

_EPS = 1e-6  # of every normalisation in the autoencoder; not a configuration field


class Level(nn.Module):
    """Residual blocks at one resolution, then a change of resolution (none at the coarsest / finest level)."""

    def __init__(self, channels: list[int], groups: int, resample: Callable[[int], nn.Module] | None) -> None:
        super().__init__()
        self.res = nn.ModuleList(
            ResBlock(C_in, C_out, groups=groups, eps=_EPS) for C_in, C_out in itertools.pairwise(channels)
        )
        self.resample = resample(channels[-1]) if resample is not None else None

    def forward(self, x: Tensor) -> Tensor:
        for res in self.res:
            x = res(x)
        return self.resample(x) if self.resample is not None else x


class Middle(nn.Module):
    """Residual block, attention over all pixels, residual block, at the coarsest resolution."""

    def __init__(self, C: int, groups: int, attention: bool) -> None:
        super().__init__()
        first = ResBlock(C, C, groups=groups, eps=_EPS)
        self.attn = PixelAttention(C, heads=1, groups=groups, eps=_EPS) if attention else nn.Identity()
        self.res = nn.ModuleList([first, ResBlock(C, C, groups=groups, eps=_EPS)])

    def forward(self, x: Tensor) -> Tensor:
        return self.res[1](self.attn(self.res[0](x)))


class Encoder(Published):
    """Pictures (B, 3, H, W) -> moments (B, 2 Z, H / f, W / f), with f = 2^(levels - 1) and Z latent channels."""

    def __init__(self, spec: VAESpec) -> None:
        super().__init__()
        channels, last = spec.channels, len(spec.channels) - 1
        self.conv_in = nn.Conv2d(spec.in_channels, channels[0], 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                [channels[max(i - 1, 0)]] + [C] * spec.layers,
                spec.groups,
                partial(Downsample, padding=0) if i < last else None,
            )
            for i, C in enumerate(channels)
        )
        self.mid = Middle(channels[-1], spec.groups, spec.mid_attention)
        self.norm_out = nn.GroupNorm(spec.groups, channels[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * spec.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(silu(self.norm_out(self.mid(x)), self.norm_out))


class Decoder(Published):
    """Latents (B, Z, H / f, W / f) -> pictures (B, 3, H, W)."""

    def __init__(self, spec: VAESpec) -> None:
        super().__init__()
        channels, last = spec.channels[::-1], len(spec.channels) - 1
        self.conv_in = nn.Conv2d(spec.latent_channels, channels[0], 3, padding=1)
        self.up = nn.ModuleList()
        self.mid = Middle(channels[0], spec.groups, spec.mid_attention)
        self.up.extend(
            Level([channels[max(i - 1, 0)]] + [C] * (spec.layers + 1), spec.groups, Upsample if i < last else None)
            for i, C in enumerate(channels)
        )
        self.norm_out = nn.GroupNorm(spec.groups, channels[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(channels[-1], spec.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in self.up:
            x = level(x)
        return self.conv_out(silu(self.norm_out(x), self.norm_out))


class DiagonalGaussian:
    """A Gaussian with independent components, q(z | x) = N(mean, exp(logvar)).

    Args:
        moments: (B, 2 Z, H, W), the mean and the log-variance stacked along the channels; the log-variance is
            clamped to [-30, 20].
    """

    def __init__(self, moments: Tensor) -> None:
        self.parameters = moments
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = (0.5 * self.logvar).exp()
        self.var = self.logvar.exp()

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """Draw mean + std * noise, (B, Z, H, W)."""
        noise = randn(self.mean.shape, generator, device=self.parameters.device, dtype=self.parameters.dtype)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """Return the most likely latent, which is the mean."""
        return self.mean

    def kl(self, other: "DiagonalGaussian | None" = None) -> Tensor:
        """Return KL(self || other), or to the standard normal if ``other`` is None, summed per picture: (B,)."""
        if other is None:
            return 0.5 * (self.mean**2 + self.var - 1.0 - self.logvar).sum(dim=(1, 2, 3))
        squared = (self.mean - other.mean) ** 2
        return 0.5 * ((squared + self.var) / other.var - 1.0 - self.logvar + other.logvar).sum(dim=(1, 2, 3))

    def nll(self, sample: Tensor, dims: tuple[int, ...] = (1, 2, 3)) -> Tensor:
        """Return the negative log-likelihood of ``sample``, summed over ``dims``."""
        return 0.5 * (math.log(2.0 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var).sum(dim=dims)


@dataclass
class AutoencoderKLOutput(Output):
    """What ``encode`` returns: the distribution over latents."""

    latent_dist: DiagonalGaussian


@dataclass
class DecoderOutput(Output):
    """What ``decode`` returns: pictures (B, 3, H, W), about in [-1, 1]."""

    sample: Tensor


def check_map(what: str, x: Tensor, C: int) -> None:
    """Raise ``ValueError`` if ``x`` is not a map of C channels."""
    if x.ndim != 4 or x.shape[1] != C:
        raise ValueError(f"{what} should be (B, {C}, H, W), found {tuple(x.shape)}")


class AutoencoderKL(SingleFileModel, GradientCheckpointing, SavesMemory, Attending, LayerwiseCasting, Model):
    """Encode pictures to latent Gaussians and decode latents to pictures.

    Keyword arguments are the fields of the Hub's ``vae/config.json``, with the reference's defaults. Layers are made
    and registered in the reference's order, see ``minidiff.networks.unet.UNet``.

    Raises:
        ConfigError: naming each field that is unknown or has a value that is not implemented.
    """

    single_file_parts = ("vae",)
    canonical_hub_name = staticmethod(canonical_vae_name)

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config = vae_config(fields)
        self.spec = spec = vae_spec(self.config)
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)
        Z = spec.latent_channels
        self.quant_conv = nn.Conv2d(2 * Z, 2 * Z, 1) if self.config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(Z, Z, 1) if self.config.use_post_quant_conv else nn.Identity()
        side = self.config.sample_size if isinstance(self.config.sample_size, int) else self.config.sample_size[0]
        self.tile_sample_min_size = side  # side of a tile, in pixels: that of the pictures it was trained on
        self.tile_latent_min_size = side // 2 ** (len(spec.channels) - 1)  # and in latents
        self.tile_overlap_factor = 0.25  # the part of a tile that it shares with the next

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussian]:
        """Encode pictures (B, 3, H, W) in [-1, 1] to a Gaussian over latents (B, Z, H / f, W / f).

        Raises:
            ValueError: if the number of channels is not the network's, or the picture is smaller than f.
        """
        self._check_pictures(x)
        tiled = self.use_tiling and max(x.shape[2:]) > self.tile_sample_min_size
        posterior = DiagonalGaussian(self._one_by_one(self._moments_in_tiles if tiled else self._moments, x))
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: None = None) -> DecoderOutput | tuple[Tensor]:
        """Decode latents (B, Z, H / f, W / f), already divided by ``config.scaling_factor``, to pictures.

        ``generator`` is part of the reference's signature; decoding draws nothing, there and here.

        Raises:
            ValueError: if the number of channels is not the network's.
        """
        check_map("latents", z, self.config.latent_channels)
        tiled = self.use_tiling and max(z.shape[2:]) > self.tile_latent_min_size
        x = self._one_by_one(self._pixels_in_tiles if tiled else self._pixels, z)
        return DecoderOutput(x) if return_dict else (x,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode pictures and decode the mode of the latents, or a sample of them if ``sample_posterior``."""
        posterior = self.encode(sample).latent_dist
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mode(), return_dict)

    def _moments(self, x: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x))

    def _pixels(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    def _check_pictures(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.config.in_channels or min(x.shape[2:]) < self._factor:
            expected = f"(B, {self.config.in_channels}, H, W) with H and W at least {self._factor}"
            raise ValueError(f"pictures to encode should be {expected}, found {tuple(x.shape)}")

    @property
    def _factor(self) -> int:
        """Pixels per latent along each side, f."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    # --- less memory -------------------------------------------------------------------------------------------------

    def tiled_encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussian]:
        """Encode as ``encode`` does, in tiles whatever the size and the switch."""
        self._check_pictures(x)
        posterior = DiagonalGaussian(self._moments_in_tiles(x))
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decode as ``decode`` does, in tiles whatever the size and the switch."""
        check_map("latents", z, self.config.latent_channels)
        x = self._pixels_in_tiles(z)
        return DecoderOutput(x) if return_dict else (x,)

    def _moments_in_tiles(self, x: Tensor) -> Tensor:
        return in_tiles(
            self._moments, x, self._tiles(self.tile_sample_min_size, self.tile_latent_min_size, self._factor)
        )

    def _pixels_in_tiles(self, z: Tensor) -> Tensor:
        return in_tiles(
            self._pixels, z, self._tiles(self.tile_latent_min_size, self.tile_sample_min_size, self._factor)
        )

    # --- names of the weights ----------------------------------------------------------------------------------------

    def rows(self) -> list[Row]:
        """Return the name table of this configuration: ours, Hub, original single file."""
        return list(vae_rows(self.spec, self.config))


show_fields(AutoencoderKL.__init__, vae_config({}))
