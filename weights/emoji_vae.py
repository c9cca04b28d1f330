"""Train the autoencoder of emoji64: 64x64 pictures <-> 16x16 latents of 4 channels.

    loss = |y - x|  +  |grad y - grad x|  +  w KL(q(z | x) || N(0, 1))

with y the decoded sample of the posterior. The gradient term (differences of neighbouring pixels) keeps edges sharp,
which the mean absolute error alone does not ask for. The weight w is tiny: it keeps the latents bounded, no more.

Latent diffusion, Rombach et al. 2022 (https://arxiv.org/abs/2112.10752), section 3.1, without its perceptual and
adversarial terms, which need a second network.
"""

import argparse
import math

import torch
from emoji_data import read_emoji, read_pictures, to_float
from muon import optimisers_for
from run_state import Log, Run, descend, learning_rate, step_generator, zero_last_layers
from torch import Tensor

from minidiff import AutoencoderKL

CONFIG = {
    "sample_size": 64,
    "block_out_channels": [24, 48, 96],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "scaling_factor": 1.0,  # `whiten` folds the scale into the 1x1 convolutions around the latents
    "force_upcast": False,
}
KL_WEIGHT = 1e-4


def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the differences of neighbouring pixels, to the right and downwards."""
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def loss_of(vae: AutoencoderKL, x: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the training loss of a batch and its mean squared error in pixels of [-1, 1]."""
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample(rng)).sample
    edges = sum((a - b).abs().mean() for a, b in zip(gradient(y), gradient(x), strict=True))
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    return (y - x).abs().mean() + edges + KL_WEIGHT * kl, (y - x).square().mean()


def psnr(mse: float) -> float:
    """Return the peak signal-to-noise ratio in dB of a mean squared error between pictures in [-1, 1]."""
    return 10 * math.log10(4 / mse)


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: Tensor, batch: int = 32) -> Tensor:
    """Encode and decode uint8 pictures; return floats in [-1, 1]."""
    return torch.cat([vae(to_float(x)).sample.clamp(-1, 1) for x in pictures.split(batch)])


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor, batch: int = 32) -> Tensor:
    """Return the most likely latents of uint8 pictures, (N, 4, 16, 16)."""
    return torch.cat([vae.encode(to_float(x)).latent_dist.mode() for x in pictures.split(batch)])


@torch.no_grad()
def whiten(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Give each latent channel mean 0 and deviation 1 over ``pictures``, without changing what is decoded.

    z' = (z - m) / s is a 1x1 convolution, as are the layers on both sides of the latents, so it is folded into them:
    a diffusion model starts from N(0, 1) noise, and latents of the same size suit it best.
    """
    z = encode(vae, pictures)
    m, s = z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    means = slice(0, len(m))
    quant.bias[means] = (quant.bias[means] - m) / s
    quant.weight[means] /= s[:, None, None, None]
    quant.bias[len(m) :] -= 2 * s.log()  # the log-variance of z / s
    post.bias += post.weight[:, :, 0, 0] @ m
    post.weight *= s[None, :, None, None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the settings of this stage."""
    parser.add_argument("--steps", type=int, default=430, help="a resumed run may change it; the rate follows")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3, help="of AdamW")
    parser.add_argument("--muon-lr", type=float, default=2e-2)


def train(args: argparse.Namespace) -> None:
    """Train the autoencoder, whiten its latents, and write it to ``RUN/vae/vae``."""
    torch.set_flush_denormal(True)  # dying activations otherwise slow a CPU down many times
    torch.manual_seed(args.seed)
    folder = args.run / "vae"
    pictures = read_pictures(args.data, read_emoji(args.data))
    vae = AutoencoderKL(**CONFIG)
    zero_last_layers(vae, ("conv2", "attn.out"))
    vae.to(memory_format=torch.channels_last)
    optimisers, peaks = optimisers_for(vae, args.lr, args.muon_lr), {"adamw": args.lr, "muon": args.muon_lr}
    run, log = Run(folder, {"vae": vae}, optimisers), Log(folder)
    log.write({"settings": vars(args)})

    for step in range(run.resume(), args.steps):
        rng = step_generator(args.seed, step)
        chosen = torch.randperm(len(pictures), generator=rng)[: args.batch]
        x = to_float(pictures[chosen]).contiguous(memory_format=torch.channels_last)
        loss, mse = loss_of(vae, x, rng)
        vae.zero_grad()
        loss.backward()
        rates = {name: learning_rate(peak, step, args.steps, warmup=20) for name, peak in peaks.items()}
        descend(list(vae.parameters()), optimisers, rates)
        log.add(step, loss=[loss.item()], mse=[mse.item()])
        if (step + 1) % 250 == 0 or step + 1 == args.steps:
            run.save(step + 1)

    whiten(vae, pictures)
    error = (reconstruct(vae, pictures) - to_float(pictures)).square().mean().item()
    vae.eval().to(memory_format=torch.contiguous_format).save_pretrained(folder / "vae")
    log.write({"step": args.steps, "psnr_of_all_pictures": psnr(error)})
