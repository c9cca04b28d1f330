"""torch.compile takes the UNet and the decoder as one graph each; what a compiler makes of it is torch's business."""

import pytest
import torch

import minidiff
from minidiff.fast import optimize
from minidiff.threads import computing
from tests.fast_ways import a_run
from tests.tiny import UNET, VAE


@torch.no_grad()
@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
def test_one_graph_each(optimized):
    """Also in a run, and optimized: the graph is then that of the network as it is written."""
    unet, vae = minidiff.UNet2DConditionModel(**UNET).eval(), minidiff.AutoencoderKL(**VAE).eval()
    x, t, ctx = torch.randn(2, 4, 8, 8), torch.tensor(7), torch.randn(2, 5, 24)
    expected = unet(x, t, ctx).sample, vae.decode(x).sample
    if optimized:
        optimize(unet), optimize(vae)
    unet.compile(backend="eager", fullgraph=True)  # fullgraph: an error where the graph would break
    decode = torch.compile(vae.decode, backend="eager", fullgraph=True)
    assert torch.equal(unet(x, t, ctx).sample, expected[0])
    torch.compiler.reset()
    with computing(a_run(x[:1], t, passes=2)):
        assert torch.equal(unet(x, t, ctx).sample, expected[0])
    assert torch.equal(decode(x).sample, expected[1])
