"""Learning rates that change from step to step: a warm-up from 0, then one of five shapes.

    lr(i) = lr * i / W                  for the first W steps
    lr(i) = lr * shape(i)               after them; most shapes fall from 1 to 0 at step T

Checked against ``diffusers.optimization``, of which "piecewise_constant" is not implemented.
"""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def get_scheduler(
    name: str,
    optimizer: Optimizer,
    step_rules: None = None,
    num_warmup_steps: int | None = None,
    num_training_steps: int | None = None,
    num_cycles: int = 1,
    power: float = 1.0,
    last_epoch: int = -1,
) -> LambdaLR:
    """Return torch's schedule of the optimizer's learning rate; call its ``step`` after each of the optimizer's.

    Args:
        name: "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts" or "polynomial".
        num_warmup_steps: W; needed by all but the first.
        num_training_steps: T; needed by the last four.
        num_cycles: of "cosine_with_restarts" alone: how often it falls.
        power: of "polynomial" alone, which falls to a learning rate of 1e-7 instead of 0.
        last_epoch: the step to go on after; -1 begins.

    Raises:
        ValueError: if the name is unknown or an argument that it needs is missing.
    """
    name, lr, end = str(getattr(name, "value", name)), optimizer.defaults.get("lr"), 1e-7
    W, T = 0 if name == "constant" else num_warmup_steps, num_training_steps

    def restarts(i: int) -> float:
        done = (i - W) / max(1, T - W)
        return 0.0 if done >= 1.0 else max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((num_cycles * done) % 1.0))))

    def polynomial(i: int) -> float:
        return end / lr if i > T else ((lr - end) * (1 - (i - W) / (T - W)) ** power + end) / lr

    shapes: dict[str, Callable[[int], float]] = {
        "constant": lambda i: 1.0,
        "constant_with_warmup": lambda i: 1.0,
        "linear": lambda i: max(0.0, (T - i) / max(1, T - W)),
        "cosine": lambda i: _cosine(i, W, T, 0.5),
        "cosine_with_restarts": restarts,
        "polynomial": polynomial,
    }
    if name not in shapes:
        raise ValueError(f"{name!r} is none of {', '.join(shapes)}")
    if W is None or (T is None and not name.startswith("constant")):
        raise ValueError(f"{name!r} needs {'num_warmup_steps' if W is None else 'num_training_steps'}")
    if name == "polynomial" and lr <= end:
        raise ValueError(f"'polynomial' falls to a learning rate of {end}, which should be below the first, {lr}")
    return _warmed_up(optimizer, W, shapes[name], last_epoch)


def get_cosine_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, num_cycles: float = 0.5, last_epoch: int = -1
) -> LambdaLR:
    """Return the schedule "cosine" of ``get_scheduler``; with more than half a period it rises again."""
    W, T = num_warmup_steps, num_training_steps
    return _warmed_up(optimizer, W, lambda i: _cosine(i, W, T, num_cycles), last_epoch)


def _cosine(i: int, W: int, T: int, cycles: float) -> float:
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * ((i - W) / max(1, T - W)))))


def _warmed_up(optimizer: Optimizer, W: int, shape: Callable[[int], float], last_epoch: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda i: i / max(1, W) if i < W else shape(i), last_epoch)
