"""Single networks of the published configurations with random weights: text encoder, UNet step, VAE decode and encode.

An optimized UNet is timed as the pipeline asks it after its first step: the text and the times are in the memo, and one
sample meets two texts.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import minidiff
from benchmarks.speed.settings import Settings, empty, fields_of, has
from benchmarks.speed.timing import Measured, in_turn, name_of
from minidiff.threads import computing

diffusers.utils.logging.set_verbosity_error()
Use = Callable[[nn.Module, str], Any]  # what is timed: gets the network and the setting
TOKENS = 77
SIZES = 6  # that SDXL is conditioned on


class Work(NamedTuple):
    """Something that a network does: how its settings are made, and what is asked of them.

    ``build(family, dtype, device, **options)`` makes the ``Settings`` with their options;
    ``use(family, dtype, device, batch, side)`` makes the inputs for pictures whose latents have that side; ``plain``
    builds theirs without weights, to count operations.
    """

    part: str
    what: str
    build: Callable[..., Settings]
    use: Callable[..., Use]
    plain: Callable[[str], nn.Module]


def plain_unet(family: str) -> nn.Module:
    """Build the reference's UNet."""
    return diffusers.UNet2DConditionModel.from_config(fields_of(family, "unet"))


def build_unet(family: str, dtype: torch.dtype, device: torch.device, **options: Any) -> Settings:
    """Make a UNet in every setting."""
    theirs = empty(lambda: plain_unet(family), dtype, device)
    return Settings(minidiff.UNet2DConditionModel, theirs, fields_of(family, "unet"), **options)


def step(family: str, dtype: torch.dtype, device: torch.device, batch: int, side: int) -> Use:
    """Return a step under guidance: every sample meets two texts."""
    return step_of(fields_of(family, "unet"), dtype, device, batch, side)


def step_of(fields: dict[str, Any], dtype: torch.dtype, device: torch.device, batch: int, side: int) -> Use:
    """Return the same for any configuration of a UNet."""
    x = torch.randn(batch, fields["in_channels"], side, side, device=device, dtype=dtype)
    ctx = torch.randn(2 * batch, TOKENS, fields["cross_attention_dim"], device=device, dtype=dtype)
    t, options = torch.tensor(501, device=device), {}
    if fields.get("addition_embed_type") == "text_time":
        P = fields["projection_class_embeddings_input_dim"] - SIZES * fields["addition_time_embed_dim"]
        conditions = torch.randn(2 * batch, P), torch.full((2 * batch, SIZES), 8.0 * side)
        names = ("text_embeds", "time_ids")
        added = {n: c.to(device, dtype) for n, c in zip(names, conditions, strict=True)}
        options["added_cond_kwargs"] = added
    run = SimpleNamespace(plan=SimpleNamespace(timesteps=t[None]), step=0, passes=2, latents=x)

    def use(unet: nn.Module, setting: str) -> Tensor:
        if setting != "ours, optimized":
            return unet(torch.cat([x, x]), t, ctx, **options)[0]
        with computing(run):
            return unet(torch.cat([x, x]), run.plan.timesteps[0], ctx, **options)[0]

    return use


def plain_vae(family: str) -> nn.Module:
    """Build the reference's autoencoder."""
    return diffusers.AutoencoderKL.from_config(fields_of(family, "vae"))


def build_vae(family: str, dtype: torch.dtype, device: torch.device, **options: Any) -> Settings:
    """Make an autoencoder in every setting."""
    theirs = empty(lambda: plain_vae(family), dtype, device)
    options = {"methods": ("decode", "encode"), **options}
    return Settings(minidiff.AutoencoderKL, theirs, fields_of(family, "vae"), **options)


def decode(family: str, dtype: torch.dtype, device: torch.device, batch: int, side: int) -> Use:
    """Return decoding."""
    z = torch.randn(batch, fields_of(family, "vae")["latent_channels"], side, side, device=device, dtype=dtype)
    return lambda network, _: network.decode(z, return_dict=False)[0]


