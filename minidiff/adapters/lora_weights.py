"""The weights that ``set_adapters`` takes: a number, or dicts of components and of blocks of the UNet.

    {"unet": {"down": 0.5, "mid": 1.0, "up": {"block_0": 0.3, "block_1": [1.0, 0.8, 0.6]}}, "text_encoder": 0.9}

A block is one with cross-attention; a list has one weight for each of its transformers, with the residual block before
it. A change of resolution goes by the first of them. In the middle the weight is that of the transformer alone, and
layers outside all blocks keep 1. All this is as in ``diffusers.loaders.unet_loader_utils``.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from minidiff.adapters.lora import Weight
from minidiff.checkpoints.model import Model
from minidiff.errors import check_number


def component_weights(entry: Any, networks: Mapping[str, Model]) -> dict[str, Weight]:
    """Return the weight of one adapter in each network.

    Raises:
        TypeError, ValueError: naming what is no weight, or a component or block that is not there.
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


def _unet_weights(sides: Mapping[str, Any], unet: Model) -> Iterator[tuple[str, float]]:
    """Yield (beginning of the Hub names of some layers, weight)."""
    _check_names("adapter_weights['unet']", sides, ("down", "mid", "up"))
    for side in ("down", "up"):
        yield from _side_weights(side, sides.get(side), getattr(unet, side))
    (mid,) = _spread("adapter_weights['unet']['mid']", sides.get("mid"), 1)
    yield "mid_block.attentions.0", mid


def _side_weights(side: str, given: Any, levels: Iterable[Any]) -> Iterator[tuple[str, float]]:
    """Yield the same for the blocks of one side that have transformers."""
    name = f"adapter_weights['unet'][{side!r}]"
    counts = {f"block_{i}": len(level.attn) for i, level in enumerate(levels) if level.attn}
    if not isinstance(given, Mapping):
        given = dict.fromkeys(counts, given)
    _check_names(name, given, counts)
    for block, count in counts.items():
        for j, weight in enumerate(_spread(f"{name}[{block!r}]", given.get(block), count)):
            for part in ("resnets", "attentions", f"{side}samplers"):
                yield f"{side}_blocks.{block.removeprefix('block_')}.{part}.{j}", weight


def _check_names(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    if unknown := set(given) - set(known):
        raise ValueError(f"{name} has {', '.join(sorted(unknown))}; expected {', '.join(known)}")


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
    check_number(name, weight)
    return weight
