"""The tiny autoencoder (TAESD): pictures (B, 3, H, W) in [-1, 1] <-> latents (B, 4, H/8, W/8), in convolutions alone.

It was trained to do what the autoencoder of Stable Diffusion does with a thirtieth of its weights: fast enough to show
every step. Its latents are those of the diffusion process itself, ``scaling_factor`` is 1, and nothing is drawn.

    block:    y = relu(x + conv(act(conv(act(conv(x))))))
    encoder:  z = layers((x + 1) / 2);   decoder:  x = 2 layers(3 tanh(z / 3)) - 1

Source: madebyollin/taesd on GitHub, taesd.py. Checked against ``diffusers.AutoencoderTiny``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.checkpoints.casting import LayerwiseCasting
from minidiff.checkpoints.model import Model
from minidiff.checkpoints.names import tiny_vae_rows
from minidiff.checkpoints.original.single_file import SingleFileModel
from minidiff.checkpoints.remap import Row
from minidiff.compat.published import Published
from minidiff.config import Config
from minidiff.networks.recompute import GradientCheckpointing, Recomputed
from minidiff.networks.specs.fields import show_fields
from minidiff.networks.specs.vae_tiny import ACTIVATIONS, tiny_vae_config, tiny_vae_spec
from minidiff.networks.tiles import SavesMemory, laid_over
from minidiff.networks.vae import DecoderOutput, check_map
from minidiff.outputs import Output


@dataclass
class AutoencoderTinyOutput(Output):
    """What ``encode`` returns: latents (B, Z, H / f, W / f)."""

    latents: Tensor


class Block(Recomputed):
    """Three convolutions with a residual connection, see the head of this file."""

    def __init__(self, C: int, act: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(C, C), act, _conv(C, C), act, _conv(C, C))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv(x))


class Half(Published):
    """One half, layer by layer (see ``TinyVAESpec``), of width C: (B, C_in, H, W) -> (B, C_out, H', W')."""

    def __init__(self, kinds: Sequence[str], C_in: int, C: int, C_out: int, config: Config) -> None:
        super().__init__()
        act, mode = getattr(nn, ACTIVATIONS[config.act_fn.lower()]), config.upsample_fn.lower()
        scale = config.upsampling_scaling_factor
        self.factor = 2 ** kinds.count("down") * scale ** kinds.count("up")  # pixels per latent along each side
        convs = {"in": (C_in, C), "down": (C, C, 2, False), "conv": (C, C, 1, False), "out": (C, C_out)}
        others = {"act": act, "block": lambda: Block(C, act()), "up": lambda: nn.Upsample(None, scale, mode)}
        self.layers = nn.Sequential(*(_conv(*convs[kind]) if kind in convs else others[kind]() for kind in kinds))


class Encoder(Half):
    """Pictures in [-1, 1] -> latents."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.add(1).div(2))


class Decoder(Half):
    """Latents -> pictures in [-1, 1]."""

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(torch.tanh(z / 3) * 3).mul(2).sub(1)


class AutoencoderTiny(SingleFileModel, GradientCheckpointing, SavesMemory, LayerwiseCasting, Model):
    """Encode pictures to latents and decode latents to pictures, quickly and roughly.

    Keyword arguments are the fields of the Hub's ``config.json``, with the reference's defaults, which are TAESD's.

    Raises:
        ConfigError: naming each field that is unknown or has a value that is not implemented.
    """

    single_file_parts = ("vae",)
    tile_sample_min_size, tile_overlap_factor = 512, 0.125

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config = config = tiny_vae_config(fields)
        self.spec, Z = tiny_vae_spec(config), config.latent_channels
        self.encoder = Encoder(self.spec.encoder, config.in_channels, config.encoder_block_out_channels[0], Z, config)
        self.decoder = Decoder(self.spec.decoder, Z, config.decoder_block_out_channels[0], config.out_channels, config)
        self.tile_latent_min_size = self.tile_sample_min_size // self.decoder.factor

    def scale_latents(self, x: Tensor) -> Tensor:
        """Map latents from about [-latent_magnitude, latent_magnitude] to [0, 1], to be stored as a picture."""
        return x.div(2 * self.config.latent_magnitude).add(self.config.latent_shift).clamp(0, 1)

    def unscale_latents(self, x: Tensor) -> Tensor:
        """Map [0, 1] back to latents."""
        return x.sub(self.config.latent_shift).mul(2 * self.config.latent_magnitude)

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """Encode pictures (B, 3, H, W) in [-1, 1] to latents (B, Z, H / f, W / f), f = 2^(levels - 1).

        Raises:
            ValueError: if the number of channels is not the network's.
        """
        z = self._run(self.encoder, "pictures to encode", x, self.tile_sample_min_size, self.tile_latent_min_size)
        return AutoencoderTinyOutput(z) if return_dict else (z,)

    def decode(self, x: Tensor, generator: Any = None, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decode latents (B, Z, h, w) of the diffusion process to pictures (B, 3, f h, f w); nothing is drawn.

        Raises:
            ValueError: if the number of channels is not the network's.
        """
        y = self._run(self.decoder, "latents", x, self.tile_latent_min_size, self.tile_sample_min_size)
        return DecoderOutput(y) if return_dict else (y,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode pictures, round the latents to 256 levels as if they were stored in a picture, and decode them."""
        levels = self.scale_latents(self.encode(sample).latents).mul(255).round()
        return self.decode(self.unscale_latents(levels / 255), return_dict=return_dict)

    def _run(self, half: Half, what: str, x: Tensor, size: int, out: int) -> Tensor:
        """Return ``half(x)``, one sample or one tile at a time if that is switched on."""
        check_map(what, x, half.layers[0].in_channels)
        run = partial(laid_over, half, tiles=self._tiles(size, out, half.factor)) if self.use_tiling else half
        return self._one_by_one(run, x)

    def rows(self) -> list[Row]:
        """Return the name table of this configuration: ours, Hub, original single file."""
        return list(tiny_vae_rows(self.spec))


def _conv(C_in: int, C_out: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(C_in, C_out, 3, stride=stride, padding=1, bias=bias)


show_fields(AutoencoderTiny.__init__, {k: v for k, v in tiny_vae_config({}).items() if k != "block_out_channels"})
