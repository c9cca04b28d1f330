"""torch.compile takes the UNet and the decoder as one graph each; what a compiler makes of it is torch's business."""

import torch

import minidiff
from tests.tiny import UNET, VAE


@torch.no_grad()
def test_one_graph_each():
    unet, vae = minidiff.UNet2DConditionModel(**UNET).eval(), minidiff.AutoencoderKL(**VAE).eval()
    x, t, ctx = torch.randn(2, 4, 8, 8), torch.tensor(7), torch.randn(2, 5, 24)
    expected = unet(x, t, ctx).sample, vae.decode(x).sample
    unet.compile(backend="eager", fullgraph=True)  # fullgraph: an error where the graph would break
    decode = torch.compile(vae.decode, backend="eager", fullgraph=True)
    assert torch.equal(unet(x, t, ctx).sample, expected[0])
    assert torch.equal(decode(x).sample, expected[1])
