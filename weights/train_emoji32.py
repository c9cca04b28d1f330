"""Train emoji32-ddpm, the unconditional checkpoint that minidiff carries: 32x32 emoji out of nothing but noise.

    x_t  = alpha_t x0 + sigma_t noise              alpha_t^2 = alpha_bar_t, sigma_t^2 = 1 - alpha_bar_t
    v    = alpha_t noise - sigma_t x0
    loss = |unet(x_t, t) - v|^2                    for a random t

The process and the network are those of Ho et al. 2020 (DDPM, https://arxiv.org/abs/2006.11239); the network predicts
v (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512), which unlike the noise says something about the picture where
there is only noise, and the betas follow a cosine (Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, eq. 17),
because linear ones waste their last steps on pictures as small as these. A run resumes where it was interrupted::

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz     # gives package/
    torchrun --nproc-per-node 2 weights/train_emoji32.py train --data package
    python weights/train_emoji32.py export --to runs/emoji32/export
    python -m weights.emoji32_quality --model runs/emoji32/export --json runs/emoji32/quality.json
    python weights/train_emoji32.py export --to weights/emoji32-ddpm                           # card with the quality
"""

import argparse
import copy
import json
from pathlib import Path

import torch
import torch.nn.functional as F
import workers
from emoji_data import PACKAGE, read_emoji, read_pictures, to_float
from muon import optimisers_for
from run_state import (
    Log,
    Run,
    batch_of,
    descend,
    learning_rate,
    loss_table,
    read_log,
    settings_line,
    step_generator,
    update_average,
    zero_last_layers,
)
from safetensors import safe_open
from torch import Tensor

from minidiff import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from minidiff.images.tensors import make_image_grid

SIZE = 32
UNET = {
    "sample_size": SIZE,
    "block_out_channels": [48, 80, 112, 160],
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 16,
    "norm_num_groups": 16,
}
SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
KINDS = ("Smileys & Emotion",)  # few enough pictures to be learned by so small a network
EMA = 0.998
EARLIER = 2450  # steps of the published weights that came before these settings; the card says how they differed
CARD = Path(__file__).with_name("emoji32_card.md")


def shrink(pictures: Tensor) -> Tensor:
    """Turn pictures (N, 3, 64, 64) uint8 into the network's (N, 3, 32, 32) in [-1, 1]: the mean of every 2x2 pixels."""
    return F.adaptive_avg_pool2d(to_float(pictures), SIZE)


def spread_timesteps(count: int, T: int, rng: torch.Generator) -> Tensor:
    """Draw one timestep below ``T`` from each of ``count`` equally probable parts of the range, (count,).

    The density is proportional to t: what the picture is gets decided where there is much noise. The loss of a batch
    varies less than with independent draws, because it always holds all noise levels (Kingma et al. 2021,
    https://arxiv.org/abs/2107.00630, appendix I.1).
    """
    u = (torch.arange(count) + torch.rand(1, generator=rng)) / count
    return (T * u.sqrt()).long().clamp(max=T - 1)  # the square root of a uniform number u has density 2 u


