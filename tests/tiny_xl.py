"""Tiny Stable Diffusion XL checkpoints, base and refiner, with random weights, made and saved by the reference."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.theirs import diffusers, randomize, transformers
from tests.tiny import SCHEDULER, TEXT, UNET, VAE, WORDS
from tests.vocabulary import load_script

POOLED, FEATURES = 20, 8  # width of the pooled text, and of each encoded size
SECOND = TEXT | {"hidden_size": 16, "hidden_act": "gelu", "projection_dim": POOLED, "num_hidden_layers": 4}
EULER = SCHEDULER | {"timestep_spacing": "leading", "interpolation_type": "linear", "use_karras_sigmas": False}
XL_UNET = UNET | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": FEATURES,
    "use_linear_projection": True,
    "transformer_layers_per_block": [1, 2],
}
BASE_UNET = XL_UNET | {"cross_attention_dim": 24 + 16, "projection_class_embeddings_input_dim": POOLED + 6 * FEATURES}
COARSE_UNET = XL_UNET | {  # with attention where SDXL has most of it; text of UNET's width, and 12 wide pooled
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": 12 + 6 * FEATURES,
}
REFINER_UNET = XL_UNET | {"cross_attention_dim": 16, "projection_class_embeddings_input_dim": POOLED + 5 * FEATURES}


@lru_cache
def vocabulary() -> tuple[Any, Any]:
    """Return the tokens and merges of a tiny tokenizer."""
    return load_script("bpe").train_clip_bpe(WORDS, 540)


def _encoder(cls: Any, fields: dict[str, Any], seed: int) -> Any:
    return randomize(cls(transformers.CLIPTextConfig(**fields, vocab_size=len(vocabulary()[0]))), seed=seed)


def _tokenizer(pad: str) -> Any:
    vocab, merges = vocabulary()
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77, pad_token=pad)


def save_base(folder: Path, *, force_upcast: bool = False, unet: dict[str, Any] | None = None) -> Path:
    """Make a tiny SDXL base with an Euler scheduler and save it in Hub layout; return the folder."""
    diffusers.StableDiffusionXLPipeline(
        vae=randomize(diffusers.AutoencoderKL(**VAE, force_upcast=force_upcast, scaling_factor=0.13025), seed=1),
        text_encoder=_encoder(transformers.CLIPTextModel, TEXT, seed=2),
        text_encoder_2=_encoder(transformers.CLIPTextModelWithProjection, SECOND, seed=4),
        tokenizer=_tokenizer("<|endoftext|>"),
        tokenizer_2=_tokenizer("!"),
        unet=randomize(diffusers.UNet2DConditionModel(**{**BASE_UNET, **(unet or {})}), seed=3),
        scheduler=diffusers.EulerDiscreteScheduler.from_config(EULER),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def save_refiner(folder: Path, *, force_upcast: bool = False) -> Path:
    """Make a tiny SDXL refiner, which shares encoder 2 and the autoencoder of ``save_base``, and save it."""
    diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=randomize(diffusers.AutoencoderKL(**VAE, force_upcast=force_upcast, scaling_factor=0.13025), seed=1),
        text_encoder=None,
        text_encoder_2=_encoder(transformers.CLIPTextModelWithProjection, SECOND, seed=4),
        tokenizer=None,
        tokenizer_2=_tokenizer("!"),
        unet=randomize(diffusers.UNet2DConditionModel(**REFINER_UNET), seed=5),
        scheduler=diffusers.EulerDiscreteScheduler.from_config(EULER),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder
