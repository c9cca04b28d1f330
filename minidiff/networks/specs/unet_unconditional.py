"""The Hub configuration of ``UNet2DModel`` -> ``UNetSpec``."""

from collections.abc import Iterator, Mapping
from typing import Any

from minidiff.config import Config
from minidiff.errors import ConfigError
from minidiff.networks.specs import LevelSpec, UNetSpec
from minidiff.networks.specs.fields import (
    block_kinds,
    check_counts,
    check_layers,
    check_types,
    class_fields,
    complete,
    per_level,
)

NAME = "UNet2DModel"

# type -> (has pixel attention, changes the resolution in a residual block; None: as down/upsample_type says)
_DOWN_BLOCKS: dict[str, tuple[bool, bool | None]] = {
    "DownBlock2D": (False, False),
    "AttnDownBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, True),
}
_UP_BLOCKS = {"UpBlock2D": (False, False), "AttnUpBlock2D": (True, None), "ResnetUpsampleBlock2D": (False, True)}
_DOWN_BLOCKS |= {f"UNetRes{name}": kind for name, kind in _DOWN_BLOCKS.items()}  # spellings of 2022
_UP_BLOCKS |= {f"UNetRes{name}": kind for name, kind in _UP_BLOCKS.items()}
_DEFAULTS = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
    "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1.0,
    "downsample_padding": 1,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "add_attention": True,
}
_COUNTS = {  # each a positive integer or null
    "attention_head_dim": 8,
    "attn_norm_num_groups": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
    "time_embedding_dim": None,
}
_ONLY = {
    "time_embedding_type": ("positional", "fourier", "learned"),
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "act_fn": ("silu", "swish"),  # two names of one function
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None, "timestep", "identity"),
}


def unconditional_unet_config(fields: Mapping[str, Any]) -> Config:
    """Complete the fields of an unconditional UNet's Hub configuration; refuse what is not implemented."""
    config = complete(NAME, fields, _DEFAULTS | _COUNTS, _ONLY)
    check_types(NAME, config, _DEFAULTS)
    check_counts(NAME, config, tuple(_COUNTS))
    check_layers(NAME, config)
    if config.mid_block_scale_factor == 0:
        raise ConfigError(f"{NAME}: mid_block_scale_factor should not be 0")
    if config.time_embedding_type == "learned" and config.num_train_timesteps is None:
        raise ConfigError(f"{NAME}: time_embedding_type 'learned' needs num_train_timesteps, the size of its table")
    return config


def unconditional_unet_spec(config: Config) -> UNetSpec:
    """Turn the Hub's parallel lists into one record per level.

    Raises:
        ConfigError: if a list has the wrong length, a block type is not implemented, or a width is not divisible.
    """
    channels, groups = config.block_out_channels, config.norm_num_groups
    mid_attn = config.mid_block_type is not None and config.add_attention
    scale_shift = config.resnet_time_scale_shift == "scale_shift"
    # Where the time scales and shifts, the middle's attention has no norm before it unless one is asked for.
    mid_groups = config.attn_norm_num_groups or (None if scale_shift else groups)
    if mid_attn and mid_groups is not None and channels[-1] % mid_groups:
        raise ConfigError(f"{NAME}: {channels[-1]} channels should be divisible by attn_norm_num_groups {mid_groups}")
    return UNetSpec(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        levels=tuple(_levels(config, mid_attn)),
        mid_depth=0,
        groups=groups,
        eps=config.norm_eps,
        linear_projection=True,
        downsample_padding=config.downsample_padding,
        time_features=channels[0] * (2 if config.time_embedding_type == "fourier" else 1),
        E=config.time_embedding_dim or 4 * channels[0],
        mid_res=2 * (config.mid_block_type is not None),
        mid_pixel_attn=mid_attn,
        mid_groups=mid_groups,
        mid_scale=config.mid_block_scale_factor,
        scale_shift=scale_shift,
        dropout=config.dropout,
        **class_fields(config),
    )


def _levels(config: Config, mid_attn: bool) -> Iterator[LevelSpec]:
    """Yield one record per level, from the finest to the coarsest."""
    channels = config.block_out_channels
    count = len(channels)
    down = block_kinds(NAME, config, "down_block_types", _DOWN_BLOCKS)
    up = block_kinds(NAME, config, "up_block_types", _UP_BLOCKS)[::-1]
    layers = per_level(NAME, "layers_per_block", config.layers_per_block, count)
    for i, C in enumerate(channels):
        (attn, res_down), (up_attn, res_up) = down[i], up[i]
        attends = attn or up_attn or (mid_attn and i == count - 1)
        yield LevelSpec(
            channels=C,
            depths=(0,) * layers[i],
            up_depths=(0,) * (layers[i] + 1),
            heads=_heads(C, config.attention_head_dim) if attends else 1,
            D_ctx=0,
            attn_width=_heads(C, config.attention_head_dim) * (config.attention_head_dim or C) if attends else None,
            pixel_attn=attn,
            up_pixel_attn=up_attn,
            res_down=config.downsample_type == "resnet" if res_down is None else res_down,
            res_up=config.upsample_type == "resnet" if res_up is None else res_up,
        )


def _heads(C: int, K: int | None) -> int:
    """Return how many heads of width K fit into C: in files of this network `attention_head_dim` means what it says."""
    if K is not None and K > C:
        raise ConfigError(f"{NAME}: attention_head_dim {K}, the width of a head, should be at most {C}, the channels")
    return 1 if K is None else C // K
