"""The name table: every weight of every network in our spelling, the Hub's, and the original single file's.

Each generator walks an architecture once, in the order data flows through it, and emits ``(ours, hub, ldm)`` rows.
Indices only ever count forwards, so nothing has to be parsed and the inverse is a dict. What stands before the names in
a single file belongs to the file, not to the network: ``minidiff.checkpoints.original.prefixes``.

============================  =======================================  ==============================
ours                          hub (diffusers / transformers)           ldm (CompVis / Stability)
============================  =======================================  ==============================
down.0.res.1.conv1            down_blocks.0.resnets.1.conv1            input_blocks.2.0.in_layers.2
down.0.attn.1.blocks.0        down_blocks.0.attentions.1               input_blocks.2.1
  .self_attn.q                  .transformer_blocks.0.attn1.to_q         .transformer_blocks.0.attn1.to_q
mid.res.0.conv1               mid_block.resnets.0.conv1                middle_block.0.in_layers.2
up.1.resample.conv            up_blocks.1.upsamplers.0.conv            output_blocks.5.2.conv
============================  =======================================  ==============================
"""

import itertools
import re
from collections.abc import Iterator, Sequence

from minidiff.checkpoints.remap import CONV1X1, SAME, Op, Row
from minidiff.config import Config
from minidiff.networks.specs import TinyVAESpec, UNetSpec, VAESpec

_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|module)\.")  # of torch.compile and data parallelism


def unwrapped(name: str) -> str:
    """Return a tensor's name without what wrappers of modules put into it."""
    return _WRAPPERS.sub("", name)


def tensor_row(ours: str, hub: str, ldm: str, hub_op: Op = SAME, ldm_op: Op = SAME) -> Row:
    """Make the row of a tensor that has one name in each spelling."""
    return Row((ours,), (hub,), (ldm,), hub_op, ldm_op)


def layer_rows(
    ours: str, hub: str, ldm: str, *, bias: bool = True, hub_op: Op = SAME, ldm_op: Op = SAME
) -> Iterator[Row]:
    """Emit weight and bias of one layer; the ops concern the weight, a bias is laid out alike everywhere."""
    yield tensor_row(f"{ours}.weight", f"{hub}.weight", f"{ldm}.weight", hub_op, ldm_op)
    if bias:
        yield tensor_row(f"{ours}.bias", f"{hub}.bias", f"{ldm}.bias")


# --- UNet ------------------------------------------------------------------------------------------------------------

_UNET_RES = (  # ours, hub, ldm
    ("norm1", "norm1", "in_layers.0"),
    ("conv1", "conv1", "in_layers.2"),
    ("time", "time_emb_proj", "emb_layers.1"),
    ("norm2", "norm2", "out_layers.0"),
    ("conv2", "conv2", "out_layers.3"),
    ("skip", "conv_shortcut", "skip_connection"),
)


def _res_rows(ours: str, hub: str, ldm: str, parts: Sequence[tuple[str, str, str]], skip: bool) -> Iterator[Row]:
    for our_part, hub_part, ldm_part in parts:
        if our_part != "skip" or skip:
            yield from layer_rows(f"{ours}.{our_part}", f"{hub}.{hub_part}", f"{ldm}.{ldm_part}")


def _transformer_rows(ours: str, hub: str, ldm: str, depth: int, linear: bool) -> Iterator[Row]:
    """Emit a spatial transformer: below its prefix the Hub and the original file agree in everything."""

    def both(our_part: str, part: str, *, bias: bool = True, op: Op = SAME) -> Iterator[Row]:
        return layer_rows(f"{ours}.{our_part}", f"{hub}.{part}", f"{ldm}.{part}", bias=bias, hub_op=op, ldm_op=op)

    proj = SAME if linear else CONV1X1
    yield from both("norm", "norm")
    yield from both("proj_in", "proj_in", op=proj)
    for k in range(depth):
        a, b = f"blocks.{k}", f"transformer_blocks.{k}"
        for n, attn in ((1, "self_attn"), (2, "cross_attn")):
            yield from both(f"{a}.norm{n}", f"{b}.norm{n}")
            for s in "qkv":
                yield from both(f"{a}.{attn}.{s}", f"{b}.attn{n}.to_{s}", bias=False)
            yield from both(f"{a}.{attn}.out", f"{b}.attn{n}.to_out.0")
        yield from both(f"{a}.norm3", f"{b}.norm3")
        yield from both(f"{a}.mlp.fc1", f"{b}.ff.net.0.proj")
        yield from both(f"{a}.mlp.fc2", f"{b}.ff.net.2")
    yield from both("proj_out", "proj_out", op=proj)


