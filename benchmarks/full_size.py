"""Compare the networks of the published checkpoints with the reference at full size, in float32.

    python -m benchmarks.full_size                 # Stable Diffusion 1.5 and 2.1, SDXL base and refiner, DDPM
    python -m benchmarks.full_size sd15 cat        # some of them
    python -m benchmarks.full_size --out here.json

Built from the published configurations with the reference's own random initialisation. Ours takes the reference's
tensors through the name table, which shares their memory, and one network is held at a time: 12 GB of memory suffice
for SDXL, 4 GB for the others. Prints a Markdown table, writes JSON, and ends with status 1 if a relative L2 error is
above 1e-5.
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

from minidiff import (
    AutoencoderKL,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    UNet2DConditionModel,
    UNet2DModel,
)
from minidiff.checkpoints.model import Model
from minidiff.checkpoints.remap import translate

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "tests" / "data" / "hub_configs"
FAMILIES = {
    "sd15": "runwayml--stable-diffusion-v1-5",
    "sd21": "stabilityai--stable-diffusion-2-1",
    "sdxl": "stabilityai--stable-diffusion-xl-base-1.0",
    "refiner": "stabilityai--stable-diffusion-xl-refiner-1.0",
    "cifar10": "google--ddpm-cifar10-32",
    "cat": "google--ddpm-cat-256",
    "celebahq": "google--ddpm-celebahq-256",
}
XL_SIDE = 32  # height and width of the latents for SDXL: a picture of 256 pixels
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
    """Yield the UNet's prediction for latents: of a 512x512 picture, or for SDXL with its sizes of a 256x256 one."""
    theirs = diffusers.UNet2DConditionModel.from_config(fields)
    ours = share(UNet2DConditionModel, fields, theirs)
    side, options = 64, {}
    if fields.get("addition_embed_type") == "text_time":
        side, P = XL_SIDE, 1280
        sizes = (fields["projection_class_embeddings_input_dim"] - P) // fields["addition_time_embed_dim"]
        time_ids = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0][:sizes]])
        options["added_cond_kwargs"] = {"text_embeds": torch.randn(1, P), "time_ids": time_ids}
    x, ctx = torch.randn(1, 4, side, side), torch.randn(1, 77, fields["cross_attention_dim"])
    parameters = ours.num_parameters()
    yield Output(
        "sample", parameters, lambda: ours(x, 501, ctx, **options)[0], lambda: theirs(x, 501, ctx, **options)[0]
    )


def unconditional_outputs(fields: dict[str, Any]) -> Iterator[Output]:
    """Yield the unconditional UNet's prediction at the size that it was trained on."""
    theirs = diffusers.UNet2DModel.from_config(fields)
    ours = share(UNet2DModel, fields, theirs)
    x = torch.randn(1, fields["in_channels"], fields["sample_size"], fields["sample_size"])
    yield Output("sample", ours.num_parameters(), lambda: ours(x, 501)[0], lambda: theirs(x, 501)[0])


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


def projected_clip_outputs(fields: dict[str, Any]) -> Iterator[Output]:
    """Yield what SDXL takes from its second text encoder: the penultimate state, and the pooled embedding."""
    fields = {**fields, "torch_dtype": "float32"}  # theirs builds the inner model in the dtype of the file
    theirs = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**fields))
    ours = share(CLIPTextModelWithProjection, fields, theirs)
    ids, parameters = torch.randint(0, fields["vocab_size"], (2, 77)), ours.num_parameters()

    def penultimate(model: nn.Module) -> Tensor:
        return model(ids, output_hidden_states=True).hidden_states[-2]

    yield Output("penultimate state", parameters, lambda: penultimate(ours), lambda: penultimate(theirs))
    yield Output("text_embeds", parameters, lambda: ours(ids).text_embeds, lambda: theirs(ids).text_embeds)


NETWORKS = {
    "unet": unet_outputs,
    "vae": vae_outputs,
    "text_encoder": clip_outputs,
    "text_encoder_2": projected_clip_outputs,
    ".": unconditional_outputs,  # the oldest repositories hold one network, beside the index
}


@torch.no_grad()
def measure(family: str) -> Iterator[Result]:
    """Yield the result of every output of the family's networks."""
    for network, outputs in NETWORKS.items():
        path = CONFIGS / FAMILIES[family] / network / "config.json"
        if not path.exists():
            continue
        torch.manual_seed(0)
        for output in outputs(json.loads(path.read_text())):
            ours, seconds_ours = timed(output.ours)
            theirs, seconds_theirs = timed(output.theirs)
            difference = ours.double() - theirs.double()
            yield Result(
                family=family,
                network="unet" if network == "." else network,
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
