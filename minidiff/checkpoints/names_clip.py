"""The name table of CLIP, continuing ``names``: encoders of texts and of pictures, and the safety checker."""

import re
from collections.abc import Iterable, Iterator

from minidiff.checkpoints.names import layer_rows, tensor_row
from minidiff.checkpoints.remap import SAME, STACKED, TRANSPOSED, Row
from minidiff.networks.specs import CLIPSpec, CLIPVisionSpec

# Hub tensors that are not weights of a CLIP text encoder, by the pattern of their name.
CLIP_DROPPED = {
    r"(text_model\.)?embeddings\.position_ids": "a constant 0..76, saved as a buffer by transformers before 4.31",
    r"vision_model\..*|visual_projection\..*|logit_scale": "the picture half of a whole CLIP checkpoint",
    r"text_projection\.weight": "CLIPTextModel returns the state before the projection; the model with it keeps this",
}

VISION_DROPPED = {
    r"(vision_model\.)?embeddings\.position_ids": "a constant 0, 1, 2..., saved by transformers before 4.31",
    r"text_model\..*|text_projection\..*|logit_scale": "the text half of a whole CLIP checkpoint",
    r"visual_projection\.weight": "CLIPVisionModel returns the state before the projection; the one with it keeps this",
}


def clip_rows(spec: CLIPSpec, projection: bool = False) -> Iterator[Row]:
    """Emit the name table of a CLIP text encoder; with ``projection``, to the space shared with pictures.

    Its column ``ldm`` is OpenCLIP's spelling (SD 2.x, second encoder of SDXL), with q, k and v in one matrix. The files
    of encoders of the other kind (SD 1.x, first encoder of SDXL) have transformers' names, which are the Hub's.
    """
    hub = "text_model.embeddings"
    yield tensor_row("token_embed.weight", f"{hub}.token_embedding.weight", "token_embedding.weight")
    yield tensor_row("position_embed.weight", f"{hub}.position_embedding.weight", "positional_embedding")
    for i in range(spec.layers):
        yield from _clip_layer_rows(f"layers.{i}", f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}")
    yield from layer_rows("norm_out", "text_model.final_layer_norm", "ln_final")
    if projection:
        yield tensor_row("text_projection.weight", "text_projection.weight", "text_projection", ldm_op=TRANSPOSED)


def clip_vision_rows(spec: CLIPVisionSpec, projection: bool = False) -> Iterator[Row]:
    """Emit the name table of a CLIP vision encoder, the column ``ldm`` in OpenCLIP's spelling."""
    own, parts = "vision_model", ("class_embedding", "patch_embedding.weight", "position_embedding.weight")
    for part, ldm in zip(parts, ("class_embedding", "conv1.weight", "positional_embedding"), strict=True):
        yield tensor_row(f"{own}.embeddings.{part}", f"{own}.embeddings.{part}", f"visual.{ldm}")
    yield from layer_rows(f"{own}.norm_in", f"{own}.pre_layrnorm", "visual.ln_pre")
    for i in range(spec.layers):
        names = f"{own}.layers.{i}", f"{own}.encoder.layers.{i}", f"visual.transformer.resblocks.{i}"
        yield from _clip_layer_rows(*names)
    yield from layer_rows(f"{own}.norm_out", f"{own}.post_layernorm", "visual.ln_post")
    if projection:
        yield tensor_row("visual_projection.weight", "visual_projection.weight", "visual.proj", ldm_op=TRANSPOSED)


def _clip_layer_rows(ours: str, hub: str, ldm: str) -> Iterator[Row]:
    yield from layer_rows(f"{ours}.norm1", f"{hub}.layer_norm1", f"{ldm}.ln_1")
    for kind in ("weight", "bias"):
        three = (
            tuple(f"{ours}.attn.{s}.{kind}" for s in "qkv"),
            tuple(f"{hub}.self_attn.{s}_proj.{kind}" for s in "qkv"),
        )
        yield Row(*three, (f"{ldm}.attn.in_proj_{kind}",), SAME, STACKED)
    yield from layer_rows(f"{ours}.attn.out", f"{hub}.self_attn.out_proj", f"{ldm}.attn.out_proj")
    yield from layer_rows(f"{ours}.norm2", f"{hub}.layer_norm2", f"{ldm}.ln_2")
    yield from layer_rows(f"{ours}.fc1", f"{hub}.mlp.fc1", f"{ldm}.mlp.c_fc")
    yield from layer_rows(f"{ours}.fc2", f"{hub}.mlp.fc2", f"{ldm}.mlp.c_proj")


def checker_rows(spec: CLIPVisionSpec) -> Iterator[Row]:
    """Emit the name table of a safety checker, whose vision encoder is a whole network in the published files.

    It has no other spelling: the column ``ldm`` repeats ``hub``.
    """
    for row in clip_vision_rows(spec, projection=True):
        nested = tuple(f"vision_model.{name}" if name.startswith("vision_model.") else name for name in row.hub)
        yield row._replace(hub=nested).like_hub()
    for kind in ("concept", "special_care"):
        for name in (f"{kind}_embeds", f"{kind}_embeds_weights"):
            yield tensor_row(name, name, name)


def canonical_clip_name(name: str, *, projection: bool = False) -> str | None:
    """Return the modern Hub spelling of a text encoder's tensor; None for those in ``CLIP_DROPPED``.

    With ``projection`` the encoder has the projection to the space shared with pictures, and its tensor is kept.
    """
    return _of_half("text", name, CLIP_DROPPED, projection)


def canonical_vision_name(name: str, *, projection: bool = False) -> str | None:
    """Return the same of a vision encoder's tensor; None for those in ``VISION_DROPPED``."""
    return _of_half("visual", name, VISION_DROPPED, projection)


def _of_half(half: str, name: str, dropped: Iterable[str], projection: bool) -> str | None:
    if projection and name == f"{half}_projection.weight":
        return name
    if any(re.fullmatch(pattern, name) for pattern in dropped):
        return None
    own = {"text": "text_model.", "visual": "vision_model."}[half]
    return name if name.startswith(own) else own + name  # transformers 5 writes no prefix


def canonical_checker_name(name: str) -> str | None:
    """Return the modern Hub spelling of a safety checker's tensor, None for a constant."""
    if name.startswith("vision_model."):
        inner = canonical_vision_name(name.removeprefix("vision_model."))
        return None if inner is None else f"vision_model.{inner}"
    return name
