"""Whole calls of a pipeline of published size: prompt to picture, with random weights.

    component       Stable Diffusion 1.5, float32      SDXL, bfloat16
    UNet            3.4 GB                             5.1 GB
    text            0.5 GB                             1.6 GB
    autoencoder     0.3 GB                             0.2 GB

The pipelines of all settings share their weights as ``Settings`` describes: on the CPU, channels_last needs 2.6 GB more
for Stable Diffusion 1.5 and packing 3.4 GB. With libraries and all, 11.3 GB were seen at 128x128 pixels; for
SDXL in bfloat16 13.7 GB. In float32 SDXL would take 28 GB, so that on 24 GB a setting is left out.

The tokenizer is that of the embedded checkpoint, whose ids are below those of the published vocabulary; the time does
not depend on which words they are. The sampler is Euler's, which asks the UNet once a step.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import diffusers
import torch
import transformers

import minidiff
from benchmarks.speed.networks import WORKS, build_text, build_unet, build_vae, count
from benchmarks.speed.settings import Settings, has
from benchmarks.speed.timing import Measured, in_turn, name_of
from minidiff.embedded import embedded_checkpoint

PROMPT = "a red apple on a wooden table"
EULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
GUIDANCE = 7.5
WARM = {"cpu": 2, "cuda": 4}  # steps of the run that does not count: a CUDA graph is replayed from the third on


@torch.no_grad()
def pipelines(
    family: str, dtype: torch.dtype, device: torch.device, *, compiled: bool = False, only: Sequence[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Return a pipeline for every setting, and what is to be said about those that are left out.

    Compiled are the UNets; the autoencoders beside them are in channels_last.
    """
    options = {"compiled": compiled, "only": only}
    parts = {
        "unet": build_unet(family, dtype, device, **options),
        "vae": build_vae(family, dtype, device, **options, methods=()),
    }
    sides = {name.split(",")[0] for name in parts["unet"].networks}
    texts = [part for part in ("text_encoder", "text_encoder_2") if has(family, part)]
    for part in texts:
        parts[part] = build_text(family, dtype, device, part, only=tuple(sides))
    pipes = {name: _pipeline(name, parts, texts) for name in parts["unet"].networks if name in parts["vae"].networks}
    return pipes, [note for part in parts.values() for note in part.notes]


def _pipeline(setting: str, parts: dict[str, Settings], texts: Sequence[str]) -> Any:
    """Put the networks of a setting together."""
    side = setting.split(",")[0]
    library, tokenizer = (minidiff, minidiff) if side == "ours" else (diffusers, transformers)
    words = tokenizer.CLIPTokenizer.from_pretrained(embedded_checkpoint() / "tokenizer")
    components = {name: part.networks[side if name in texts else setting] for name, part in parts.items()}
    components |= {name.replace("text_encoder", "tokenizer"): words for name in texts}
    components["scheduler"] = library.EulerDiscreteScheduler(**EULER)
    if len(texts) == 2:
        pipe = library.StableDiffusionXLPipeline(**components, add_watermarker=False)
    else:
        nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = library.StableDiffusionPipeline(**components, **nothing)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, device: torch.device, steps: int, batch: int, side: int) -> Any:
    """Call a pipeline for pictures whose latents have that side."""
    pixels = side * pipe.vae_scale_factor
    return pipe(
        [PROMPT] * batch,
        height=pixels,
        width=pixels,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator(device).manual_seed(0),
    )


def whole_runs(
    family: str,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    side: int,
    *,
    steps: int = 20,
    batch: int = 1,
    compiled: bool = False,
) -> Iterator[Measured | str]:
    """Time whole calls in every setting, after a short one of each that does not count."""
    if compiled:
        torch.compiler.reset()
    pipes, notes = pipelines(family, dtype, device, compiled=compiled)
    for name, pipe in list(pipes.items()):
        try:
            draw(pipe, device, WARM[device.type], batch, side)
        except Exception as error:
            if "compiled" not in name:
                raise
            notes.append(f"{name!r} is left out: {type(error).__name__}: {error}"[:400])
            del pipes[name]
    runs = {name: partial(draw, pipe, device, steps, batch, side) for name, pipe in pipes.items()}
    figures = in_turn(runs, rounds, device, warmups=0)
    flop = steps * count(WORKS["unet"], family, batch, side) + count(WORKS["decode"], family, batch, side)
    what = f"{family} whole run, {batch} x {8 * side}x{8 * side}, {steps} steps"
    yield Measured("whole", what, name_of(dtype), figures, flop=flop)
    yield from (f"{what}, {name_of(dtype)}: {note}" for note in notes)
