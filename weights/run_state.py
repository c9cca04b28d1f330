"""What every training run here needs: batches, one step of descent, state that survives an interruption, a log.

Randomness is a function of (seed, step), so a resumed run draws what the uninterrupted one would have drawn, and no
state of a random generator has to be kept.
"""

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import workers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

logger = logging.getLogger("minidiff.training")


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the random generator of one training step."""
    return torch.Generator().manual_seed(1_000_003 * seed + step)


def learning_rate(peak: float, step: int, steps: int, warmup: int) -> float:
    """Rise linearly to ``peak`` over ``warmup`` steps, then fall along a cosine to 0 at ``steps``."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def batch_of(step: int, size: int, count: int, seed: int) -> list[int]:
    """Return the pictures of one step; they come in a new random order every epoch."""
    positions = range(step * size, (step + 1) * size)
    epochs = {p // count for p in positions}
    orders = {e: torch.randperm(count, generator=step_generator(seed + 1, e)).tolist() for e in epochs}
    return [orders[p // count][p % count] for p in positions]


def descend(
    parameters: list[Tensor], optimisers: Mapping[str, torch.optim.Optimizer], rates: Mapping[str, float]
) -> None:
    """Move the parameters against their gradients: averaged over the workers, and together of norm 1 at most."""
    workers.average_gradients(parameters)
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for name, optimiser in optimisers.items():
        optimiser.param_groups[0]["lr"] = rates[name]
        optimiser.step()


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, step: int, decay: float) -> None:
    """Move the average of the weights towards the weights; faster at first, when they change most."""
    decay = min(decay, (step + 1) / (step + 10))
    for mean, weight in zip(average.parameters(), network.parameters(), strict=True):
        mean.lerp_(weight, 1 - decay)


def zero_last_layers(network: nn.Module, names: tuple[str, ...]) -> None:
    """Set the weights of the modules whose names end in ``names`` to 0.

    Given the last layer of every residual branch, a new network starts out shallow and trains at a high rate.
    """
    for name, module in network.named_modules():
        if name.endswith(names):
            nn.init.zeros_(module.weight)


class Run:
    """The networks and the optimisers of a run, kept as ``state.safetensors``; the step is in its metadata."""

    def __init__(
        self, folder: Path, networks: Mapping[str, nn.Module], optimisers: Mapping[str, torch.optim.Optimizer]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "state.safetensors"
        self.networks = nn.ModuleDict(networks)
        self.optimisers = optimisers

    def save(self, step: int) -> None:
        """Write the state after ``step`` steps; an interruption while writing leaves the old state in place.

        Of several workers only the first writes: they all have the same state.
        """
        if workers.RANK:
            return
        tensors = {f"network/{name}": value for name, value in self.networks.state_dict().items()}
        for kind, optimiser in self.optimisers.items():
            for i, state in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser/{kind}/{i}/{name}": value for name, value in state.items()}
        fresh = self.file.with_suffix(".new")
        save_file({name: value.contiguous() for name, value in tensors.items()}, fresh, metadata={"step": str(step)})
        fresh.replace(self.file)

    def resume(self) -> int:
        """Load the state, if there is one, and return the number of steps already done."""
        if not self.file.exists():
            return 0
        with safe_open(self.file, "pt") as opened:
            step = int(opened.metadata()["step"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is not a dict)
        states: dict[str, dict[int, dict[str, torch.Tensor]]] = {kind: {} for kind in self.optimisers}
        for key in [key for key in tensors if key.startswith("optimiser/")]:
            _, kind, i, name = key.split("/")
            states[kind].setdefault(int(i), {})[name] = tensors.pop(key)
        self.networks.load_state_dict({key.removeprefix("network/"): value for key, value in tensors.items()})
        for kind, optimiser in self.optimisers.items():
            optimiser.load_state_dict(optimiser.state_dict() | {"state": states[kind]})
        logger.info("resumed at step %d from %s", step, self.file)
        return step


class Log:
    """Append the means of the losses to ``log.jsonl``, one line every ``every`` steps."""

    def __init__(self, folder: Path, every: int = 50) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.every = folder / "log.jsonl", every
        self.values: dict[str, list[float]] = {}
        self.steps, self.since = 0, time.perf_counter()

    def add(self, step: int, **values: Iterable[float]) -> None:
        """Take in the values of one step, of any number of samples each."""
        for name, some in values.items():
            self.values.setdefault(name, []).extend(some)
        self.steps += 1
        if (step + 1) % self.every == 0:
            now = time.perf_counter()
            means = {name: round(sum(some) / len(some), 5) for name, some in self.values.items()}
            self.write({"step": step + 1, **means, "seconds_per_step": round((now - self.since) / self.steps, 4)})
            self.values, self.steps, self.since = {}, 0, now

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; of several workers only the first does."""
        if workers.RANK:
            return
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record, default=str) + "\n")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def settings_line(log: list[dict[str, Any]]) -> str:
    """Return the settings of the last start of a run, as a list."""
    settings = next(record["settings"] for record in reversed(log) if "settings" in record)
    shown = ("seed", "steps", "batch", "lr", "muon_lr", "workers")
    return ", ".join(f"{name} {settings[name]}" for name in shown if name in settings)


def loss_table(log: list[dict[str, Any]], columns: tuple[str, ...], rows: int) -> str:
    """Return about ``rows`` lines of the log as a table; of steps done twice, the later."""
    records = [*{record["step"]: record for record in log if columns[0] in record}.values()]
    every = max(1, round(len(records) / rows))
    table = [("step", *columns), ("---:",) * (len(columns) + 1)]
    table += [(r["step"], *(f"{r[name]:.4f}" for name in columns)) for r in records[every - 1 :: every]]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in table)
