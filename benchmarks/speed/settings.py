"""A network of a published configuration in every setting that is compared, with random weights.

    ours                          theirs
    ours, optimized               theirs, channels_last
    ours, compiled                theirs, compiled                     both in channels_last
    ours, compiled with...        theirs, compiled with CUDA graphs    the same

All hold the same weights, and as far as possible the same memory. The UNet of Stable Diffusion 1.5 takes 3.4 GB in
float32. Ours is built around the tensors of theirs; channels_last needs the convolutions once more, 2.4 GB, which the
compiled settings share; on the CPU, ``optimize`` packs everything once more. Together 9.2 GB. A setting that does not
fit is left out, and the report says so.

There is no "ours, optimized, compiled": under torch's compiler an optimized network computes as it is written, so it
would be "ours, compiled" once more.
"""

import copy
import ctypes
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.full_size import CONFIGS, FAMILIES, share
from benchmarks.load import memory
from minidiff.config import read_json
from minidiff.fast import optimize

CL = torch.channels_last
COMPILED = {"compiled": {}, "compiled with CUDA graphs": {"mode": "reduce-overhead"}}
EAGER = ("ours", "ours, optimized", "theirs", "theirs, channels_last")


def fields_of(family: str, part: str) -> dict[str, Any]:
    """Return the published configuration of a network."""
    return {k: v for k, v in read_json(CONFIGS / FAMILIES[family] / part / "config.json").items() if k[0] != "_"}


def has(family: str, part: str) -> bool:
    """Return whether a family has a network, such as SDXL's second text encoder."""
    return (CONFIGS / FAMILIES[family] / part / "config.json").exists()


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


def twin(network: nn.Module) -> nn.Module:
    """Return the same network around the same memory; what is done to its parameters does not reach the first."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in network.parameters()}
    return copy.deepcopy(network, shared | {id(buffer): buffer for buffer in network.buffers()})


def compile_(network: nn.Module, methods: Sequence[str], options: dict[str, Any]) -> nn.Module:
    """Compile methods of a network, "forward" standing for a call of the network itself.

    In one piece, so that no part is left to the interpreter unnoticed.
    """
    options = {"fullgraph": True, **options}
    for name in methods:
        if name == "forward":
            network.compile(**options)
        else:  # compile() is for calls alone: decode and encode would run as before
            setattr(network, name, torch.compile(getattr(network, name), **options))
    return network


class Settings:
    """The same network in every setting, with the same weights.

    Args:
        ours_class: minidiff's class.
        theirs: the reference's network.
        fields: the configuration.
        methods: what is compiled, see ``compile_``; none makes the compiled settings differ in memory format alone.
        compiled: whether to compile at all; with CUDA graphs on a GPU alone.
        packs: whether ``optimize`` and channels_last do something for it.
        only: the settings to make; none = all.

    ``networks`` maps the setting to the network, ``notes`` say which were left out.
    """

    def __init__(
        self,
        ours_class: type,
        theirs: nn.Module,
        fields: dict[str, Any],
        *,
        methods: Sequence[str] = ("forward",),
        compiled: bool = False,
        packs: bool = True,
        only: Sequence[str] = (),
    ) -> None:
        device = next(theirs.parameters()).device
        weights = sum(p.nbytes for p in theirs.parameters())
        convolutions = sum(p.nbytes for p in theirs.parameters() if p.ndim == 4)
        laid_out = functools.cache(lambda: twin(theirs).to(memory_format=CL))

        def optimized() -> nn.Module:
            network = share(ours_class, fields, theirs)
            optimize(network)
            return network

        # setting -> how it is made, and the bytes that it needs beside the weights of theirs
        make: dict[str, tuple[Callable[[], nn.Module], int]] = {
            "ours": (lambda: share(ours_class, fields, theirs), 0),
            "theirs": (lambda: theirs, 0),
        }
        if packs:
            make["ours, optimized"] = (optimized, weights if device.type == "cpu" else convolutions)
            make["theirs, channels_last"] = (laid_out, convolutions)
        for name, options in (COMPILED if compiled else {}).items():
            if device.type == "cuda" or "CUDA" not in name:
                ours = functools.partial(lambda o: compile_(share(ours_class, fields, laid_out()), methods, o), options)
                both = functools.partial(lambda o: compile_(twin(laid_out()), methods, o), options)
                make |= {f"ours, {name}": (ours, 0), f"theirs, {name}": (both, 0)}
        self.networks: dict[str, nn.Module] = {}
        self.notes: list[str] = []
        room = 0.9 * available(device)
        for name, (one, need) in make.items():
            if only and name not in only:
                continue
            if need > room:
                kind = type(theirs).__name__
                left = f"{room / 1e9:.1f} GB are free"
                self.notes.append(f"{kind}: {name!r} is left out, it needs {need / 1e9:.1f} GB more and {left}")
                continue
            room -= need
            self.networks[name] = one()

    def runs(self, use: Callable[[nn.Module, str], Any]) -> dict[str, Callable[[], Any]]:
        """Return what to time, by setting; ``use`` gets the network and the setting.

        Compiled settings are run once. One that fails is left out with a note: the others still can be measured.
        """
        runs = {name: functools.partial(use, network, name) for name, network in self.networks.items()}
        compiled = [name for name in runs if "compiled" in name]
        if compiled:
            torch.compiler.reset()  # else the second shape would be compiled for any, and torch gives up at the eighth
        for name in compiled:
            start = time.perf_counter()
            try:
                runs[name]()
                self.notes.append(f"{name!r}: the first run, with compiling, took {time.perf_counter() - start:.0f} s")
            except Exception as error:  # whatever the compiler, its C++ or Triton raise
                self.notes.append(f"{name!r} is left out, compiling failed: {type(error).__name__}: {error}"[:400])
                del runs[name]
        return runs


def available(device: torch.device) -> int:
    """Return the bytes that can still be had."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def peak_of(run: Callable[[], Any], device: torch.device) -> int:
    """Return how many bytes a run needs at most beyond what is there before: allocated on a GPU, else resident."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _give_back()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory()["VmRSS"]
    run()
    return max(memory()["VmHWM"] - before, 0)


def _give_back() -> None:
    """Return freed memory to the system, where the C library can: else a run may fill it and seem to need none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
