"""The Hub configuration of ``UNet2DConditionModel`` -> ``UNetSpec``."""

from collections.abc import Mapping
from typing import Any

from minidiff.config import Config
from minidiff.errors import ConfigError
from minidiff.networks.specs import LevelSpec, UNetSpec
from minidiff.networks.specs.fields import (
    block_kinds,
    check_counts,
    check_known,
    check_layers,
    check_types,
    class_fields,
    complete,
    per_level,
)

NAME = "UNet2DConditionModel"

_DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}  # type -> has cross-attention
_UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
_MIDDLES = {None: 0, "UNetMidBlock2D": 1, "UNetMidBlock2DCrossAttn": 2}  # type -> residual blocks; the last one attends
_SIZE, _WIDTH = "addition_time_embed_dim", "projection_class_embeddings_input_dim"
_DEFAULTS = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "layers_per_block": 2,
    "downsample_padding": 1,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "dropout": 0.0,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "only_cross_attention": False,
    "num_class_embeds": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "time_cond_proj_dim": None,
}
_PROJECTIONS = ("projection", "simple_projection")  # of a class that is given as a vector
_ONLY = {  # field -> the values that leave the network as it is built here, the default first
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu",),
    "addition_embed_type": (None, "text_time"),
    "resnet_time_scale_shift": ("default",),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "attention_type": ("default",),
    "mid_block_only_cross_attention": (None, False, True),  # no kind of middle that is built here reads it
    "class_embed_type": (None, "timestep", "identity", *_PROJECTIONS),
    "addition_embed_type_num_heads": (64,),  # of addition_embed_type "text", which is refused above
    "upcast_attention": (False, True, None),  # the fused attention keeps its scores in float32 in any case
    **dict.fromkeys(("dual_cross_attention", "resnet_skip_time_act"), (False,)),
    **dict.fromkeys(
        """
        encoder_hid_dim encoder_hid_dim_type num_attention_heads time_embedding_dim time_embedding_act_fn
        timestep_post_act cross_attention_norm
        """.split(),
        (None,),
    ),
}


def unet_config(fields: Mapping[str, Any]) -> Config:
    """Complete the fields of a conditional UNet's Hub configuration; refuse what is not implemented."""
    config = complete(NAME, fields, _DEFAULTS, _ONLY)
    lists = "layers_per_block cross_attention_dim transformer_layers_per_block attention_head_dim only_cross_attention"
    check_types(NAME, config, {**_DEFAULTS, "mid_block_type": None}, tuple(lists.split()))
    check_known(NAME, "mid_block_type", config.mid_block_type, _MIDDLES)
    check_counts(NAME, config, ("time_cond_proj_dim", "num_class_embeds", _SIZE, _WIDTH))
    check_layers(NAME, config)
    _check_kernels(config)
    _check_told(config)
    return config


def _check_kernels(config: Config) -> None:
    """Raise if the first or the last convolution would change the size."""
    for name in ("conv_in_kernel", "conv_out_kernel"):
        if config[name] < 1 or config[name] % 2 == 0:
            raise ConfigError(f"{NAME}: {name} should be odd and at least 1, found {config[name]}")


def _check_told(config: Config) -> None:
    """Raise if the fields of what the network is told beside the time, sizes and a class, do not belong together."""
    sizes, kind = config.addition_embed_type == "text_time", config.class_embed_type
    if (config[_SIZE] is None) == sizes:
        raise ConfigError(
            f"{NAME}: {_SIZE} = {config[_SIZE]!r} belongs to addition_embed_type 'text_time', which needs it; found "
            f"{config.addition_embed_type!r}"
        )
    if (config[_WIDTH] is None) == (sizes or kind in _PROJECTIONS):
        raise ConfigError(
            f"{NAME}: {_WIDTH} = {config[_WIDTH]!r} belongs to addition_embed_type 'text_time' or class_embed_type "
            f"'projection' or 'simple_projection', which need it; found {config.addition_embed_type!r} and {kind!r}"
        )
    if config.class_embeddings_concat and (sizes or class_fields(config)["class_embed"] is None):
        raise ConfigError(
            f"{NAME}: class_embeddings_concat puts a class beside the time: it needs num_class_embeds or "
            "class_embed_type, and no addition_embed_type"
        )


