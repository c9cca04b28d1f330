"""The unconditional UNet: predicts the noise in a picture (B, C, H, W), given the time and, if it knows any, a class.

The body is that of ``minidiff.networks.unet``: residual blocks down, a middle, residual blocks up, with
self-attention over the pixels at some levels. This face adds the ways in which time and
class come in; their embeddings are summed.

Papers: Ho et al. 2020 (DDPM, https://arxiv.org/abs/2006.11239), appendix B; Song et al. 2021 (score SDE,
https://arxiv.org/abs/2011.13456), appendix H, for Fourier features of the time; Dhariwal & Nichol 2021 (ADM,
https://arxiv.org/abs/2105.05233), for residual blocks that change the resolution, and classes.
Checked against ``diffusers.UNet2DModel``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from minidiff.checkpoints.names import canonical_unconditional_unet_name, unconditional_unet_rows
from minidiff.checkpoints.remap import Row
from minidiff.config import Config, check_types, complete, per_level, show_fields
from minidiff.errors import ConfigError
from minidiff.networks.layers import FourierFeatures, TimeMLP
from minidiff.networks.unet import Level, UNet, UNetSpec
from minidiff.outputs import Output

NAME = "UNet2DModel"


@dataclass
class UNet2DOutput(Output):
    """What the UNet returns: its prediction (B, out_channels, H, W)."""

    sample: Tensor


class UNet2DModel(UNet):
    """Predict noise (or v, or x0, as the checkpoint was trained) from a noisy picture and the time.

    Keyword arguments are the fields of the Hub's ``config.json``, with the reference's defaults.

    Raises:
        ConfigError: naming each field that is unknown or has a value that is not implemented.
    """

    def __init__(self, **fields: Any) -> None:
        config = unconditional_unet_config(fields)
        super().__init__(config, unconditional_unet_spec(config))

    def _make_embeddings(self) -> None:
        config, C = self.config, self.config.block_out_channels[0]
        self.time_proj = None
        if config.time_embedding_type == "fourier":
            self.time_proj = FourierFeatures(C)
        elif config.time_embedding_type == "learned":
            self.time_proj = nn.Embedding(config.num_train_timesteps, C)
        super()._make_embeddings()
        self.class_embed = None
        if config.class_embed_type == "timestep":
            self.class_embed = TimeMLP(self.spec.time_features, self.spec.E)
        elif config.class_embed_type == "identity":
            self.class_embed = nn.Identity()
        elif config.num_class_embeds is not None:
            self.class_embed = nn.Embedding(config.num_class_embeds, self.spec.E)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict from a noisy picture.

        Args:
            sample: noisy pictures, (B, in_channels, H, W), any H and W.
            timestep: one time for all, or (B,) times; 0 is nearly clean, 999 nearly pure noise. A network with Fourier
                features is told noise levels, above 0, and its prediction is divided by them.
            class_labels: one class for all, or (B,) classes: numbers of the embedding table, or with
                ``class_embed_type="timestep"`` any numbers, which are encoded as times are. With "identity" the
                embeddings themselves, (B, E). Only for networks that have classes, and needed by them.
            return_dict: whether to return a record or a tuple.

        Raises:
            ValueError: on a shape or a time that does not fit, and if labels are missing or have no place.
        """
        self._check_sample(sample)
        t = self._times(sample, timestep)
        temb = self.time_embed(self._encode_times(t).to(sample.dtype))
        if self.class_embed is not None or class_labels is not None:
            temb = temb + self._class(sample, class_labels)
        x = self._body(sample, temb)
        if self.config.time_embedding_type == "fourier":
            x = (x / t.reshape(-1, 1, 1, 1)).to(x.dtype)  # score = -eps / sigma: t is the noise level in such networks
        return UNet2DOutput(x) if return_dict else (x,)

    def _times(self, sample: Tensor, timestep: Tensor | float | int) -> Tensor:
        """Return one time per sample, (B,), on its device."""
        if isinstance(timestep, float):
            if not timestep.is_integer():
                raise ValueError(
                    f"timestep {timestep}: {NAME} of the reference drops the fraction of a Python number; pass "
                    f"torch.tensor({timestep}) to keep it, or int({timestep}) to drop it"
                )
            timestep = int(timestep)
        return super()._times(sample, timestep)

    def _encode_times(self, t: Tensor) -> Tensor:
        """Encode times (B,) as features (B, time_features)."""
        if self.time_proj is None:
            return super()._encode_times(t)
        if self.config.time_embedding_type == "learned":
            _check_indices("timestep", t, self.config.num_train_timesteps)
        elif t.device.type == "cpu" and not bool((t > 0).all()):  # elsewhere, looking would wait for the device
            raise ValueError(f"Fourier features need times above 0, because they use the logarithm: found {t.tolist()}")
        return self.time_proj(t)

    def _class(self, sample: Tensor, labels: Tensor | None) -> Tensor:
        """Return the class embedding, (B, E) or (1, E)."""
        if self.class_embed is None:
            raise ValueError("class_labels given to a network without classes (num_class_embeds, class_embed_type)")
        if labels is None:
            raise ValueError("class_labels are needed: this network was trained with classes")
        identity = self.config.class_embed_type == "identity"
        width = (self.spec.E,) if identity else ()
        if labels.shape not in ((1, *width), (len(sample), *width)):
            raise ValueError(f"class_labels should be {(len(sample), *width)}, found {tuple(labels.shape)}")
        if identity:
            labels = labels.to(sample.dtype)
        elif self.config.class_embed_type == "timestep":
            labels = self._encode_times(labels).to(sample.dtype)
        else:
            _check_indices("class_labels", labels, self.config.num_class_embeds)
        return self.class_embed(labels)

    def rows(self) -> list[Row]:
        """Return the name table of this configuration: ours, Hub, and the Hub's again for single files."""
        return unconditional_unet_rows(self.spec, self.config)

    @classmethod
    def canonical_hub_name(cls, name: str) -> str | None:
        """Return the modern Hub spelling of a tensor name; None if it is dropped on purpose."""
        return canonical_unconditional_unet_name(name)


