"""Train the text encoder and the UNet of emoji64, together and from nothing, on the latents of the autoencoder.

    x_t  = alpha_t x0 + sigma_t noise              alpha_t^2 = alpha_bar_t, sigma_t^2 = 1 - alpha_bar_t
    v    = alpha_t noise - sigma_t x0
    loss = |UNet(x_t, t, text) - v|^2              for a random t; the text is sometimes empty

v-prediction (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512) asks for the picture itself where there is only
noise, which is where the text decides what the picture is. With linear betas the last third of the timesteps is so.
The first half of the training therefore prefers those. Dropping the text is what classifier-free guidance needs
(Ho & Salimans 2022, https://arxiv.org/abs/2207.12598).
"""

import argparse
import copy
import random

import torch
import workers
from bpe import train_clip_bpe
from emoji_data import Emoji, read_emoji, read_pictures
from emoji_vae import encode
from muon import optimisers_for
from run_state import (
    Log,
    Run,
    batch_of,
    descend,
    learning_rate,
    step_generator,
    update_average,
    zero_last_layers,
)
from torch import Tensor, nn

from minidiff import AutoencoderKL, CLIPTextModel, CLIPTokenizer, DDPMScheduler, UNet2DConditionModel

LENGTH = 24  # tokens of a prompt, the two special ones included; the longest name needs 16
VOCABULARY = 2000
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": LENGTH,
    "hidden_act": "quick_gelu",
    "bos_token_id": VOCABULARY - 2,
    "eos_token_id": VOCABULARY - 1,
    "pad_token_id": VOCABULARY - 1,
}
UNET = {
    "sample_size": 16,
    "block_out_channels": [32, 64, 192],
    "down_block_types": ["DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 4,  # the number of heads, as in every Hub file of a conditional UNet
    "cross_attention_dim": TEXT["hidden_size"],
    "norm_num_groups": 16,
    "use_linear_projection": True,
}
SCHEDULE = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "v_prediction"}

TEXT_ONLY = 700  # from this timestep on the noise hides the picture: what is right comes from the text
EMPTY_TEXT = 0.10  # of the samples have no text
NAME = 0.65  # of the samples have their name; the rest one of the other captions
EMA = 0.995


def tokenizer_for(emoji: list[Emoji]) -> CLIPTokenizer:
    """Train a vocabulary on every text of the data."""
    vocab, merges = train_clip_bpe((text for e in emoji for text in (e.name, *e.captions)), VOCABULARY)
    return CLIPTokenizer(vocab, merges, model_max_length=LENGTH)


class Captions:
    """The token ids of every text, and the draw of one text per picture."""

    def __init__(self, emoji: list[Emoji], tokenizer: CLIPTokenizer) -> None:
        texts = ["", *(text for e in emoji for text in (e.name, *e.captions))]
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids
        self.empty, self.ids = ids[0], list(ids[1:].split([1 + len(e.captions) for e in emoji]))

    def draw(self, chosen: list[int], rng: random.Random) -> Tensor:
        """Return the token ids of one text for each of the ``chosen`` pictures, (B, L)."""
        return torch.stack([self._one(self.ids[i], rng.random(), rng) for i in chosen])

    def _one(self, ids: Tensor, u: float, rng: random.Random) -> Tensor:
        if u < EMPTY_TEXT:
            return self.empty
        return ids[0] if u < EMPTY_TEXT + NAME else ids[rng.randrange(1, len(ids))]


def draw_timesteps(count: int, T: int, late: bool, rng: torch.Generator) -> Tensor:
    """Draw timesteps below ``T``: uniformly, or ``late`` ones more often, with a density proportional to t.

    The square root of a uniform number u has density 2 u on [0, 1].
    """
    u = torch.rand(count, generator=rng)
    return (T * (u.sqrt() if late else u)).long().clamp(max=T - 1)


def prediction_loss(
    networks: nn.ModuleDict, scheduler: DDPMScheduler, x0: Tensor, noise: Tensor, t: Tensor, ids: Tensor
) -> Tensor:
    """Return the squared error of the predicted v, one number per sample (B,)."""
    x = scheduler.add_noise(x0, noise, t).contiguous(memory_format=torch.channels_last)
    v = scheduler.get_velocity(x0, noise, t)
    out = networks["unet"](x, t, networks["text_encoder"](ids).last_hidden_state).sample
    return (out - v).square().mean(dim=(1, 2, 3))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the settings of this stage."""
    parser.add_argument("--steps", type=int, default=2400, help="a resumed run may change it; the rate follows")
    parser.add_argument("--batch", type=int, default=96, help="of all workers together")
    parser.add_argument("--lr", type=float, default=2e-3, help="of AdamW")
    parser.add_argument("--muon-lr", type=float, default=2e-2)


def train(args: argparse.Namespace) -> None:
    """Train the text encoder and the UNet on the latents of the autoencoder in ``RUN/vae/vae``."""
    workers.start()
    torch.set_flush_denormal(True)  # dying activations otherwise slow a CPU down many times
    torch.manual_seed(args.seed)
    folder, emoji = args.run / "denoiser", read_emoji(args.data)
    tokenizer = tokenizer_for(emoji)
    captions = Captions(emoji, tokenizer)
    latents = encode(AutoencoderKL.from_pretrained(args.run / "vae" / "vae"), read_pictures(args.data, emoji))
    scheduler = DDPMScheduler(**SCHEDULE)
    networks = nn.ModuleDict({"text_encoder": CLIPTextModel(TEXT), "unet": UNet2DConditionModel(**UNET)})
    zero_last_layers(networks["unet"], ("conv2", "proj_out", "conv_out"))
    networks.to(memory_format=torch.channels_last)
    average = copy.deepcopy(networks).requires_grad_(False)
    parameters = list(networks.parameters())
    optimisers, peaks = optimisers_for(networks, args.lr, args.muon_lr), {"adamw": args.lr, "muon": args.muon_lr}
    run, log = Run(folder, {"live": networks, "average": average}, optimisers), Log(folder)
    log.write({"settings": vars(args) | {"workers": workers.WORKERS}})

    for step in range(run.resume(), args.steps):
        rng, share = step_generator(args.seed, step), slice(workers.RANK, None, workers.WORKERS)
        chosen = batch_of(step, args.batch, len(emoji), args.seed)
        ids = captions.draw(chosen, random.Random(args.seed * 1_000_003 + step))[share]
        T, late = scheduler.config.num_train_timesteps, step < args.steps // 2  # first what to draw, then how
        t = draw_timesteps(args.batch, T, late, rng)[share]
        noise = torch.randn((args.batch, *latents.shape[1:]), generator=rng)[share]
        losses = prediction_loss(networks, scheduler, latents[chosen[share]], noise, t, ids)
        networks.zero_grad()
        losses.mean().backward()
        rates = {name: learning_rate(peak, step, args.steps, warmup=100) for name, peak in peaks.items()}
        descend(parameters, optimisers, rates)
        update_average(average, networks, step, EMA)
        text_only = losses[(t >= TEXT_ONLY) & (ids != captions.empty).any(dim=1)]
        log.add(step, loss=losses.tolist(), loss_text_only=text_only.tolist())
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            run.save(step + 1)
    workers.finish()
