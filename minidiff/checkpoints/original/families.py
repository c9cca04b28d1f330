"""The published models that single files hold: how each is told from the names and shapes in a file, and configured.

A single file says nothing about its architecture. What tells the families apart is the width D of the text that the
UNet's cross-attention reads, and the number of channels C of its input:

======================  =====  ===================================================================
D                       C      family
======================  =====  ===================================================================
768 (CLIP-L)            4      Stable Diffusion 1.x
1024 (OpenCLIP-H)       4      Stable Diffusion 2.x, 512 pixels and epsilon, or 768 pixels and v
2048 (CLIP-L + bigG)    4      Stable Diffusion XL base
1280 (OpenCLIP-bigG)    4      Stable Diffusion XL refiner
as above                9      inpainting: latent, mask (1), masked picture (4)
as above                8      instructions (InstructPix2Pix): latent, picture to edit (4)
1024 (OpenCLIP-H)       7      upscaler: latent, small picture (3)
======================  =====  ===================================================================

Networks that were pruned are told by how much they have left, residual blocks and attentions to the text. All other
numbers are those of a whole network, of which some may be missing.
Those that were trained as EDM has it look the same: numbers among the weights tell them (``MARKED``).
"""

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from minidiff.checkpoints.names import unwrapped
from minidiff.checkpoints.original.configs import PackagedConfigs
from minidiff.checkpoints.original.prefixes import EMA, UNET, VAE, ema_name
from minidiff.checkpoints.original.strangers import outside
from minidiff.errors import CheckpointError

PREDICTIONS = ("epsilon", "v_prediction", "sample")
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"  # empty tensors: the UNet predicts v, and was trained with zero terminal SNR


class Family(NamedTuple):
    """One kind of checkpoint; ``configs`` maps what the UNet predicts to the published model that does so.

    ``left`` is how many residual blocks and attentions to the text the UNet has, if it was pruned.
    """

    title: str
    ctx: int
    channels: int
    configs: Mapping[str, str]
    left: tuple[int, int] | None = None


FAMILIES = (
    Family("Stable Diffusion 1.x", 768, 4, {"epsilon": "stable-diffusion-v1-5"}),
    Family("Stable Diffusion 1.x inpainting", 768, 9, {"epsilon": "stable-diffusion-inpainting"}),
    Family("Stable Diffusion 1.x InstructPix2Pix", 768, 8, {"epsilon": "instruct-pix2pix"}),
    Family(
        "Stable Diffusion 2.x",
        1024,
        4,
        {"epsilon": "stable-diffusion-2-1-base", "v_prediction": "stable-diffusion-2-1"},
    ),
    Family("Stable Diffusion 2.x inpainting", 1024, 9, {"epsilon": "stable-diffusion-2-inpainting"}),
    Family("Stable Diffusion XL", 2048, 4, {"epsilon": "stable-diffusion-xl-base-1.0"}),
    Family("Stable Diffusion XL inpainting", 2048, 9, {"epsilon": "stable-diffusion-xl-1.0-inpainting-0.1"}),
    Family("Stable Diffusion XL InstructPix2Pix", 2048, 8, {"epsilon": "sdxl-instructpix2pix-768"}),
    Family("Stable Diffusion XL refiner", 1280, 4, {"epsilon": "stable-diffusion-xl-refiner-1.0"}),
    Family("Stable Diffusion x4 upscaler", 1024, 7, {"v_prediction": "stable-diffusion-x4-upscaler"}),
    Family("SSD-1B, a pruned Stable Diffusion XL", 2048, 4, {"epsilon": "SSD-1B"}, (16, 34)),
    Family("Segmind Vega, a pruned Stable Diffusion XL", 2048, 4, {"epsilon": "Segmind-Vega"}, (16, 15)),
    Family("KOALA-700M, a pruned Stable Diffusion XL", 2048, 4, {"epsilon": "koala-700m"}, (9, 21)),
    Family("KOALA-1B, a pruned Stable Diffusion XL", 2048, 4, {"epsilon": "koala-1b"}, (11, 30)),
    Family("tiny-sd or BK-SDM-Tiny, a pruned Stable Diffusion 1.x", 768, 4, {"epsilon": "tiny-sd"}, (9, 9)),
    Family("small-sd or BK-SDM-Base, a pruned Stable Diffusion 1.x", 768, 4, {"epsilon": "small-sd"}, (14, 10)),
    Family("SDXS-512 DreamShaper, a pruned Stable Diffusion 1.x", 768, 4, {"epsilon": "sdxs-512-dreamshaper"}, (9, 6)),
    Family("SDXS-512-0.9, a pruned Stable Diffusion 2.x", 1024, 4, {"epsilon": "sdxs-512-0.9"}, (9, 12)),
)
MARKED = (  # a tensor that tells a family from that of the same widths; see minidiff.checkpoints.original.edm
    (
        "edm_mean",
        Family("Playground 2.5 (Stable Diffusion XL, EDM)", 2048, 4, {"epsilon": "playground-v2.5-1024px-aesthetic"}),
    ),
    ("edm_vpred.sigma_max", Family("CosXL (Stable Diffusion XL, EDM)", 2048, 4, {"v_prediction": "cosxl"})),
    (
        "edm_vpred.sigma_max",
        Family("CosXL Edit (Stable Diffusion XL InstructPix2Pix, EDM)", 2048, 8, {"v_prediction": "cosxl-edit"}),
    ),
)
AUTOENCODER = Family("autoencoder of Stable Diffusion", 0, 0, {"epsilon": "stable-diffusion-v1-5"})
TINY_AUTOENCODER = Family("tiny autoencoder of Stable Diffusion (TAESD)", 0, 0, {"epsilon": "taesd"})