def unet_spec(config: Config) -> UNetSpec:
    """Turn the Hub's parallel lists into one record per level.

    Raises:
        ConfigError: if a list has the wrong length, a block type is not implemented, or a width is not divisible.
    """
    channels = config.block_out_channels
    count = len(channels)
    down = block_kinds(NAME, config, "down_block_types", _DOWN_BLOCKS)
    up = block_kinds(NAME, config, "up_block_types", _UP_BLOCKS)[::-1]
    # In the Hub's files of conditional UNets `attention_head_dim` is the number of heads, not their width: the field
    # was misnamed in 2022, and thousands of checkpoints carry it. SD 1.x: 8 everywhere; SD 2.x: [5, 10, 20, 20].
    heads = per_level(NAME, "attention_head_dim", config.attention_head_dim, count)
    layers = per_level(NAME, "layers_per_block", config.layers_per_block, count)
    depths, up_depths = _depths(config, layers)
    middle = _MIDDLES[config.mid_block_type]
    mid_depth = depths[-1][0] if middle == 2 else 0
    widths = per_level(NAME, "cross_attention_dim", config.cross_attention_dim, count)
    only_cross = _only_cross(config, count)
    levels = tuple(
        LevelSpec(
            C,
            tuple(depth * down[i] for depth in depths[i]),
            tuple(depth * up[i] for depth in up_depths[i]),
            *(heads[i], widths[i], only_cross[i]),
        )
        for i, C in enumerate(channels)
    )
    for i, lv in enumerate(levels):
        used = [*depths[i] * down[i], *up_depths[i] * up[i]]
        used += [depths[i][0]] * (i == count - 1 and middle == 2)  # the middle is like the coarsest level
        if used:
            _check_attention(lv, min(used), widths[-1])
    return UNetSpec(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        levels=levels,
        mid_res=middle,
        mid_depth=mid_depth,
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        dropout=config.dropout,
        linear_projection=config.use_linear_projection,
        downsample_padding=config.downsample_padding,
        time_features=channels[0],
        E=4 * channels[0],
        added=config[_WIDTH] if config.addition_embed_type == "text_time" else None,
        added_features=config.addition_time_embed_dim or 0,
        time_cond=config.time_cond_proj_dim,
        **class_fields(config),
        class_concat=config.class_embeddings_concat,
        in_kernel=config.conv_in_kernel,
        out_kernel=config.conv_out_kernel,
    )


def _only_cross(config: Config, levels: int) -> list[bool]:
    """Spread ``only_cross_attention`` over the levels. The middle is never meant: the reference does not tell it."""
    value = config.only_cross_attention
    flags = value if isinstance(value, list) else [value] * levels
    if len(flags) != levels or any(type(flag) is not bool for flag in flags):
        raise ConfigError(f"{NAME}: only_cross_attention should be {levels} of true or false, or one, found {value}")
    return flags


def _depths(config: Config, layers: list[int]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return the numbers of transformer blocks behind the residual blocks of each level, on the way down and up.

    Pruned networks say a number for each residual block; the way up, which has one more of them, then has a
    list of its own, from the coarsest level to the finest.
    """
    name, reverse = "transformer_layers_per_block", config.reverse_transformer_layers_per_block
    value = config[name]
    if reverse is None and isinstance(value, list) and any(isinstance(entry, (list, tuple)) for entry in value):
        raise ConfigError(f"{NAME}: {name} = {value} holds lists: give reverse_{name} too, for the way up")
    down = _per_layer(name, value, layers)
    if reverse is not None and not isinstance(reverse, list):
        raise ConfigError(f"{NAME}: reverse_{name} should be a list, coarsest level first, found {reverse!r}")
    if reverse is None:
        return down, [(depths[0],) * (n + 1) for depths, n in zip(down, layers, strict=True)]
    return down, _per_layer(f"reverse_{name}", reverse, [n + 1 for n in reversed(layers)])[::-1]


def _per_layer(name: str, value: Any, layers: list[int]) -> list[tuple[int, ...]]:
    """Spread a field over the residual blocks of each level: an integer, or a list of integers and lists of them."""
    entries = value if isinstance(value, list) else [value] * len(layers)
    if len(entries) != len(layers):
        raise ConfigError(f"{NAME}: {name} has {len(entries)} entries for {len(layers)} levels: {value}")
    depths = [
        tuple(entry) if isinstance(entry, (list, tuple)) else (entry,) * n
        for entry, n in zip(entries, layers, strict=True)
    ]
    for entry, n in zip(depths, layers, strict=True):
        if len(entry) != n or any(type(depth) is not int or depth < 0 for depth in entry):
            raise ConfigError(f"{NAME}: {name} should hold {n} integers of at least 0 for a level, found {list(entry)}")
    return depths


def _check_attention(level: LevelSpec, depth: int, D_ctx: int) -> None:
    """Raise if a level that attends has no transformer blocks, heads of unequal width or a text width of its own."""
    if level.channels % level.heads:
        raise ConfigError(
            f"{NAME}: {level.channels} channels should be divisible by the number of heads {level.heads} "
            "(attention_head_dim)"
        )
    if depth < 1:
        raise ConfigError(f"{NAME}: transformer_layers_per_block is 0 where a block has cross-attention")
    if level.D_ctx != D_ctx:
        raise ConfigError(
            f"{NAME}: cross_attention_dim should be the same at all levels that attend to the one text, found "
            f"{level.D_ctx} and {D_ctx}"
        )
