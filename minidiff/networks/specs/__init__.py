"""What the networks and their name tables are built from: one record each.

The Hub describes an architecture by parallel lists (``block_out_channels``, ``down_block_types``,
``attention_head_dim``, ...). The modules of this folder complete and check such a configuration (``*_config``), and
turn it once into a record (``*_spec``), in which each level stands as a whole.
"""

from typing import NamedTuple


class LevelSpec(NamedTuple):
    """One resolution of a UNet, on the way down and on the way up."""

    channels: int
    depths: tuple[int, ...]  # transformer blocks behind each residual block on the way down; 0 = none
    up_depths: tuple[int, ...]  # the same on the way up, which has one residual block more
    heads: int
    D_ctx: int  # width of the text embeddings this level attends to
    only_cross: bool = False  # the self-attention of its transformers looks at the text too, not at the pixels
    attn_width: int | None = None  # of all heads over the pixels together; None = channels
    pixel_attn: bool = False  # self-attention over the pixels behind each residual block on the way down
    up_pixel_attn: bool = False  # the same on the way up
    res_down: bool = False  # halve the resolution in a residual block instead of a strided convolution
    res_up: bool = False  # double it in a residual block instead of before a convolution

    @property
    def layers(self) -> int:
        """How many residual blocks the way down has."""
        return len(self.depths)


class UNetSpec(NamedTuple):
    """What a UNet is built from; ``levels`` run from the finest to the coarsest."""

    in_channels: int
    out_channels: int
    levels: tuple[LevelSpec, ...]
    mid_depth: int
    groups: int
    eps: float
    linear_projection: bool  # how checkpoints store proj_in / proj_out; the product is the same
    downsample_padding: int
    time_features: int  # width of what the time is encoded as
    E: int  # width of the time embedding made of it
    mid_res: int = 2  # residual blocks of the middle, 0 to 2; 0 = there is no middle
    mid_pixel_attn: bool = False
    mid_groups: int | None = None  # of the norm before the middle's pixel attention; None = no norm
    mid_scale: float = 1.0  # what residual blocks and pixel attention of the middle divide by
    scale_shift: bool = False  # how residual blocks are told the time, see ResBlock
    dropout: float = 0.0
    added: int | None = None  # width of the added condition of SDXL, pooled text and encoded sizes; None = none
    added_features: int = 0  # width of each encoded size in it
    time_cond: int | None = None  # width of the encoded guidance scale that the network is told; None = it is not told
    class_embed: str | None = None  # how a class is embedded, see ``Classes``; None = the network knows none
    class_width: int = 0  # rows of the table of classes, or width of the vectors that are projected
    class_concat: bool = False  # put the class beside the time instead of adding it
    in_kernel: int = 3  # height and width of the first convolution
    out_kernel: int = 3  # and of the last


class VAESpec(NamedTuple):
    """What the two halves of an autoencoder are built from."""

    in_channels: int
    out_channels: int
    latent_channels: int
    channels: tuple[int, ...]  # one entry per resolution level, finest first
    layers: int  # residual blocks per level in the encoder; the decoder has one more
    groups: int  # of the group normalisation
    mid_attention: bool


class TinyVAESpec(NamedTuple):
    """The layers of the two halves of a tiny autoencoder, in the order in which they compute.

    ``in``, ``conv`` and ``out`` are 3x3 convolutions; ``down`` is one that halves the resolution, ``up`` makes it
    larger, ``act`` is an activation alone and ``block`` three convolutions with a residual connection.
    """

    encoder: tuple[str, ...]
    decoder: tuple[str, ...]


class CLIPSpec(NamedTuple):
    """What a CLIP text encoder is built from."""

    D: int
    mlp: int  # width of the hidden layer of the feed-forward networks
    layers: int
    heads: int
    vocabulary: int
    positions: int  # the longest text, in tokens
    activation: str
    eps: float


class CLIPVisionSpec(NamedTuple):
    """What a CLIP vision encoder is built from."""

    D: int
    mlp: int  # width of the hidden layer of the feed-forward networks
    layers: int
    heads: int
    activation: str
    eps: float
    channels: int  # of pictures
    image: int  # height and width of pictures, in pixels
    patch: int  # height and width of the square that becomes one token

    @property
    def grid(self) -> int:
        """Patches along each side; pixels that are left over at the right and below are not seen."""
        return self.image // self.patch
