"""Tiny DDPM checkpoints with random weights, made and saved by the reference."""

from pathlib import Path
from typing import Any

from tests.theirs import diffusers, randomize

UNET = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


def save_tiny(folder: Path, unet: dict[str, Any] | None = None, **scheduler: Any) -> Path:
    """Make a tiny reference pipeline with a DDPM scheduler and save it in Hub layout; return the folder."""
    network = randomize(diffusers.UNet2DModel(**UNET | (unet or {})), seed=3)
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler(**scheduler)).save_pretrained(folder)
    return folder
