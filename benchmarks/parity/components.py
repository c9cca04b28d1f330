"""Every network of a checkpoint on the same random inputs, in every dtype."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.parity.both import Both
from minidiff.fast import optimize

DTYPES = ("float64", "float32", "bfloat16")
SIDE = 16  # of latents, and of pictures / 8: small enough for float64 at full size


class Row(NamedTuple):
    """One output of one network."""

    what: str
    dtype: str
    largest: float  # difference
    relative: float  # ‖ours - theirs‖ / ‖theirs‖
    identical: bool
    precision: float  # relative error of ours in this dtype against theirs in the first, nan there
    their_precision: float  # the same of theirs


@torch.no_grad()
def compare(both: Both, dtypes: tuple[str, ...], device: torch.device) -> Iterator[Row]:
    """Yield a row for every output, network after network; one copy at a time is on the device.

    The networks that ``pipe.optimize()`` makes faster are compared optimized as well.
    """
    for name, (ours, theirs) in both.networks().items():
        exact: dict[str, Tensor] = {}
        for dtype in dtypes:
            inputs = inputs_of(ours, getattr(torch, dtype), device)
            found, expected = (
                run(copied(network, device, getattr(torch, dtype)), inputs) for network in (ours, theirs)
            )
            for output, a in found.items():
                exact.setdefault(output, expected[output].double())
                yield row(f"{name}: {output}", dtype, a, expected[output], exact[output])
            if "ids" in inputs or dtype == "float64":  # not made faster
                continue
            fast = copied(ours, device, getattr(torch, dtype))
            optimize(fast)
            for output, a in run(fast, inputs).items():
                yield row(f"{name}: {output}, optimized", dtype, a, expected[output], exact[output])


def row(what: str, dtype: str, ours: Tensor, theirs: Tensor, exact: Tensor) -> Row:
    """Compare an output with theirs, and both with theirs in the first dtype."""
    first = torch.equal(exact, theirs)
    precision = (float("nan"),) * 2 if first else (_relative(ours, exact), _relative(theirs, exact))
    return Row(what, dtype, _largest(ours, theirs), _relative(ours, theirs), torch.equal(ours, theirs), *precision)


def copied(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a copy in another dtype; the network itself keeps its precision."""
    return copy.deepcopy(network).to(device, dtype)


def inputs_of(network: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return random inputs of a network of minidiff, which suit the reference's too."""
    generator, kind, config = torch.Generator().manual_seed(0), type(network).__name__, network.config

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    if kind.startswith("CLIPText"):
        ids = torch.randint(0, config.vocab_size, (2, config.max_position_embeddings), generator=generator)
        return {"ids": ids.to(device)}
    if kind == "AutoencoderKL":
        return {
            "x": normal(1, config.in_channels, 8 * SIDE, 8 * SIDE).tanh(),
            "z": normal(1, config.latent_channels, SIDE, SIDE),
        }
    t = torch.tensor([501, 20], device=device)
    if kind == "UNet2DModel":
        side = config.sample_size if isinstance(config.sample_size, int) else SIDE
        return {"args": (normal(2, config.in_channels, side, side), t), "options": {}}
    args = (normal(2, config.in_channels, SIDE, SIDE), t, normal(2, 77, network.spec.levels[-1].D_ctx))
    if config.addition_embed_type is None:
        return {"args": args, "options": {}}
    sizes = 5 if config.projection_class_embeddings_input_dim == 2560 else 6
    pooled = config.projection_class_embeddings_input_dim - sizes * config.addition_time_embed_dim
    added = {"text_embeds": normal(2, pooled), "time_ids": torch.full((2, sizes), 512.0).to(device, dtype)}
    return {"args": args, "options": {"added_cond_kwargs": added}}


def run(network: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the outputs of a network of either library by name."""
    if "ids" in inputs:
        out = network(inputs["ids"], output_hidden_states=True)
        named: dict[str, Callable[[], Tensor]] = {"penultimate state": lambda: out.hidden_states[-2]}
        named["last state"] = lambda: out.last_hidden_state
        if hasattr(out, "text_embeds"):
            named["pooled and projected"] = lambda: out.text_embeds
        else:
            named["pooled"] = lambda: out.pooler_output
        return {name: get() for name, get in named.items()}
    if "z" in inputs:
        moments = network.encode(inputs["x"]).latent_dist.parameters
        return {"moments of a picture": moments, "picture of latents": network.decode(inputs["z"]).sample}
    return {"prediction": network(*inputs["args"], **inputs["options"]).sample}


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table."""
    columns = "largest difference | relative error | bit-identical | ours against float64 | theirs against float64"
    lines = [f"| output | dtype | {columns} |", "|---|---|---:|---:|---|---:|---:|"]
    for r in rows:
        precisions = ("" if p != p else f"{p:.1e}" for p in (r.precision, r.their_precision))
        same = "yes" if r.identical else "no"
        figures = " | ".join([f"{r.largest:.1e}", f"{r.relative:.1e}", same, *precisions])
        lines.append(f"| {r.what} | {r.dtype} | {figures} |")
    return "\n".join(lines)


def _largest(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item()
