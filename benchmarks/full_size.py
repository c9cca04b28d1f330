"""Compare the networks of Stable Diffusion 1.5 and 2.1 with the reference at full size, in float32.

    python -m benchmarks.full_size                 # both families
    python -m benchmarks.full_size sd15            # one of them
    python -m benchmarks.full_size --out here.json

Built from the published configurations with the reference's own random initialisation. Ours takes the reference's
tensors through the name table, which shares their memory, and one network is held at a time: 4 GB of memory suffice.
Prints a Markdown table, writes JSON, and ends with status 1 if a relative L2 error is above 1e-5.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from torch import Tensor, nn

from minidiff import AutoencoderKL, CLIPTextModel, UNet2DConditionModel
from minidiff.checkpoints.model import Model
from minidiff.checkpoints.remap import translate

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "tests" / "data" / "hub_configs"
FAMILIES = {"sd15": "runwayml--stable-diffusion-v1-5", "sd21": "stabilityai--stable-diffusion-2-1"}
BOUND = 1e-5


class Result(NamedTuple):
    """One output of one network: how far ours is from theirs, and how long each took (once, without a warm-up)."""

    family: str
    network: str
    output: str
    shape: str
    parameters: int
    relative_error: float
    largest_difference: float
    seconds_ours: float
    seconds_theirs: float


def timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    start = time.perf_counter()
    return run(), time.perf_counter() - start


def share(theirs: nn.Module, ours: Model) -> Model:
    """Give ours, built on the meta device, the reference's own tensors."""
    tensors = {ours.canonical_hub_name(name): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(translate(tensors, ours.rows(), "hub", "ours"), strict=True, assign=True)
    return ours.eval()


def build(cls: type[Model], theirs: nn.Module, fields: dict[str, Any]) -> Model:
    with torch.device("meta"):
        ours = cls.from_config(fields)
    return share(theirs.eval(), ours)


def unet_outputs(fields: dict[str, Any]) -> Iterator[tuple[str, Model, Callable[[], Tensor], Callable[[], Tensor]]]:
    theirs = diffusers.UNet2DConditionModel.from_config(fields)
    ours = build(UNet2DConditionModel, theirs, fields)
    x, ctx = torch.randn(1, 4, 64, 64), torch.randn(1, 77, fields["cross_attention_dim"])
    yield "sample", ours, lambda: ours(x, 501, ctx).sample, lambda: theirs(x, 501, ctx).sample


def vae_outputs(fields: dict[str, Any]) -> Iterator[tuple[str, Model, Callable[[], Tensor], Callable[[], Tensor]]]:
    theirs = diffusers.AutoencoderKL.from_config(fields)
    ours = build(AutoencoderKL, theirs, fields)
    x, z = torch.rand(1, 3, 256, 256) * 2 - 1, torch.randn(1, 4, 32, 32)
    yield (
        "moments",
        ours,
        lambda: ours.encode(x).latent_dist.parameters,
        lambda: theirs.encode(x).latent_dist.parameters,
    )
    yield "picture", ours, lambda: ours.decode(z).sample, lambda: theirs.decode(z).sample


def clip_outputs(fields: dict[str, Any]) -> Iterator[tuple[str, Model, Callable[[], Tensor], Callable[[], Tensor]]]:
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**fields))
    ours = build(CLIPTextModel, theirs, fields)
    ids = torch.randint(0, fields["vocab_size"], (2, 77))
    yield "last_hidden_state", ours, lambda: ours(ids).last_hidden_state, lambda: theirs(ids).last_hidden_state
    yield "pooler_output", ours, lambda: ours(ids).pooler_output, lambda: theirs(ids).pooler_output


NETWORKS = {"unet": unet_outputs, "vae": vae_outputs, "text_encoder": clip_outputs}


@torch.no_grad()
def measure(family: str) -> Iterator[Result]:
    """Yield the result of every output of the family's three networks."""
    for network, outputs in NETWORKS.items():
        torch.manual_seed(0)
        fields = json.loads((CONFIGS / FAMILIES[family] / network / "config.json").read_text())
        for output, model, run_ours, run_theirs in outputs(fields):
            ours, seconds_ours = timed(run_ours)
            theirs, seconds_theirs = timed(run_theirs)
            difference = ours.double() - theirs.double()
            yield Result(
                family,
                network,
                output,
                "x".join(map(str, ours.shape)),
                model.num_parameters(),
                (difference.norm() / theirs.double().norm()).item(),
                difference.abs().max().item(),
                seconds_ours,
                seconds_theirs,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*", help=f"of {', '.join(FAMILIES)}; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "full_size.json", help="where to write JSON")
    arguments = parser.parse_args()
    if unknown := set(arguments.family) - set(FAMILIES):
        parser.error(f"unknown family {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")

    print(
        "| family | network | output | shape | parameters | relative L2 error | largest difference | ours s | theirs s |"
    )
    print("|---|---|---|---|---:|---:|---:|---:|---:|", flush=True)
    results = []
    for family in arguments.family or FAMILIES:
        for r in measure(family):
            results.append(r)
            print(
                f"| {r.family} | {r.network} | {r.output} | {r.shape} | {r.parameters / 1e6:.1f} M "
                f"| {r.relative_error:.1e} | {r.largest_difference:.1e} | {r.seconds_ours:.2f} | {r.seconds_theirs:.2f} |",
                flush=True,
            )
    machine = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**machine, "results": [r._asdict() for r in results]}, indent=2) + "\n")
    return int(max(r.relative_error for r in results) > BOUND)


if __name__ == "__main__":
    sys.exit(main())