def _pixel_attention_rows(ours: str, hub: str, ldm: str, norm: bool = True) -> Iterator[Row]:
    if norm:
        yield from layer_rows(f"{ours}.norm", f"{hub}.group_norm", f"{ldm}.norm")
    for part, hub_part, ldm_part in (
        ("q", "to_q", "q"),
        ("k", "to_k", "k"),
        ("v", "to_v", "v"),
        ("out", "to_out.0", "proj_out"),
    ):
        yield from layer_rows(f"{ours}.self_attn.{part}", f"{hub}.{hub_part}", f"{ldm}.{ldm_part}", ldm_op=CONV1X1)


def unconditional_unet_rows(spec: UNetSpec, config: Config) -> Iterator[Row]:
    """Emit the name table of an unconditional UNet.

    Its column ``ldm`` repeats ``hub``: each code base these networks came from had a file format of its own, none of
    them is in use, and all published ones were converted to the Hub's spelling.
    """
    if config.time_embedding_type != "positional":
        yield tensor_row("time_proj.weight", "time_proj.weight", "time_proj.weight")
    yield from (row.like_hub() for row in unet_rows(spec))


def _class_rows(kind: str | None) -> Iterator[Row]:
    """Emit what embeds a class; "identity" embeds nothing."""
    if kind == "table":
        yield tensor_row("class_embed.weight", "class_embedding.weight", "label_emb.weight")
    elif kind == "simple_projection":
        yield from layer_rows("class_embed", "class_embedding", "label_emb")
    elif kind in ("timestep", "projection"):
        yield from layer_rows("class_embed.fc1", "class_embedding.linear_1", "label_emb.0.0")
        yield from layer_rows("class_embed.fc2", "class_embedding.linear_2", "label_emb.0.2")


def unet_rows(spec: UNetSpec) -> Iterator[Row]:
    """Emit the name table of a UNet."""
    yield from layer_rows("time_embed.fc1", "time_embedding.linear_1", "time_embed.0")
    if spec.time_cond is not None:
        yield from layer_rows("time_embed.cond", "time_embedding.cond_proj", "time_embed.cond_proj", bias=False)
    yield from layer_rows("time_embed.fc2", "time_embedding.linear_2", "time_embed.2")
    # The original spelling has one name for the class and for XL's condition: a network with both keeps the Hub's.
    classes = _class_rows(spec.class_embed)
    yield from classes if spec.added is None else (row.like_hub() for row in classes)
    if spec.added is not None:
        yield from layer_rows("add_embed.fc1", "add_embedding.linear_1", "label_emb.0.0")
        yield from layer_rows("add_embed.fc2", "add_embedding.linear_2", "label_emb.0.2")
    yield from layer_rows("conv_in", "conv_in", "input_blocks.0.0")
    yield from _down_rows(spec)
    if spec.mid_res:
        yield from _middle_rows(spec)
    yield from _up_rows(spec)
    yield from layer_rows("norm_out", "conv_norm_out", "out.0")
    yield from layer_rows("conv_out", "conv_out", "out.2")


def _down_rows(spec: UNetSpec) -> Iterator[Row]:
    C, block = spec.levels[0].channels, 1  # the original counts its blocks through; input_blocks.0 is conv_in
    for i, lv in enumerate(spec.levels):
        ours, hub = f"down.{i}", f"down_blocks.{i}"
        for j in range(lv.layers):
            ldm = f"input_blocks.{block}"
            yield from _res_rows(f"{ours}.res.{j}", f"{hub}.resnets.{j}", f"{ldm}.0", _UNET_RES, lv.channels != C)
            attn = f"{ours}.attn.{j}", f"{hub}.attentions.{j}", f"{ldm}.1"
            yield from _attention_rows(*attn, lv.depths[j], lv.pixel_attn, spec.linear_projection)
            C, block = lv.channels, block + 1
        if i < len(spec.levels) - 1:
            resample = f"{ours}.resample", f"{hub}.downsamplers.0", f"input_blocks.{block}.0"
            yield from _resample_rows(*resample, "op", lv.res_down)
            block += 1


