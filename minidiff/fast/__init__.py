"""Faster forwards for the same networks. Nothing here changes weights, names or results beyond rounding.

``optimize`` replaces the ``forward`` of single modules: of every module object, not of its class. Their parameters stay
where they are, so saving, adapters and hooks work as before; ``restore`` takes the replacements out again.

    part                    what is saved                                                          where
    packed.py               laying out weights at every call                                       CPU
    winograd.py             5/9 of the multiplications of 3x3 convolutions, 3/4 of the upsampling  CPU, float32
    convolutions.py         5/9 of the upsampling                                                  CPU, bfloat16
    attention.py            time outside the matrix products                                       CPU
    feed_forward.py         memory traffic of the feed-forward layers                              CPU
    strips.py               memory traffic of the autoencoder's large maps                         CPU
    memo.py                 keys and values of the text, time embeddings, at every step; the first
                            layers for the second text of guidance                                 everywhere
    memory format           shuffling pixels and channels around every convolution                 GPU

The core does not know of this: what is computed here is what the methods of its classes say.
"""

import torch

from minidiff.checkpoints.model import Model
from minidiff.fast.attention import FastAttention
from minidiff.fast.convolutions import FastConv, FastUpsample
from minidiff.fast.feed_forward import FastFeedForward
from minidiff.fast.memo import FastRes, FastResTime, FastTime
from minidiff.fast.packed import FastLinear
from minidiff.fast.strips import FastLevel
from minidiff.fast.unchanged import Fast
from minidiff.networks.clip import CLIPTransformer
from minidiff.networks.unet import UNet2DConditionModel
from minidiff.networks.vae import AutoencoderKL

ON_ANY_DEVICE: tuple[type[Fast], ...] = (FastAttention,)
ON_CPU: tuple[type[Fast], ...] = (FastLinear, FastConv, FastFeedForward, FastUpsample, FastLevel)
IN_A_RUN: tuple[type[Fast], ...] = (FastTime, FastResTime, FastRes)


def optimize(network: Model) -> None:
    """Make a network of minidiff faster in inference where it is now; in training it computes as before.

    A network that goes to another device works there too, but is as fast as it can be after another ``optimize``.
    """
    if isinstance(network, CLIPTransformer):
        return  # is asked once; packing its weights would take as long
    restore(network)
    on_cpu = next(network.parameters()).device.type == "cpu"
    # On a GPU a step takes as long as Python takes to ask for it: what would only pass the call on is left out.
    ways = ON_ANY_DEVICE + (ON_CPU if on_cpu else ()) + (IN_A_RUN if isinstance(network, UNet2DConditionModel) else ())
    keep = not isinstance(network, AutoencoderKL)
    for module in network.modules():
        for way in ways:
            if type(module) is way.kind and way.method not in vars(module):  # what someone else put there stays
                setattr(module, way.method, way(module, keep))
    if not on_cpu:
        network.to(memory_format=torch.channels_last)


def restore(network: Model) -> None:
    """Take out what ``optimize`` put in."""
    for module in network.modules():
        for name in [name for name, value in vars(module).items() if isinstance(value, Fast)]:
            delattr(module, name)
