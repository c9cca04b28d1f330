"""The Hub configuration of ``AutoencoderTiny`` -> ``TinyVAESpec``."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from minidiff.config import Config
from minidiff.errors import ConfigError
from minidiff.networks.specs import TinyVAESpec
from minidiff.networks.specs.fields import check_types, complete, per_level

NAME = "AutoencoderTiny"
ACTIVATIONS = ("relu", "silu", "swish", "mish", "gelu")
UPSAMPLING = ("nearest", "nearest-exact", "bilinear", "bicubic", "area")

_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": [64, 64, 64, 64],
    "decoder_block_out_channels": [64, 64, 64, 64],
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "latent_channels": 4,
    "upsampling_scaling_factor": 2,
    "num_encoder_blocks": [1, 3, 3, 3],
    "num_decoder_blocks": [3, 3, 3, 1],
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "scaling_factor": 1.0,
}
# Latents of Stable Diffusion are not shifted; and the reference takes ``force_upcast`` for false, whatever it says.
_ONLY = {"force_upcast": (False,), "shift_factor": (0.0,)}
_COPY = "block_out_channels"  # not an argument: what pipelines read, written into files by the reference


def tiny_vae_config(fields: Mapping[str, Any]) -> Config:
    """Complete the fields of a tiny autoencoder's Hub configuration; refuse what is not implemented."""
    config = complete(NAME, {name: value for name, value in fields.items() if name != _COPY}, _DEFAULTS, _ONLY)
    check_types(NAME, config, _DEFAULTS | {"latent_magnitude": 3.0})
    for half in ("encoder", "decoder"):
        widths, name = config[f"{half}_block_out_channels"], f"num_{half}_blocks"
        if len(set(widths)) != 1 or widths[0] < 1:
            raise ConfigError(f"{NAME}: {half}_block_out_channels should be one width, for all levels; found {widths}")
        per_level(NAME, name, config[name], len(widths), least=0)
    for name, known in (("act_fn", ACTIVATIONS), ("upsample_fn", UPSAMPLING)):
        if config[name].lower() not in known:
            raise ConfigError(f"{NAME}: {name} should be one of {', '.join(known)}, found {config[name]!r}")
    widths = config.decoder_block_out_channels
    if list(fields.get(_COPY, widths)) != widths:
        raise ConfigError(f"{NAME}: {_COPY} repeats decoder_block_out_channels {widths}, found {fields[_COPY]}")
    return Config({**config, _COPY: list(widths)})


def tiny_vae_spec(config: Config) -> TinyVAESpec:
    """Turn the Hub's fields into the record that the network and its name table are built from."""
    levels = enumerate(config.num_encoder_blocks)
    encoder = chain.from_iterable([("down" if i else "in"), *["block"] * n] for i, n in levels)
    *levels, last = config.num_decoder_blocks
    decoder = chain.from_iterable([*["block"] * n, "up", "conv"] for n in levels)
    return TinyVAESpec((*encoder, "out"), ("in", "act", *decoder, *["block"] * last, "out"))
