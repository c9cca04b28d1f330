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


class Output(NamedTuple):
    """One output of one network, computed by ours and by theirs from the same weights and inputs."""

    name: str
    parameters: int
    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]


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
    """Return what ``run`` returns, and its seconds."""
    start = time.perf_counter()
    return run(), time.perf_counter() - start


def share(cls: type[Model], fields: dict[str, Any], theirs: nn.Module) -> Model:
    """Build ours around the reference's own tensors."""
    with torch.device("meta"):
        ours = cls.from_config(fields)
    tensors = {ours.canonical_hub_name(name): tensor for name, tensor in theirs.eval().state_dict().items()}
    ours.load_state_dict(translate(tensors, ours.rows(), "hub", "ours"), strict=True, assign=True)
    return ours.eval()


def unet_outputs(fields: dict[str, Any]) -> Iterator[Output]:
    """Yield the UNet's prediction for latents of a 512x512 picture."""
    theirs = diffusers.UNet2DConditionModel.from_config(fields)
    ours = share(UNet2DConditionModel, fields, theirs)
    x, ctx = torch.randn(1, 4, 64, 64), torch.randn(1, 77, fields["cross_attention_dim"])
    yield Output("sample", ours.num_parameters(), lambda: ours(x, 501, ctx)[0], lambda: theirs(x, 501, ctx)[0])


def vae_outputs(fields: dict[str, Any]) -> Iterator[Output]:
    """Yield the encoder's moments and the decoder's picture at 256x256."""
    theirs = diffusers.AutoencoderKL.from_config(fields)
    ours = share(AutoencoderKL, fields, theirs)
    x, z = torch.rand(1, 3, 256, 256) * 2 - 1, torch.randn(1, 4, 32, 32)

    def encode(model: nn.Module) -> Tensor:
        return model.encode(x).latent_dist.parameters

    yield Output("moments", ours.num_parameters(), lambda: encode(ours), lambda: encode(theirs))
    yield Output("picture", ours.num_parameters(), lambda: ours.decode(z).sample, lambda: theirs.decode(z).sample)


def clip_outputs(fields: dict[str, Any]) -> Iterator[Output]:
    """Yield the two outputs of the text encoder for two texts of 77 tokens."""
    theirs = transformers.CLIPTextModel(transformers.CLIPTextConfig(**fields))
    ours = share(CLIPTextModel, fields, theirs)
    ids = torch.randint(0, fields["vocab_size"], (2, 77))
    for k, name in enumerate(("last_hidden_state", "pooler_output")):
        yield Output(name, ours.num_parameters(), lambda k=k: ours(ids)[k], lambda k=k: theirs(ids)[k])


NETWORKS = {"unet": unet_outputs, "vae": vae_outputs, "text_encoder": clip_outputs}


@torch.no_grad()
def measure(family: str) -> Iterator[Result]:
    """Yield the result of every output of the family's three networks."""
    for network, outputs in NETWORKS.items():
        torch.manual_seed(0)
        fields = json.loads((CONFIGS / FAMILIES[family] / network / "config.json").read_text())
        for output in outputs(fields):
            ours, seconds_ours = timed(output.ours)
            theirs, seconds_theirs = timed(output.theirs)
            difference = ours.double() - theirs.double()
            yield Result(
                family=family,
                network=network,
                output=output.name,
                shape="x".join(map(str, ours.shape)),
                parameters=output.parameters,
                relative_error=(difference.norm() / theirs.double().norm()).item(),
                largest_difference=difference.abs().max().item(),
                seconds_ours=seconds_ours,
                seconds_theirs=seconds_theirs,
            )


def row(r: Result) -> str:
    """Return a result as a row of the Markdown table."""
    name = f"| {r.family} | {r.network} | {r.output} | {r.shape} | {r.parameters / 1e6:.1f} M "
    numbers = f"| {r.relative_error:.1e} | {r.largest_difference:.1e} "
    return f"{name}{numbers}| {r.seconds_ours:.2f} | {r.seconds_theirs:.2f} |"


def main() -> int:
    """Measure, print and write; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*", help=f"of {', '.join(FAMILIES)}; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "full_size.json", help="where to write JSON")
    arguments = parser.parse_args()
    if unknown := set(arguments.family) - set(FAMILIES):
        parser.error(f"unknown family {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")

    print("| family | network | output | shape | parameters | relative L2 error | largest difference | s | theirs s |")
    print("|---|---|---|---|---:|---:|---:|---:|---:|", flush=True)
    results = []
    for family in arguments.family or FAMILIES:
        for result in measure(family):
            results.append(result)
            print(row(result), flush=True)
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
