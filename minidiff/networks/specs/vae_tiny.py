"""The Hub configuration of ``AutoencoderTiny`` -> ``TinyVAESpec``."""

from collections.abc import Mapping
from typing import Any

from minidiff.config import Config
from minidiff.errors import ConfigError
from minidiff.networks.specs import TinyVAESpec
from minidiff.networks.specs.fields import check_counts, check_known, check_types, complete, per_level

NAME = "AutoencoderTiny"
ACTIVATIONS = {"relu": "ReLU", "silu": "SiLU", "swish": "SiLU", "mish": "Mish", "gelu": "GELU"}  # -> torch's names
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
    "block_out_channels": None,  # not an argument: what pipelines read, written into files by the reference
}
# Latents of Stable Diffusion are not shifted; and the reference takes ``force_upcast`` for false, whatever it says.
_ONLY = {"force_upcast": (False,), "shift_factor": (0.0,)}


def tiny_vae_config(fields: Mapping[str, Any]) -> Config:
    """Complete the fields of a tiny autoencoder's Hub configuration; refuse what is not implemented."""
    config = complete(NAME, fields, _DEFAULTS, _ONLY)
    check_types(NAME, config, _DEFAULTS | {"latent_magnitude": 3.0})
    check_counts(NAME, config, ("in_channels", "out_channels", "latent_channels", "upsampling_scaling_factor"))
    for half in ("encoder", "decoder"):
        widths, name = config[f"{half}_block_out_channels"], f"num_{half}_blocks"
        if len(set(widths)) != 1 or widths[0] < 1:
            raise ConfigError(f"{NAME}: {half}_block_out_channels should be one width, for all levels; found {widths}")
        per_level(NAME, name, config[name], len(widths), least=0)
    for name, known in (("act_fn", ACTIVATIONS), ("upsample_fn", UPSAMPLING)):
        check_known(NAME, name, config[name].lower(), known)
    if config.block_out_channels not in (None, widths):  # the decoder's
        raise ConfigError(f"{NAME}: block_out_channels is the decoder's {widths}, found {config.block_out_channels}")
    return Config({**config, "block_out_channels": list(widths)})


def tiny_vae_spec(config: Config) -> TinyVAESpec:
    """Turn the Hub's fields into the record that the network and its name table are built from."""
    encoder = [kind for n in config.num_encoder_blocks for kind in ("down", *["block"] * n)]
    decoder = [kind for n in config.num_decoder_blocks for kind in (*["block"] * n, "up", "conv")]
    return TinyVAESpec(("in", *encoder[1:], "out"), ("in", "act", *decoder[:-2], "out"))
