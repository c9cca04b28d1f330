"""Single networks of the published configurations with random weights: text encoder, UNet step, VAE decode and encode.

Ours and theirs hold the same weights. On the CPU, ours runs as it is and after ``optimize``, theirs as it is and in
channels_last; on a GPU both run compiled as well. An optimized UNet is timed as the pipeline asks it after its first
step: the text and the times are in the memo, and one sample meets two texts.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import minidiff
from benchmarks.full_size import CONFIGS, FAMILIES, share
from benchmarks.speed.timing import Measured, in_turn
from minidiff.config import read_json
from minidiff.fast import optimize
from minidiff.fast.memo import Memo

CL = torch.channels_last
diffusers.utils.logging.set_verbosity_error()
COMPILED = {"compiled": {}, "compiled with CUDA graphs": {"mode": "reduce-overhead"}}


def fields_of(family: str, part: str) -> dict[str, Any]:
    """Return the published configuration of a network."""
    return {k: v for k, v in read_json(CONFIGS / FAMILIES[family] / part / "config.json").items() if k[0] != "_"}


def empty(make: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Build a network of theirs with random weights, faster than its own initialisation does."""
    with torch.device("meta"):
        network = make()
    network = network.to(dtype).to_empty(device=device).eval()
    for name, p in network.named_parameters():
        if p.ndim > 1:
            p.data.uniform_(-1, 1).mul_((3 / p[0].numel()) ** 0.5)
        else:
            p.data.fill_(float("norm" in name and name.endswith("weight")))
    for buffer in network.buffers():  # position_ids of the text encoder, the only ones
        buffer.copy_(torch.arange(buffer.shape[-1])[None])
    return network


class Settings:
    """The same network in every setting, with the same weights.

    Args:
        ours_class: minidiff's class.
        theirs: the reference's network.
        fields: the configuration.
        packs: whether ``optimize`` does something for it.
    """

    def __init__(self, ours_class: type, theirs: nn.Module, fields: dict[str, Any], packs: bool = True) -> None:
        device = next(theirs.parameters()).device
        self.networks = {"ours": share(ours_class, fields, theirs), "theirs": theirs}
        if packs:
            self.networks["ours, optimized"] = share(ours_class, fields, theirs)
            optimize(self.networks["ours, optimized"])
            self.networks["theirs, channels_last"] = copy.deepcopy(theirs).to(memory_format=CL)
        if device.type == "cuda":
            for name, options in COMPILED.items():
                for side in ("ours", "theirs"):
                    network = copy.deepcopy(self.networks[side]).to(memory_format=CL)
                    network.compile(**options)
                    self.networks[f"{side}, {name}"] = network

    def runs(self, use: Callable[[nn.Module, str], Any]) -> dict[str, Callable[[], Any]]:
        """Return what to time, by setting; ``use`` gets the network and the setting."""
        return {name: lambda name=name, network=network: use(network, name) for name, network in self.networks.items()}


@torch.no_grad()
def unet_steps(
    family: str, dtype: torch.dtype, device: torch.device, rounds: int, cases: Sequence[tuple[int, int]]
) -> Iterator[Measured]:
    """Time a guided step for (pictures, side of the latents) in ``cases``."""
    fields = fields_of(family, "unet")
    theirs = empty(lambda: diffusers.UNet2DConditionModel.from_config(fields), dtype, device)
    settings = Settings(minidiff.UNet2DConditionModel, theirs, fields)
    for batch, side in cases:
        x = torch.randn(batch, 4, side, side, device=device, dtype=dtype)
        ctx = torch.randn(2 * batch, 77, fields["cross_attention_dim"], device=device, dtype=dtype)
        t, added = torch.tensor(501, device=device), {}
        if fields.get("addition_embed_type") == "text_time":
            P = 1280
            sizes = (fields["projection_class_embeddings_input_dim"] - P) // fields["addition_time_embed_dim"]
            conditions = torch.randn(2 * batch, P), torch.full((2 * batch, sizes), 1024.0)
            names = ("text_embeds", "time_ids")
            added["added_cond_kwargs"] = {n: c.to(device, dtype) for n, c in zip(names, conditions, strict=True)}
        memo = Memo(t[None])

        def step(unet: nn.Module, setting: str, x=x, ctx=ctx, t=t, added=added, memo=memo) -> Tensor:
            if setting != "ours, optimized":
                return unet(torch.cat([x, x]), t, ctx, **added)[0]
            with memo.at(0):
                return unet(x, t, ctx, **added)[0]

        flop = count(lambda: step(settings.networks["theirs"], "theirs")) if batch == 1 else 0.0
        figures = in_turn(settings.runs(step), rounds, device)
        what = f"{family} UNet step, guided, {batch} x {8 * side}x{8 * side}"
        yield Measured("unet", what, name_of(dtype), figures, flop=flop)


@torch.no_grad()
def vae(
    family: str, dtype: torch.dtype, device: torch.device, rounds: int, cases: Sequence[tuple[int, int]]
) -> Iterator[Measured]:
    """Time decoding and encoding for (pictures, side of the latents) in ``cases``."""
    fields = fields_of(family, "vae")
    theirs = empty(lambda: diffusers.AutoencoderKL.from_config(fields), dtype, device)
    settings = Settings(minidiff.AutoencoderKL, theirs, fields)
    for batch, side in cases:
        z = torch.randn(batch, 4, side, side, device=device, dtype=dtype)
        x = torch.rand(batch, 3, 8 * side, 8 * side, device=device, dtype=dtype) * 2 - 1
        for what, use in {
            "decode": lambda network, _, z=z: network.decode(z)[0],
            "encode": lambda network, _, x=x: network.encode(x)[0],
        }.items():
            flop = count(lambda use=use: use(settings.networks["theirs"], "")) if batch == 1 else 0.0
            figures = in_turn(settings.runs(use), rounds, device)
            what = f"{family} VAE {what}, {batch} x {8 * side}x{8 * side}"
            yield Measured("vae", what, name_of(dtype), figures, flop=flop)


@torch.no_grad()
def text(family: str, dtype: torch.dtype, device: torch.device, rounds: int) -> Iterator[Measured]:
    """Time the text encoder on a prompt and its negative."""
    fields = fields_of(family, "text_encoder")
    config = transformers.CLIPTextConfig(**fields)
    theirs = empty(lambda: transformers.CLIPTextModel(config), dtype, device)
    settings = Settings(minidiff.CLIPTextModel, theirs, fields, packs=False)
    ids = torch.randint(0, fields["vocab_size"], (2, 77), device=device)
    figures = in_turn(settings.runs(lambda network, _: network(ids)[0]), 3 * rounds, device)
    yield Measured("text", f"{family} text encoder, 2 x 77 tokens", name_of(dtype), figures)


def count(run: Callable[[], Any]) -> float:
    """Return the floating point operations of a run: two for a multiplication and an addition."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def name_of(dtype: torch.dtype) -> str:
    """Return "float32" for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
