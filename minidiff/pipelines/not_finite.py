"""Where NaN and infinity began, for the error of a generation that ends in them."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from minidiff.compat.published import own_modules


def is_finite(x: Tensor) -> bool:
    """Say whether all values are numbers; this waits for the device. What is on the meta device has no values."""
    return x.is_meta or bool(x.isfinite().all())


def first_weight(networks: Mapping[str, nn.Module]) -> str | None:
    """Return the name of the first weight that holds NaN or infinity, None if there is none."""
    for part, network in networks.items():
        for name, weight in network.named_parameters():
            if weight.is_floating_point() and not is_finite(weight.detach()):
                return f"{part}.{name}"
    return None


def first_layer(network: nn.Module, compute: Callable[[], object]) -> str | None:
    """Return the layer whose output is the first that is not finite while ``compute`` runs the network."""
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if not found and isinstance(output, Tensor) and not is_finite(output):
                found.append(name)

        return hook

    handles = [part.register_forward_hook(look(name)) for name, part in own_modules(network) if name]
    try:
        with torch.no_grad():
            compute()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def cause(networks: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], otherwise: str = "") -> str:
    """Say where they come from: what was given, a weight, or ``otherwise`` (a step) what was computed."""
    for name, x in inputs.items():
        if not is_finite(x):
            return f"{name} held them before the first step"
    if weight := first_weight(networks):
        return f"the weight {weight} holds them: a file or an adapter is damaged"
    half = [part for part, network in networks.items() if next(network.parameters()).dtype == torch.float16]
    advice = f"{' and '.join(half)} computes in float16, which overflows easily: try bfloat16; " if half else ""
    return otherwise or f"weights and inputs are finite, so they began in a step: {advice}pipe.steps() shows in which"
