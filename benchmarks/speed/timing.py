"""How things are timed: in turn, so that whatever else the machine does slows down every side alike."""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
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

    def median(self, setting: str) -> float:
        """Return the median of a setting over the rounds."""
        return statistics.median(self.figures[setting])

    def best(self, side: str) -> str:
        """Return the best setting of a side, "ours" or "theirs"."""
        return min((name for name in self.figures if name.startswith(side)), key=self.median)

    def ratio(self, ours: str, theirs: str) -> tuple[float, float, float]:
        """Return the median of ours / theirs over the rounds, and the least and the largest."""
        ratios = [a / b for a, b in zip(self.figures[ours], self.figures[theirs], strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)

    def to_dict(self) -> dict[str, Any]:
        """Return what is written to the JSON file."""
        return asdict(self)


def in_turn(runs: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Time every run ``rounds`` times, in turn, after one run of each that does not count: seconds by setting."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(rounds + 1):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if k > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def in_fresh_processes(codes: Mapping[str, str], rounds: int) -> dict[str, list[float]]:
    """Run Python code in fresh processes, in turn; each prints one figure as its last line."""
    figures: dict[str, list[float]] = {name: [] for name in codes}
    for k in range(rounds + 1):  # the first round brings the files into memory
        for name, code in codes.items():
            command = [sys.executable, "-c", code]
            output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
            if k > 0:
                figures[name].append(float(json.loads(output.splitlines()[-1])))
    return figures


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on."""
    import diffusers
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return f"{names[0].split(':')[1].strip()}, {len(names)} cores" if names else platform.processor()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
