"""What the tests of the optimized networks share: tiny networks on which every fast way is taken."""

from types import SimpleNamespace

import torch

VAE = {
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "norm_num_groups": 4,
}
UNET = {
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


def random(network, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.2)
    return network


def a_run(latents, t, passes):
    """Return what an optimized network looks at of a run of one step: ``with computing(run): unet(...)``."""
    return SimpleNamespace(plan=SimpleNamespace(timesteps=t[None]), step=0, passes=passes, latents=latents)


def error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()
