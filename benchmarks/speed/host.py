"""What a UNet step costs beside the arithmetic: the time in which Python asks for its operators, and their number.

A proxy, measured on a CPU, for what bounds a GPU in eager mode; it is not a measurement of a GPU. There a step of few
pictures cannot be faster than one thread launches its kernels. Here the network has the published depth, attention and
levels, and a fortieth of the widths, over 8x8 latents, so that next to nothing is left to compute. In float64, on one
thread. The optimized network is left with what ``optimize`` installs on a GPU, so that it asks for the same operators.

Two counts go with the time: of all operators, and of those that write memory, each at least a kernel on a GPU.
"""

from collections.abc import Iterator
from typing import Any

import diffusers
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import minidiff
from benchmarks.speed.networks import step_of
from benchmarks.speed.settings import EAGER, Settings, empty, fields_of
from benchmarks.speed.timing import Measured, in_turn
from minidiff.fast import ON_CPU

NARROWER = 40  # times; and as many fewer heads
SIDE = 8
NO_KERNEL = {"empty", "empty_strided", "empty_like", "_unsafe_view", "alias"}


def narrow(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration of the same topology whose layers are too narrow to take time."""
    widths = [C // NARROWER for C in fields["block_out_channels"]]
    heads = fields["attention_head_dim"]  # the number of heads, by the Hub's mistake
    few = [max(N // 5, 1) for N in heads] if isinstance(heads, list) else heads
    smaller = {"block_out_channels": widths, "attention_head_dim": few, "norm_num_groups": 8, "cross_attention_dim": 16}
    return {**fields, **smaller}


class Count(TorchDispatchMode):
    """Counts the operators that reach torch's dispatcher, below autograd and autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        self.kernels += not (func.is_view or func.overloadpacket.__name__ in NO_KERNEL)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def host_time(family: str, rounds: int) -> Iterator[Measured]:
    """Time a guided step of the family's topology, and count its operators."""
    fields, device, dtype = narrow(fields_of(family, "unet")), torch.device("cpu"), torch.float64
    theirs = empty(lambda: diffusers.UNet2DConditionModel.from_config(fields), dtype, device)
    settings = Settings(minidiff.UNet2DConditionModel, theirs, fields, only=EAGER[:3])
    for module in settings.networks["ours, optimized"].modules():
        if isinstance(vars(module).get("forward"), ON_CPU):
            del module.forward
    runs = settings.runs(step_of(fields, dtype, device, 1, SIDE))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = in_turn(runs, rounds, device)
        operators: dict[str, list[float]] = {}
        kernels: dict[str, list[float]] = {}
        for name, run in runs.items():
            with Count() as counted:
                run()
            operators[name], kernels[name] = [float(counted.operators)], [float(counted.kernels)]
    finally:
        torch.set_num_threads(threads)
    what = f"{family} UNet step, guided, host time, {NARROWER} times narrower"
    yield Measured("host", what, "float64", seconds)
    yield Measured("host", f"{what}: operators", "float64", operators, unit="operators")
    yield Measured("host", f"{what}: operators that write", "float64", kernels, unit="operators")