_CROSS_KEYS = re.compile(r".*attn2\.?to_k\.?weight")  # a moving average has no dots in its names
_RES_KEYS, _KEYS = re.compile(r".*(emb_layers\.?1|time_emb_proj)\.?weight"), re.compile(r".*attn[12]\.?to_k\.?weight")
_HUB_SPELLING = re.compile(r"(down_blocks|mid_block|up_blocks|(en|de)coder\.(down|up)_blocks)\..*")
_TINY = re.compile(r"\b(taesd_)?(en|de)coder\.(layers\.)?\d+\.(conv|weight)")
_STRANGERS = {  # names that only other kinds of files have -> what they are and what reads them; see also strangers.py
    r"lora_(unet|te\d?)_.*|lycoris_.*|.*\.lora_(A|B|up|down)\..*|.*\.lora\.(up|down)\..*": (
        "a LoRA: load the model that it belongs to, then call pipe.load_lora_weights(file)"
    ),
    r"em[bp]_params(_out)?|string_to_param\..*|clip_[lg](_out)?|text_encoders_[01]": (
        "a textual inversion: load the model that it belongs to, then call pipe.load_textual_inversion(file)"
    ),
}


def recognise(shapes: Mapping[str, tuple[int, ...]], unet: str | None, where: str) -> Family:
    """Return the family of a file with tensors of these names and shapes.

    Args:
        shapes: by name, as in the file.
        unet: what stands before the UNet's names in the file, None if it holds no UNet but an autoencoder.
        where: the file's name, for messages.

    Raises:
        CheckpointError: if it is none that minidiff knows, saying what was found.
    """
    if found := next(filter(_HUB_SPELLING.fullmatch, shapes), None):
        raise CheckpointError(
            f"{where} is in the Hub's spelling (it has {found}): put it beside its config.json and call "
            "from_pretrained with the folder, or pass config=FOLDER"
        )
    families = candidates(shapes)
    if unet is None and families is FAMILIES:
        if (channels := _latent_channels(shapes)) not in (None, 4):
            raise CheckpointError(
                f"{where} is an autoencoder of {channels} channels (those of Stable Diffusion 3 and Flux have 16), "
                "which is of no family that minidiff implements; config= may name a folder that describes it"
            )
        return TINY_AUTOENCODER if any(map(_TINY.search, shapes)) else AUTOENCODER
    convs = ("input_blocks.0.0.weight", "conv_in.weight")
    names = [name for conv in convs for name in ((unet or "") + conv, ema_name(conv))]
    first = next((name for name in names if name in shapes), names[0])
    widths = Counter(shape[1] for name, shape in shapes.items() if _CROSS_KEYS.fullmatch(name) and len(shape) == 2)
    ctx = widths.most_common(1)[0][0] if widths else None
    channels = shapes[first][1] if len(shapes.get(first, ())) == 4 else 4  # its absence is reported with the others
    if family := family_of(ctx, channels, shapes):
        return family
    whole = [family for family in families if family.left is None]
    known = ", ".join(f"{family.title} ({family.ctx}, {family.channels})" for family in whole)
    raise CheckpointError(
        f"{where} is no checkpoint that minidiff knows: its UNet reads a text of width {ctx} (attn2.to_k.weight) and "
        f"{channels} channels ({first}). Known are {known}. If it is a variant of one of them, pass config= with a "
        "folder or Hub id in diffusers layout that describes it"
    )


