"""Tiny Stable Diffusion checkpoints with random weights, made and saved by the reference."""

from pathlib import Path
from typing import Any

from tests.theirs import diffusers, randomize, transformers
from tests.vocabulary import load_script

WORDS = ["a smiling face", "red heart", "the red dragon's face", "two cats and 3 dogs", "blue sky over green hills"]

UNET = {
    "sample_size": 8,
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
VAE = {
    "sample_size": 32,
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "norm_num_groups": 4,
}
TEXT = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 77,
    "eos_token_id": 2,
    "bos_token_id": 0,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def save_tiny(folder: Path, *, unet: dict[str, Any] | None = None, scheduler: dict[str, Any] | None = None) -> Path:
    """Make a tiny reference pipeline with a PNDM scheduler and save it in Hub layout; return the folder."""
    bpe = load_script("bpe")
    vocab, merges = bpe.train_clip_bpe(WORDS, 540)
    text = transformers.CLIPTextConfig(**TEXT, vocab_size=len(vocab))
    pipe = diffusers.StableDiffusionPipeline(
        vae=randomize(diffusers.AutoencoderKL(**VAE), seed=1),
        text_encoder=randomize(transformers.CLIPTextModel(text), seed=2),
        tokenizer=transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77),
        unet=randomize(diffusers.UNet2DConditionModel(**{**UNET, **(unet or {})}), seed=3),
        scheduler=diffusers.PNDMScheduler(**{**SCHEDULER, **(scheduler or {})}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder
