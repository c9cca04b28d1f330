"""Write emoji64 as a checkpoint in Hub layout, float16, with its model card.

The card's settings, losses and quality are read from the logs of the run, so they cannot differ from what was done.
"""

import argparse
import json
from pathlib import Path

import torch
from emoji_data import PACKAGE, read_emoji
from emoji_denoiser import EMA, EMPTY_TEXT, NAME, SCHEDULE, TEXT, TEXT_ONLY, UNET, tokenizer_for
from run_state import loss_table, read_log, settings_line
from safetensors import safe_open
from torch import nn

from minidiff import (
    AutoencoderKL,
    CLIPTextModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

# Fields that UniPC does not have, for schedulers made from its configuration: latents go beyond [-1, 1] and must not be
# clipped, and PNDM needs no Runge-Kutta start. They are those of Stable Diffusion's own files.
OTHER_SCHEDULERS = {"clip_sample": False, "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
CARD = Path(__file__).with_name("emoji_card.md")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the settings of this stage."""
    parser.add_argument("--to", type=Path, required=True, help="the folder to write")


def export(args: argparse.Namespace) -> None:
    """Write the pipeline with the averaged weights in float16, and its card."""
    emoji = read_emoji(args.data)
    networks, steps = averaged_networks(args.run / "denoiser" / "state.safetensors")
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(args.run / "vae" / "vae"),
        text_encoder=networks["text_encoder"],
        tokenizer=tokenizer_for(emoji),
        unet=networks["unet"],
        scheduler=UniPCMultistepScheduler.from_config(SCHEDULE | OTHER_SCHEDULERS),
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(args.to)
    (args.to / "README.md").write_text(card(pipe, args.run, len(emoji), steps), encoding="utf-8")


def averaged_networks(state: Path) -> tuple[nn.ModuleDict, int]:
    """Return the averaged text encoder and UNet of a run, and the steps they were trained for."""
    networks = nn.ModuleDict({"text_encoder": CLIPTextModel(TEXT), "unet": UNet2DConditionModel(**UNET)})
    prefix = "network/average."
    with safe_open(state, "pt") as opened:
        names = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118 (it is not a dict)
        networks.load_state_dict({name.removeprefix(prefix): opened.get_tensor(name) for name in names})
        return networks.eval(), int(opened.metadata()["step"])


def card(pipe: StableDiffusionPipeline, run: Path, pictures: int, steps: int) -> str:
    """Fill in the card: what is in the braces of ``emoji_card.md``."""
    logs = {stage: read_log(run / stage) for stage in ("vae", "denoiser")}
    networks = {"autoencoder": pipe.vae, "text encoder": pipe.text_encoder, "UNet": pipe.unet}
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    return CARD.read_text(encoding="utf-8").format(
        package=PACKAGE,
        pictures=pictures,
        sizes=", ".join(f"{name} {count / 1e6:.2f} M" for name, count in sizes.items()),
        total=f"{sum(sizes.values()) / 1e6:.1f} M parameters, {2 * sum(sizes.values()) / 1e6:.1f} MB in float16",
        psnr=f"{next(r['psnr_of_all_pictures'] for r in reversed(logs['vae']) if 'psnr_of_all_pictures' in r):.1f}",
        vae_settings=settings_line(logs["vae"]),
        denoiser_settings=settings_line(logs["denoiser"]),
        denoiser_steps=steps,
        name=f"{NAME:.0%}",
        empty=f"{EMPTY_TEXT:.0%}",
        ema=EMA,
        text_only=TEXT_ONLY,
        torch=torch.__version__,
        vae_losses=loss_table(logs["vae"], ("loss", "mse"), rows=8),
        denoiser_losses=loss_table(logs["denoiser"], ("loss", "loss_text_only"), rows=16),
        quality=_quality(run / "quality.json"),
    )


def _quality(path: Path) -> str:
    """Return a sentence with what ``weights/emoji_quality.py`` measured."""
    if not path.exists():
        return "not measured yet"
    found = json.loads(path.read_text(encoding="utf-8"))
    return (
        f"**{found['at_64']:.1%}** compared at 64x64 and **{found['at_16']:.1%}** at 16x16 "
        f"({found['names']} names, {found['steps']} UniPC steps, guidance {found['guidance']})"
    )