def _middle_rows(spec: UNetSpec) -> Iterator[Row]:
    yield from _res_rows("mid.res.0", "mid_block.resnets.0", "middle_block.0", _UNET_RES, False)
    attn = "mid.attn.0", "mid_block.attentions.0", "middle_block.1"
    normed = spec.mid_groups is not None
    yield from _attention_rows(*attn, spec.mid_depth, spec.mid_pixel_attn, spec.linear_projection, normed)
    if spec.mid_res == 2:
        yield from _res_rows("mid.res.1", "mid_block.resnets.1", "middle_block.2", _UNET_RES, False)


def _up_rows(spec: UNetSpec) -> Iterator[Row]:
    block = 0
    for i, lv in enumerate(reversed(spec.levels)):
        ours, hub = f"up.{i}", f"up_blocks.{i}"
        for j in range(lv.layers + 1):
            ldm = f"output_blocks.{block}"
            # A skip connection is concatenated to the input, so the channels always change and `skip` always exists.
            yield from _res_rows(f"{ours}.res.{j}", f"{hub}.resnets.{j}", f"{ldm}.0", _UNET_RES, True)
            attn = f"{ours}.attn.{j}", f"{hub}.attentions.{j}", f"{ldm}.1"
            yield from _attention_rows(*attn, lv.up_depths[j], lv.up_pixel_attn, spec.linear_projection)
            block += 1
        if i < len(spec.levels) - 1:  # in the original it belongs to the block before it
            behind = 2 if lv.up_depths[-1] or lv.up_pixel_attn else 1
            resample = f"{ours}.resample", f"{hub}.upsamplers.0", f"{ldm}.{behind}"
            yield from _resample_rows(*resample, "conv", lv.res_up)


def _attention_rows(
    ours: str, hub: str, ldm: str, depth: int, pixels: bool, linear: bool, normed: bool = True
) -> Iterator[Row]:
    """Emit what stands behind a residual block: a transformer, attention over the pixels, or nothing."""
    if depth:
        yield from _transformer_rows(ours, hub, ldm, depth, linear)
    if pixels:
        yield from _pixel_attention_rows(ours, hub, ldm, normed)


def _resample_rows(ours: str, hub: str, ldm: str, conv: str, by_res: bool) -> Iterator[Row]:
    """Emit a change of resolution: a convolution, which the original calls ``conv``, or a residual block."""
    if by_res:
        yield from _res_rows(ours, hub, ldm, _UNET_RES, False)
    else:
        yield from layer_rows(f"{ours}.conv", f"{hub}.conv", f"{ldm}.{conv}")


# --- Autoencoder -----------------------------------------------------------------------------------------------------

_VAE_RES = tuple(
    (part, "conv_shortcut", "nin_shortcut") if part == "skip" else (part, part, part)
    for part in ("norm1", "conv1", "norm2", "conv2", "skip")
)


def _vae_middle_rows(half: str, attention: bool) -> Iterator[Row]:
    ours, hub, ldm = f"{half}.mid", f"{half}.mid_block", f"{half}.mid"
    yield from _res_rows(f"{ours}.res.0", f"{hub}.resnets.0", f"{ldm}.block_1", _VAE_RES, False)
    if attention:
        yield from _pixel_attention_rows(f"{ours}.attn", f"{hub}.attentions.0", f"{ldm}.attn_1")
    yield from _res_rows(f"{ours}.res.1", f"{hub}.resnets.1", f"{ldm}.block_2", _VAE_RES, False)


