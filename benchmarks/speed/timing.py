"""How things are timed: in turn, so that whatever else the machine does slows down every side alike."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


@dataclass
class Measured:
    """One thing that was measured, on all sides: ``figures`` maps a setting, such as "ours" or "theirs, compiled"."""

    part: str
    what: str
    dtype: str
    figures: dict[str, list[float]]  # one per round; the same index means the same round
    unit: str = "s"
    flop: float = 0.0  # of one run, 0 = not counted
    case: dict[str, int] = field(default_factory=dict)  # where cost grows: "batch" and "pixels" of a picture

    def median(self, setting: str) -> float:
        """Return the median of a setting over the rounds."""
        return statistics.median(self.figures[setting])

    def best(self, side: str, kind: str = "") -> str | None:
        """Return the best setting of a side, "ours" or "theirs": of all, or of those that are "eager" or "compiled"."""
        names = [name for name in self.figures if name.startswith(side)]
        if kind:
            names = [name for name in names if ("compiled" in name) == (kind == "compiled")]
        return min(names, key=self.median, default=None)

    def ratio(self, ours: str, theirs: str) -> tuple[float, float, float]:
        """Return the median of ours / theirs over the rounds, and the least and the largest."""
        ratios = [a / b for a, b in zip(self.figures[ours], self.figures[theirs], strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)

    def to_dict(self) -> dict[str, Any]:
        """Return what is written to the JSON file."""
        return asdict(self)


def in_turn(
    runs: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, warmups: int | None = None
) -> dict[str, list[float]]:
    """Time every run ``rounds`` times, in turn, after runs of each that do not count: seconds by setting.

    Args:
        warmups: how many do not count. One by default; on a GPU three, for a CUDA graph is warmed up by the first,
            recorded by the second and replayed from the third on.
    """
    if warmups is None:
        warmups = 3 if device.type == "cuda" else 1
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(warmups + rounds):
        for name, run in runs.items():
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            if k >= warmups:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def in_fresh_processes(codes: Mapping[str, str], rounds: int, warmups: int = 1) -> dict[str, list[float]]:
    """Run Python code in fresh processes, in turn; each prints one figure as its last line.

    Args:
        warmups: rounds that do not count; the first brings the files into memory.
    """
    figures: dict[str, list[float]] = {name: [] for name in codes}
    for k in range(warmups + rounds):
        for name, code in codes.items():
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                raise RuntimeError(f"measuring {name!r} in a fresh process failed:\n{done.stderr[-2000:]}")
            if k >= warmups:
                figures[name].append(float(json.loads(done.stdout.splitlines()[-1])))
    return figures


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on."""
    import diffusers
    import transformers

    import minidiff

    found = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "processor": _processor(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "threads between operators": torch.get_num_interop_threads(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB",
        "system": platform.platform(),
        "python": platform.python_version(),
        "minidiff": minidiff.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    if device.type == "cuda":
        found["memory of the device"] = f"{torch.cuda.get_device_properties(device).total_memory / 1e9:.0f} GB"
        found["CUDA"], found["cuDNN"] = torch.version.cuda, torch.backends.cudnn.version()
        found["TF32"] = {"products": torch.backends.cuda.matmul.allow_tf32, "cuDNN": torch.backends.cudnn.allow_tf32}
    else:
        del found["processor"]  # is the device
    return found


def name_of(dtype: torch.dtype) -> str:
    """Return "float32" for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what it was asked for; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return f"{names[0].split(':')[1].strip()}, {len(names)} cores" if names else platform.processor()