def _check_indices(name: str, values: Tensor, count: int) -> None:
    """Raise if ``values`` are not row numbers of a table with ``count`` rows."""
    if values.is_floating_point():
        raise TypeError(f"{name} should be integers from 0 to {count - 1}, found {values.dtype}")
    if values.device.type == "cpu" and not bool(((values >= 0) & (values < count)).all()):
        raise ValueError(f"{name} should be from 0 to {count - 1}, found {values.tolist()}")


# type -> (has pixel attention, changes the resolution in a residual block; None: as down/upsample_type says)
_DOWN_BLOCKS = {
    "DownBlock2D": (False, False),
    "AttnDownBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, True),
}
_UP_BLOCKS = {"UpBlock2D": (False, False), "AttnUpBlock2D": (True, None), "ResnetUpsampleBlock2D": (False, True)}


def unconditional_unet_config(fields: Mapping[str, Any]) -> Config:
    """Complete the fields of an unconditional UNet's Hub configuration; refuse what is not implemented."""
    defaults = {
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
    counts = {  # each a positive integer or null
        "attention_head_dim": 8,
        "attn_norm_num_groups": None,
        "num_class_embeds": None,
        "num_train_timesteps": None,
        "time_embedding_dim": None,
    }
    only = {
        "time_embedding_type": ("positional", "fourier", "learned"),
        "mid_block_type": ("UNetMidBlock2D", None),
        "downsample_type": ("conv", "resnet"),
        "upsample_type": ("conv", "resnet"),
        "act_fn": ("silu", "swish"),  # two names of one function
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "class_embed_type": (None, "timestep", "identity"),
    }
    config = complete(NAME, fields, defaults | counts, only)
    check_types(NAME, config, defaults)
    for name in counts:
        value = config[name]
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f"{NAME}: {name} should be a positive integer or null, found {value!r}")
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
    if config.downsample_padding not in (0, 1):
        raise ConfigError(f"{NAME}: downsample_padding should be 0 or 1, found {config.downsample_padding}")
    if not 0 <= config.dropout <= 1 or config.mid_block_scale_factor == 0:
        raise ConfigError(
            f"{NAME}: dropout should be from 0 to 1 and mid_block_scale_factor not 0, found {config.dropout} and "
            f"{config.mid_block_scale_factor}"
        )
    if groups < 1 or any(C % groups for C in channels):
        raise ConfigError(f"{NAME}: block_out_channels {channels} should be divisible by norm_num_groups {groups}")
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
        mid=config.mid_block_type is not None,
        mid_pixel_attn=mid_attn,
        mid_groups=mid_groups,
        mid_scale=config.mid_block_scale_factor,
        scale_shift=scale_shift,
        dropout=config.dropout,
    )


def _levels(config: Config, mid_attn: bool) -> Iterator[Level]:
    """Yield one record per level, from the finest to the coarsest."""
    channels = config.block_out_channels
    count = len(channels)
    down = _block_kinds("down_block_types", config.down_block_types, _DOWN_BLOCKS, count)
    up = _block_kinds("up_block_types", config.up_block_types, _UP_BLOCKS, count)[::-1]
    layers = per_level(NAME, "layers_per_block", config.layers_per_block, count)
    for i, C in enumerate(channels):
        (attn, res_down), (up_attn, res_up) = down[i], up[i]
        attends = attn or up_attn or (mid_attn and i == count - 1)
        yield Level(
            channels=C,
            layers=layers[i],
            depth=0,
            up_depth=0,
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


def _block_kinds(
    field: str, types: list[str], known: Mapping[str, tuple[bool, bool | None]], count: int
) -> list[tuple[bool, bool | None]]:
    """Look the block types up; `UNetRes` before a name is a spelling of 2022."""
    names = [block.removeprefix("UNetRes") for block in types]
    if len(names) != count or any(name not in known for name in names):
        raise ConfigError(
            f"{NAME}: {field} should be {count} of {', '.join(known)}, one per entry of block_out_channels; found "
            f"{types}"
        )
    return [known[name] for name in names]


show_fields(UNet2DModel.__init__, unconditional_unet_config({}))