def family_of(ctx: int | None, channels: int | None, shapes: Mapping[str, tuple[int, ...]]) -> Family | None:
    """Return the family of a UNet that reads such a text and so many channels, and has tensors of these shapes."""
    names = [name for name in shapes if not name.startswith(EMA)]
    names = names if any(map(_RES_KEYS.fullmatch, names)) else list(shapes)  # a moving average alone
    text = [name for name in names if _KEYS.fullmatch(name) and shapes[name][1:] == (ctx,)]
    left = sum(_RES_KEYS.fullmatch(name) is not None for name in names), len(text)
    fits = {family.left: family for family in candidates(shapes) if (family.ctx, family.channels) == (ctx, channels)}
    return fits.get(left) or fits.get(None)


def _latent_channels(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the number of channels of an autoencoder's latents; None if there is no decoder."""
    ends = "decoder.conv_in.weight"
    return next((shape[1] for name, shape in shapes.items() if name.endswith(ends) and len(shape) == 4), None)


def candidates(names: Container[str]) -> Sequence[Family]:
    """Return the families that a file with tensors of these names may be of: marked ones, or those without a mark."""
    return [family for mark, family in MARKED if mark in names] or FAMILIES


def stranger(names: Iterable[str], but: str = "") -> str | None:
    """Say what a file is that is no checkpoint of a family here, by a name that gives it away; None if it may be one.

    ``but`` is how the description of the kind begins that is looked for and no stranger, such as "a LoRA".
    """
    names = list(names)
    if what := outside(names):
        return what
    for pattern, what in _STRANGERS.items():
        if but and what.startswith(but):
            continue
        if found := next((name for name in names if re.fullmatch(pattern, name)), None):
            return f"{what} (it has {found})"
    return None


def no_adapter(names: Iterable[str], wanted: str) -> str | None:
    """Say what a file is that should be an adapter of the kind ``wanted`` ("a LoRA"), None if that is unknown."""
    names = [unwrapped(name) for name in names]
    if what := stranger(names, wanted):
        return what
    if any(name.startswith((UNET, VAE, "cond_stage_model.", "conditioner.")) for name in names):
        return "a checkpoint: load it with from_single_file"
    if any(_HUB_SPELLING.fullmatch(name) and "lora" not in name for name in names):
        return "a network in the Hub's spelling: put it beside its config.json and call from_pretrained"
    return None


def told_prediction(names: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """Return what the UNet of a file predicts if the file says so, else None.

    It may say so in its metadata, by the ModelSpec convention (``modelspec.prediction_type`` is "epsilon" or "v"), or
    with an empty tensor ``v_pred``.
    """
    said = metadata.get("modelspec.prediction_type", "").lower()
    told = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction", "sample": "sample"}.get(said)
    return told or ("v_prediction" if V_MARK in names else None)


def checked_prediction(asked: str | None) -> str | None:
    """Return what the caller asked for. Raises ``ValueError`` if it is unknown."""
    if asked not in (None, *PREDICTIONS):
        raise ValueError(f"prediction_type should be one of {', '.join(PREDICTIONS)}, found {asked!r}")
    return asked


def scheduler_changes(fields: Mapping[str, Any], prediction: str | None, zero_snr: bool) -> dict[str, Any]:
    """Return the fields that a scheduler of this configuration needs otherwise for what a file says of its UNet."""
    changes: dict[str, Any] = {}
    if prediction is not None and fields.get("prediction_type", "epsilon") != prediction:
        changes["prediction_type"] = prediction
    if zero_snr and not fields.get("rescale_betas_zero_snr") and "sigma_data" not in fields:  # EDM has no betas
        changes["rescale_betas_zero_snr"] = True
    return changes


def choose_prediction(family: Family, asked: str | None, told: str | None, where: str, ask: bool = True) -> str | None:
    """Return what the UNet predicts: what the caller asked for, else what the file says, else what the family does.

    If nobody says it and the family has both (Stable Diffusion 2.x), it is None if ``ask`` is False.

    Raises:
        ValueError: in that case if ``ask`` is True, or if ``asked`` is unknown.
    """
    prediction = checked_prediction(asked) or told
    if prediction is None and len(family.configs) > 1:
        if not ask:
            return None
        raise ValueError(
            f"{where} is {family.title}, and nothing in it says what its UNet predicts: pass "
            "prediction_type='v_prediction' for models of 768 pixels (768-v-ema, v2-1_768), or "
            "prediction_type='epsilon' for those of 512 (512-base-ema, v2-1_512, SD-Turbo); the wrong one draws noise"
        )
    return prediction or next(iter(family.configs))


def config_of(family: Family, prediction: str | None) -> PackagedConfigs:
    """Return the packaged configuration of a family whose UNet predicts ``prediction``; the first if there is none."""
    return PackagedConfigs(family.configs.get(str(prediction), next(iter(family.configs.values()))))
