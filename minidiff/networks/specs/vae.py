"""The Hub configuration of ``AutoencoderKL`` -> ``VAESpec``."""

from collections.abc import Mapping
from typing import Any

from minidiff.config import Config
from minidiff.errors import ConfigError
from minidiff.networks.specs import VAESpec
from minidiff.networks.specs.fields import check_counts, check_groups, check_types, complete

NAME = "AutoencoderKL"

_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
    "latents_mean": None,  # of the diffusion process' latents, one number per channel
    "latents_std": None,
}
_ONLY = {"act_fn": ("silu",), "shift_factor": (None,)}


def vae_config(fields: Mapping[str, Any]) -> Config:
    """Complete the fields of a VAE's Hub configuration; refuse what is not implemented."""
    config = complete(NAME, fields, _DEFAULTS, _ONLY)
    check_types(NAME, config, _DEFAULTS, lists=("sample_size",))
    levels = len(config.block_out_channels)
    for name, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if list(config[name]) != [block] * levels:
            raise ConfigError(
                f"{NAME}: {name} should be {levels} x {block!r}, one per entry of block_out_channels "
                f"{config.block_out_channels}; found {config[name]}"
            )
    check_groups(NAME, config)
    check_counts(NAME, config, ("latent_channels", "layers_per_block"))
    for name in ("latents_mean", "latents_std"):
        _check_moments(name, config)
    return config


def _check_moments(name: str, config: Config) -> None:
    """Raise if a field is neither null nor a number for each channel of the latents, positive ones if they divide."""
    values, Z = config[name], config.latent_channels
    numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    if values is not None and not (numbers and len(values) == Z and (name == "latents_mean" or min(values) > 0)):
        kind = "numbers" if name == "latents_mean" else "positive numbers"
        raise ConfigError(f"{NAME}: {name} should be null or {Z} {kind}, as latent_channels; found {values!r}")


def vae_spec(config: Config) -> VAESpec:
    """Turn the Hub's fields into the record that the network and its name table are built from."""
    return VAESpec(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        latent_channels=config.latent_channels,
        channels=tuple(config.block_out_channels),
        layers=config.layers_per_block,
        groups=config.norm_num_groups,
        mid_attention=config.mid_block_add_attention,
    )