def encode(family: str, dtype: torch.dtype, device: torch.device, batch: int, side: int) -> Use:
    """Return encoding, up to the distribution of the latents."""
    fields = fields_of(family, "vae")
    pixels = side * 2 ** (len(fields["block_out_channels"]) - 1)
    x = torch.rand(batch, fields["in_channels"], pixels, pixels, device=device, dtype=dtype) * 2 - 1
    return lambda network, _: network.encode(x, return_dict=False)[0]


def text_class(part: str) -> str:
    """Return the class of a text encoder; SDXL's second has a projection."""
    return "CLIPTextModelWithProjection" if part == "text_encoder_2" else "CLIPTextModel"


def plain_text(family: str, part: str = "text_encoder") -> nn.Module:
    """Build a text encoder of the reference."""
    return getattr(transformers, text_class(part))(transformers.CLIPTextConfig(**fields_of(family, part)))


def build_text(
    family: str, dtype: torch.dtype, device: torch.device, part: str = "text_encoder", **options: Any
) -> Settings:
    """Make a text encoder in every setting: there is nothing to pack and no convolution."""
    theirs = empty(lambda: plain_text(family, part), dtype, device)
    return Settings(getattr(minidiff, text_class(part)), theirs, fields_of(family, part), packs=False, **options)


def ids(family: str, dtype: torch.dtype, device: torch.device, batch: int, side: int) -> Use:
    """Return encoding a prompt and its negative for every picture."""
    tokens = torch.randint(0, fields_of(family, "text_encoder")["vocab_size"], (2 * batch, TOKENS), device=device)
    return lambda network, _: network(tokens)[0]


WORKS = {
    "unet": Work("unet", "UNet step, guided", build_unet, step, plain_unet),
    "decode": Work("vae", "VAE decode", build_vae, decode, plain_vae),
    "encode": Work("vae", "VAE encode", build_vae, encode, plain_vae),
    "text": Work("text", "text encoder", build_text, ids, plain_text),
    "text_2": Work(
        "text",
        "second text encoder",
        functools.partial(build_text, part="text_encoder_2"),
        ids,
        functools.partial(plain_text, part="text_encoder_2"),
    ),
}


def works_of(part: str, family: str) -> list[str]:
    """Return the names in ``WORKS`` that belong to a part and that the family has."""
    names = [name for name, work in WORKS.items() if work.part == part]
    return [name for name in names if name != "text_2" or has(family, "text_encoder_2")]


@torch.no_grad()
def timed(
    names: Sequence[str],
    family: str,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    side: int,
    compiled: bool = False,
) -> Iterator[Measured | str]:
    """Time works on one picture whose latents have that side; those of the autoencoder share its settings."""
    built: dict[Any, Settings] = {}
    for name in names:
        work = WORKS[name]
        if work.build not in built:
            built.clear()
            built[work.build] = work.build(family, dtype, device, compiled=compiled)
        settings = built[work.build]
        figures = in_turn(settings.runs(work.use(family, dtype, device, 1, side)), rounds, device)
        flop = count(work, family, 1, side)
        yield Measured(work.part, f"{family} {work.what}, {size(work, 1, side)}", name_of(dtype), figures, flop=flop)
        yield from (f"{family} {work.what}, {name_of(dtype)}: {note}" for note in settings.notes)
        settings.notes.clear()


def size(work: Work, batch: int, side: int) -> str:
    """Return "1 x 512x512"."""
    return f"{2 * batch} x {TOKENS} tokens" if work.part == "text" else f"{batch} x {8 * side}x{8 * side}"


@torch.no_grad()
def count(work: Work, family: str, batch: int, side: int) -> float:
    """Return the floating point operations that theirs does: two for a multiplication and an addition.

    Counted on tensors without memory, which takes no time. There attention falls into two products, which are counted;
    on the CPU it is one kernel that torch's counter does not know, a sixth of a UNet step of Stable Diffusion 1.5.
    """
    use = work.use(family, torch.float32, torch.device("meta"), batch, side)
    with FlopCounterMode(display=False) as counter:
        use(_on_meta(work.plain, family), "theirs")
    return float(counter.get_total_flops())


@functools.cache
def _on_meta(plain: Callable[[str], nn.Module], family: str) -> nn.Module:
    with torch.device("meta"):
        return plain(family).eval()
