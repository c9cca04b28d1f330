"""Where two networks begin to differ: both run layer by layer on the same input, matched through the name table.

The layers are those that hold weights. In the order in which ours computes them, the first whose output departs is
where something is wrong: in its weights, or in what happens between the layer before and it. All later ones only pass
it on.
"""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.parity.components import copied, inputs_of, run
from minidiff.checkpoints.model import Model


class Departure(NamedTuple):
    """The first layer whose output differs."""

    module: str  # ours
    their_module: str
    relative: float  # error of its output
    input_relative: float  # error of its input: 0 says that the layer itself is to blame
    names: list[tuple[str, str, str]]  # of its weights: ours, Hub, original single file
    weights_differ: list[str]  # those of ours that are not theirs
    agreed: int  # layers before it


@torch.no_grad()
def first_departure(ours: Model, theirs: nn.Module, tolerance: float = 1e-9) -> Departure | None:
    """Run both in float64 and return the first layer that differs by more than ``tolerance``; None if none does."""
    cpu = torch.device("cpu")
    ours, theirs = (copied(network, cpu, torch.float64) for network in (ours, theirs))
    inputs = inputs_of(ours, torch.float64, cpu)
    pairs = matched(ours, theirs)
    seen_ours = _outputs(ours, [mine for mine, _ in pairs], inputs)
    seen_theirs = _outputs(theirs, list(dict.fromkeys(other for _, other in pairs)), inputs)
    partner = dict(pairs)
    for count, (module, (x, out)) in enumerate(seen_ours.items()):
        if partner[module] not in seen_theirs:
            continue
        their_x, their_out = seen_theirs[partner[module]]
        error = difference(out, their_out)
        if error > tolerance:
            names = names_of(ours, module)
            wrong = _wrong_weights(ours, theirs, names)
            return Departure(module, partner[module], error, difference(x, their_x), names, wrong, count)
    return None


def matched(ours: Model, theirs: nn.Module) -> list[tuple[str, str]]:
    """Return the layers of both that hold the same weights, ours first, by the name table."""
    spelled = {ours.canonical_hub_name(name): name for name in theirs.state_dict()}
    pairs: dict[str, str] = {}
    for row in ours.rows():
        for mine, hub in itertools.zip_longest(row.ours, row.hub, fillvalue=row.hub[0]):
            pairs.setdefault(_layer(mine), _layer(spelled[hub]))
    return [(mine, other) for mine, other in pairs.items() if mine]


def names_of(ours: Model, module: str) -> list[tuple[str, str, str]]:
    """Return the weights of a layer of ours in the three spellings."""
    return [
        (mine, hub, ldm)
        for row in ours.rows()
        for mine, hub, ldm in itertools.zip_longest(row.ours, row.hub, row.ldm, fillvalue="(see above)")
        if _layer(mine) == module
    ]


def difference(a: Tensor, b: Tensor) -> float:
    """Return ‖a - b‖ / ‖b‖, whatever the layout: (B, C, H, W), (B, C, H W) and (B, H W, C) hold the same numbers."""
    if a.numel() != b.numel():
        return float("inf")
    a, b = (s.flatten(2) if s.ndim == 4 else s for s in (a, b))
    layouts = [a, a.transpose(1, 2)] if a.ndim == 3 else [a]
    size = torch.linalg.vector_norm(b).clamp(min=1e-30)
    return min((torch.linalg.vector_norm(s.reshape(b.shape) - b) / size).item() for s in layouts)


def describe(departure: Departure | None, component: str) -> str:
    """Return what was found as text."""
    if departure is None:
        return f"{component}: every layer agrees"
    d = departure
    lines = [
        f"{component}: {d.agreed} layers agree; the first that departs is {d.module} (theirs: {d.their_module}), by "
        f"{d.relative:.1e}, on inputs that differ by {d.input_relative:.1e}",
        *(f"    ours {mine}\n    Hub  {hub}\n    file {ldm}" for mine, hub, ldm in d.names),
    ]
    if d.weights_differ:
        lines.append(f"    these weights are not the reference's: {', '.join(d.weights_differ)}")
    else:
        lines.append("    its weights are the reference's: what is computed before it differs")
    return "\n".join(lines)


def _outputs(network: nn.Module, modules: list[str], inputs: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Run a network; return input and output of the named layers at their first call, in the order of the calls."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name in modules:

        def keep(_: nn.Module, args: tuple[Any, ...], out: Tensor, name: str = name) -> None:
            seen.setdefault(name, (args[0].detach().clone(), out.detach().clone()))

        handles.append(network.get_submodule(name).register_forward_hook(keep))
    try:
        run(network, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _wrong_weights(ours: Model, theirs: nn.Module, names: list[tuple[str, str, str]]) -> list[str]:
    state = theirs.state_dict()
    spelled = {ours.canonical_hub_name(name): name for name in state}
    mine = nn.Module.state_dict(ours)
    wrong = []
    for name, hub, _ in names:
        other = state[spelled[hub]] if hub in spelled else None
        if other is not None and not torch.equal(mine[name].flatten(), other.flatten()):
            wrong.append(name)
    return wrong


def _layer(tensor: str) -> str:
    return tensor.rpartition(".")[0]