def _vae_level_rows(side: str, i: int, ldm_i: int, channels: list[int], resample: bool) -> Iterator[Row]:
    half, way = ("encoder", "down") if side == "down" else ("decoder", "up")
    ours, hub, ldm = f"{half}.{way}.{i}", f"{half}.{way}_blocks.{i}", f"{half}.{way}.{ldm_i}"
    for j, (C_in, C_out) in enumerate(itertools.pairwise(channels)):
        yield from _res_rows(f"{ours}.res.{j}", f"{hub}.resnets.{j}", f"{ldm}.block.{j}", _VAE_RES, C_in != C_out)
    if resample:
        yield from layer_rows(f"{ours}.resample.conv", f"{hub}.{way}samplers.0.conv", f"{ldm}.{way}sample.conv")


def vae_rows(spec: VAESpec, config: Config) -> Iterator[Row]:
    """Emit the name table of an autoencoder."""
    last = len(spec.channels) - 1

    def same(name: str) -> Iterator[Row]:
        return layer_rows(name, name, name)

    def out(half: str) -> Iterator[Row]:
        yield from layer_rows(f"{half}.norm_out", f"{half}.conv_norm_out", f"{half}.norm_out")
        yield from same(f"{half}.conv_out")

    yield from same("encoder.conv_in")
    for i, C in enumerate(spec.channels):
        channels = [spec.channels[max(i - 1, 0)]] + [C] * spec.layers
        yield from _vae_level_rows("down", i, i, channels, i < last)
    yield from _vae_middle_rows("encoder", spec.mid_attention)
    yield from out("encoder")
    if config.use_quant_conv:
        yield from same("quant_conv")
    if config.use_post_quant_conv:
        yield from same("post_quant_conv")

    yield from same("decoder.conv_in")
    yield from _vae_middle_rows("decoder", spec.mid_attention)
    up = spec.channels[::-1]
    for i, C in enumerate(up):
        channels = [up[max(i - 1, 0)]] + [C] * (spec.layers + 1)
        yield from _vae_level_rows("up", i, last - i, channels, i < last)  # the original counts from the finest level
    yield from out("decoder")


# --- Tiny autoencoder ------------------------------------------------------------------------------------------------

_BARE_TINY = re.compile(r"(en|de)coder\.(?=\d)")


def tiny_vae_rows(spec: TinyVAESpec) -> Iterator[Row]:
    """Emit the name table of a tiny autoencoder, whose modules are called as on the Hub.

    Its column ``ldm`` is ComfyUI's, TAESD's own with a word before it. There the clamp of latents is a layer, too.
    """
    for half, layers, first in (("encoder", spec.encoder, 0), ("decoder", spec.decoder, 1)):
        for i, kind in enumerate(layers):
            parts = {"block": (".conv.0", ".conv.2", ".conv.4"), "act": (), "up": ()}.get(kind, ("",))
            for part in parts:
                hub, ldm = f"{half}.layers.{i}{part}", f"taesd_{half}.{i + first}{part}"
                yield from layer_rows(hub, hub, ldm, bias=kind not in ("down", "conv"))


def canonical_tiny_vae_name(name: str) -> str:
    """Return ComfyUI's spelling of a tensor in a file of TAESD's own names; other names as they are."""
    return f"taesd_{name}" if _BARE_TINY.match(name) else name


# --- Older spellings on the Hub --------------------------------------------------------------------------------------

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.15
_OLD_ATTENTION_NAME = re.compile(r"(.*\battentions\.\d+\.)(query|key|value|proj_attn)(\.(?:weight|bias))")
_LIKE_HUB = re.compile(r"(.*\.attn_1\.)(to_[qkv]|to_out\.0|query|key|value|proj_attn)(\.(?:weight|bias))")
_ORIGINAL = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def canonical_vae_name(name: str) -> str:
    """Return the modern spelling of an autoencoder's tensor, whose attention has old names or those of the other side.

    Unconditional UNets have the same attention.
    """
    if match := _OLD_ATTENTION_NAME.fullmatch(name):
        return f"{match[1]}{_OLD_ATTENTION[match[2]]}{match[3]}"
    if match := _LIKE_HUB.fullmatch(name):
        return f"{match[1]}{_ORIGINAL[_OLD_ATTENTION.get(match[2], match[2])]}{match[3]}"
    return name
