"""The tiny autoencoder (TAESD): pictures (B, 3, H, W) in [-1, 1] <-> latents (B, 4, H/8, W/8), in convolutions alone.

It was trained to do what the autoencoder of Stable Diffusion does with a thirtieth of its weights: fast enough to show
every step. Its latents are those of the diffusion process itself, ``scaling_factor`` is 1, and nothing is drawn.

    block:    y = relu(x + conv(act(conv(act(conv(x))))))
    encoder:  z = layers((x + 1) / 2);   decoder:  x = 2 layers(3 tanh(z / 3)) - 1

Source: madebyollin/taesd on GitHub, taesd.py. Checked against ``diffusers.AutoencoderTiny``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minidiff.checkpoints.model import Model
from minidiff.checkpoints.names import tiny_vae_rows
from minidiff.checkpoints.original.single_file import SingleFileModel
from minidiff.checkpoints.remap import Row
from minidiff.compat.published import Published
from minidiff.config import Config
from minidiff.networks.recompute import GradientCheckpointing, Recomputed
from minidiff.networks.specs.fields import show_fields
from minidiff.networks.specs.vae_tiny import tiny_vae_config, tiny_vae_spec
from minidiff.networks.tiles import SavesMemory, laid_over
from minidiff.networks.vae import DecoderOutput
from minidiff.outputs import Output

_ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "swish": nn.SiLU, "mish": nn.Mish, "gelu": nn.GELU}


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
        act = _ACTIVATIONS[config.act_fn.lower()]
        make: dict[str, Callable[[], nn.Module]] = {
            "in": lambda: _conv(C_in, C),
            "act": act,
            "block": lambda: Block(C, act()),
            "down": lambda: _conv(C, C, stride=2, bias=False),
            "up": lambda: nn.Upsample(scale_factor=config.upsampling_scaling_factor, mode=config.upsample_fn.lower()),
            "conv": lambda: _conv(C, C, bias=False),
            "out": lambda: _conv(C, C_out),
        }
        self.layers = nn.Sequential(*(make[kind]() for kind in kinds))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class AutoencoderTiny(SingleFileModel, GradientCheckpointing, SavesMemory, Model):
    """Encode pictures to latents and decode latents to pictures, quickly and roughly.

    Keyword arguments are the fields of the Hub's ``config.json``, with the reference's defaults, which are TAESD's.

    Raises:
        ConfigError: naming each field that is unknown or has a value that is not implemented.
    """

    single_file_parts = ("vae",)

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config = config = tiny_vae_config(fields)
        self.spec, Z = tiny_vae_spec(config), config.latent_channels
        self.encoder = Half(self.spec.encoder, config.in_channels, config.encoder_block_out_channels[0], Z, config)
        self.decoder = Half(self.spec.decoder, Z, config.decoder_block_out_channels[0], config.out_channels, config)
        self.tile_sample_min_size = 512  # side of a tile, in pixels
        self.tile_latent_min_size = 512 // self._decoder_factor  # and in latents
        self.tile_overlap_factor = 0.125  # the part of a tile that it shares with the next

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
        self._check("pictures to encode", x, self.config.in_channels)
        f, tile = 2 ** (len(self.config.num_encoder_blocks) - 1), (self.tile_sample_min_size, self.tile_latent_min_size)
        z = self._run(lambda x: self.encoder(x.add(1).div(2)), x, *tile, f)
        return AutoencoderTinyOutput(z) if return_dict else (z,)

    def decode(
        self, x: Tensor, generator: torch.Generator | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode latents (B, Z, h, w) of the diffusion process to pictures (B, 3, f h, f w); nothing is drawn.

        Raises:
            ValueError: if the number of channels is not the network's.
        """
        self._check("latents", x, self.config.latent_channels)
        f, tile = self._decoder_factor, (self.tile_latent_min_size, self.tile_sample_min_size)
        y = self._run(lambda z: self.decoder(torch.tanh(z / 3) * 3).mul(2).sub(1), x, *tile, f)
        return DecoderOutput(y) if return_dict else (y,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode pictures, round the latents to 256 levels as if they were stored in a picture, and decode them."""
        levels = self.scale_latents(self.encode(sample).latents).mul(255).round()
        return self.decode(self.unscale_latents(levels / 255), return_dict=return_dict)

    def _check(self, what: str, x: Tensor, C: int) -> None:
        if x.ndim != 4 or x.shape[1] != C:
            raise ValueError(f"{what} should be (B, {C}, H, W), found {tuple(x.shape)}")

    def _run(self, half: Callable[[Tensor], Tensor], x: Tensor, size: int, out: int, f: int) -> Tensor:
        """Return ``half(x)``, one sample or one tile at a time if that is switched on."""
        if not self.use_tiling:
            return self._one_by_one(half, x)
        tiles = self._tiles(size, out, f)
        return self._one_by_one(lambda x: laid_over(half, x, tiles), x)

    @property
    def _decoder_factor(self) -> int:
        """Pixels per latent along each side, as the decoder makes them."""
        return self.config.upsampling_scaling_factor ** (len(self.config.num_decoder_blocks) - 1)

    def rows(self) -> list[Row]:
        """Return the name table of this configuration: ours, Hub, original single file."""
        return list(tiny_vae_rows(self.spec))


def _conv(C_in: int, C_out: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(C_in, C_out, 3, stride=stride, padding=1, bias=bias)


show_fields(
    AutoencoderTiny.__init__, Config({k: v for k, v in tiny_vae_config({}).items() if k != "block_out_channels"})
)
