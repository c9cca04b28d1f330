"""The weights that ``set_adapters`` takes: a number, or dicts of components and of blocks of the UNet.

    {"unet": {"down": 0.5, "mid": 1.0, "up": {"block_0": 0.3, "block_1": [1.0, 0.8, 0.6]}}, "text_encoder": 0.9}

A block is one with cross-attention; a list has one weight for each of its transformers, with the residual block before
it. A change of resolution goes by the first of them. In the middle the weight is that of the transformer alone, and
layers outside all blocks keep 1. All this is as in ``diffusers.loaders.unet_loader_utils``.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from minidiff.adapters.lora import Weight
from minidiff.checkpoints.model import Model


def component_weights(entry: Any, networks: Mapping[str, Model]) -> dict[str, Weight]:
    """Return the weight of one adapter in each network.

    Raises:
        ValueError: naming what is no weight, or a component or block that is not there.
    """
    if not isinstance(entry, Mapping):
        return dict.fromkeys(networks, _number("adapter_weights", entry))
    if unknown := set(entry) - set(networks):
        raise ValueError(f"adapter_weights: this pipeline has {', '.join(networks)}, no {', '.join(sorted(unknown))}")
    weights: dict[str, Weight] = {}
    for component, network in networks.items():
        weight = entry.get(component)
        if component == "unet" and isinstance(weight, Mapping):
            weights[component] = dict(_unet_weights(weight, network))
        else:
            weights[component] = _number(f"adapter_weights[{component!r}]", weight)
    return weights


def _unet_weights(blocks: Mapping[str, Any], unet: Model) -> Iterator[tuple[str, float]]:
    """Yield (beginning of the Hub names of some layers, weight)."""
    if unknown := set(blocks) - {"down", "mid", "up"}:
        raise ValueError(f"adapter_weights['unet'] has {', '.join(sorted(unknown))}; expected down, mid and up")
    for side in ("down", "up"):
        given, there = blocks.get(side), _transformers(unet, side)
        if isinstance(given, Mapping) and (unknown := set(given) - {f"block_{i}" for i in there}):
            known = ", ".join(f"block_{i}" for i in there)
            raise ValueError(f"adapter_weights['unet'][{side!r}] has {', '.join(sorted(unknown))}; expected {known}")
        for i, count in there.items():
            weight = given.get(f"block_{i}") if isinstance(given, Mapping) else given
            for j, one in enumerate(_spread(f"adapter_weights['unet'][{side!r}]['block_{i}']", weight, count)):
                for part in ("resnets", "attentions", f"{side}samplers"):
                    yield f"{side}_blocks.{i}.{part}.{j}", one
    (mid,) = _spread("adapter_weights['unet']['mid']", blocks.get("mid"), 1)
    yield "mid_block.attentions.0", mid


def _transformers(unet: Model, side: str) -> dict[int, int]:
    """Return the number of transformers in each block of a side that has some."""
    counts = {i: len(block.attn) for i, block in enumerate(getattr(unet, side))}
    return {i: count for i, count in counts.items() if count}


def _spread(name: str, weight: Any, count: int) -> list[float]:
    """Return ``count`` weights: those of a list, or one number for all."""
    if not isinstance(weight, list | tuple):
        return [_number(name, weight)] * count
    if len(weight) not in (1, count):
        raise ValueError(f"{name} has {len(weight)} weights for {count} transformers")
    return [_number(name, one) for one in weight] * (count // len(weight))


def _number(name: str, weight: Any) -> float:
    """Return a weight, 1 for None."""
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ValueError(f"{name} should be a finite number, found {weight!r}")
    return weight