def prediction_loss(unet: UNet2DModel, scheduler: DDPMScheduler, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return the squared error of the predicted v, one number per picture (B,).

    The network computes in bfloat16, which is a third faster on this CPU; weights and gradients stay in float32.
    """
    x = scheduler.add_noise(x0, noise, t).contiguous(memory_format=torch.channels_last)
    v = scheduler.get_velocity(x0, noise, t)
    with torch.autocast("cpu", torch.bfloat16):
        out = unet(x, t).sample
    return (out.float() - v).square().mean(dim=(1, 2, 3))


def draw(unet: UNet2DModel, path: Path, count: int = 32, steps: int = 25) -> None:
    """Write a sheet of pictures from a fixed seed, to see how far the training is."""
    pipe = DDIMPipeline(unet, DDPMScheduler(**SCHEDULE))
    pipe.set_progress_bar_config(disable=True)
    images = pipe(count, num_inference_steps=steps, seed=0).images
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images, rows=count // 8, cols=8).save(path)


def train(args: argparse.Namespace) -> None:
    """Train the UNet on the pictures; every ``--draw-every`` steps a sheet drawn with it goes to ``RUN/samples``."""
    workers.start()
    torch.set_flush_denormal(True)  # dying activations otherwise slow a CPU down many times
    torch.manual_seed(args.seed)
    pictures = shrink(read_pictures(args.data, [e for e in read_emoji(args.data) if e.category in KINDS]))
    scheduler = DDPMScheduler(**SCHEDULE)
    unet = UNet2DModel(**UNET)
    zero_last_layers(unet, ("conv2", "attn.out", "conv_out"))
    unet.to(memory_format=torch.channels_last)
    average = copy.deepcopy(unet).requires_grad_(False)
    parameters = list(unet.parameters())
    optimisers, peaks = optimisers_for(unet, args.lr, args.muon_lr), {"adamw": args.lr, "muon": args.muon_lr}
    run, log = Run(args.run, {"live": unet, "average": average}, optimisers), Log(args.run)
    log.write({"settings": vars(args) | {"workers": workers.WORKERS}, "pictures": len(pictures)})

    for step in range(run.resume(), args.steps):
        rng, share = step_generator(args.seed, step), slice(workers.RANK, None, workers.WORKERS)
        chosen = batch_of(step, args.batch, len(pictures), args.seed)[share]
        t = spread_timesteps(args.batch, scheduler.config.num_train_timesteps, rng)[share]
        noise = torch.randn((args.batch, *pictures.shape[1:]), generator=rng)[share]
        losses = prediction_loss(unet, scheduler, pictures[chosen], noise, t)
        unet.zero_grad()
        losses.mean().backward()
        rates = {name: learning_rate(peak, step, args.steps, warmup=100) for name, peak in peaks.items()}
        descend(parameters, optimisers, rates)
        update_average(average, unet, step, EMA)
        log.add(step, loss=losses.tolist())
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            run.save(step + 1)
        if (step + 1) % args.draw_every == 0 and workers.RANK == 0:
            draw(average, args.run / "samples" / f"{step + 1:05d}.png")
    workers.finish()


def export(args: argparse.Namespace) -> None:
    """Write the pipeline with the averaged weights in float16, and its card.

    The card's settings, losses and quality are read from the run's files, so they cannot differ from what was done.
    """
    unet, prefix = UNet2DModel(**UNET), "network/average."
    with safe_open(args.run / "state.safetensors", "pt") as opened:
        names = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118 (it is not a dict)
        unet.load_state_dict({name.removeprefix(prefix): opened.get_tensor(name) for name in names})
        steps = int(opened.metadata()["step"])
    DDPMPipeline(unet.eval(), DDPMScheduler(**SCHEDULE)).to(torch.float16).save_pretrained(args.to)
    (args.to / "README.md").write_text(card(unet, args.run, steps), encoding="utf-8")


def card(unet: UNet2DModel, run: Path, steps: int) -> str:
    """Fill in the card: what is in the braces of ``emoji32_card.md``."""
    log, count = read_log(run), sum(p.numel() for p in unet.parameters())
    settings = next(record["settings"] for record in reversed(log) if "settings" in record)
    pictures = next(record["pictures"] for record in reversed(log) if "pictures" in record)
    return CARD.read_text(encoding="utf-8").format(
        package=PACKAGE,
        pictures=f"{pictures:,}",
        size=f"{count / 1e6:.2f} M parameters, {2 * count / 1e6:.1f} MB in float16",
        settings=settings_line(log),
        steps=f"{steps:,}",
        batch=settings["batch"],
        epochs=round((steps - EARLIER) * settings["batch"] / pictures),
        ema=EMA,
        torch=torch.__version__,
        losses=loss_table(log, ("loss",), rows=16),
        quality=_quality(run / "quality.json"),
    )


def _quality(path: Path) -> str:
    """Return a table of what ``weights/emoji32_quality.py`` measured."""
    if not path.exists():
        return "not measured yet"
    found = json.loads(path.read_text(encoding="utf-8"))
    table = [("sampler", "copies", "median distance", f"pictures of the data met by {found['pictures']}")]
    table += [("---", "---:", "---:", "---:")]
    for run in found["runs"]:
        row = f"{run['pipeline']}, {run['steps']} steps", f"{run['copies']:.1%}", f"{run['distance']:.3f}", run["met"]
        table.append(row)
    table.append(("among the data, all kinds", "", f"{found['distance_in_data']:.3f}", ""))
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in table)


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    trains = stages.add_parser("train", help="train the UNet")
    add = trains.add_argument
    add("--data", type=Path, required=True, help="the unpacked npm package emoji-datasource-google")
    add("--seed", type=int, default=0)
    add("--steps", type=int, default=2600, help="a resumed run may change it; the rate follows")
    add("--batch", type=int, default=96, help="of all workers together")
    add("--lr", type=float, default=2e-3, help="of AdamW")
    add("--muon-lr", type=float, default=2e-2)
    add("--draw-every", type=int, default=400, metavar="STEPS")
    exports = stages.add_parser("export", help="write the checkpoint")
    exports.add_argument("--to", type=Path, required=True, help="the folder to write")
    for stage in (trains, exports):
        stage.add_argument("--run", type=Path, default=Path("runs/emoji32"), help="where state and log are kept")
    args = parser.parse_args()
    {"train": train, "export": export}[args.stage](args)


if __name__ == "__main__":
    main()
