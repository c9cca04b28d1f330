"""Learning rates that change from step to step: a warm-up from 0, then one of six shapes.

    lr(i) = lr * i / W                  for the first W steps
    lr(i) = lr * shape(i)               after them; most shapes fall from 1 to 0 at step T

Checked against ``diffusers.optimization``.
"""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Shape = Callable[[int], float]


def get_scheduler(
    name: str,
    optimizer: Optimizer,
    step_rules: str | None = None,
    num_warmup_steps: int | None = None,
    num_training_steps: int | None = None,
    num_cycles: int = 1,
    power: float = 1.0,
    last_epoch: int = -1,
) -> LambdaLR:
    """Return torch's schedule of the optimizer's learning rate; call its ``step`` after each of the optimizer's.

    Args:
        name: "constant", "piecewise_constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts" or
            "polynomial".
        step_rules: of "piecewise_constant" alone: "1:10,0.1:20,0.005" is lr for 10 steps, a tenth to step 20, then
            0.005 lr.
        num_warmup_steps: W; needed by all but the first two.
        num_training_steps: T; needed by the last four.
        num_cycles: of "cosine_with_restarts" alone: how often it falls.
        power: of "polynomial" alone.
        last_epoch: the step to go on after; -1 begins.

    Raises:
        ValueError: if the name is unknown or an argument that it needs is missing.
    """
    name = str(getattr(name, "value", name))
    if name == "constant":
        return LambdaLR(optimizer, lambda i: 1, last_epoch)
    if name == "piecewise_constant":
        return LambdaLR(optimizer, _pieces(step_rules), last_epoch)
    W, T = num_warmup_steps, num_training_steps
    shapes: dict[str, Callable[[], Shape]] = {
        "constant_with_warmup": lambda: lambda i: 1.0,
        "linear": lambda: lambda i: max(0.0, (T - i) / max(1, T - W)),
        "cosine": lambda: _cosine(W, T, 0.5),
        "cosine_with_restarts": lambda: _restarts(W, T, num_cycles),
        "polynomial": lambda: _polynomial(W, T, optimizer.defaults["lr"], power),
    }
    if name not in shapes:
        raise ValueError(f"{name!r} is none of constant, piecewise_constant, {', '.join(shapes)}")
    if W is None or (T is None and name != "constant_with_warmup"):
        raise ValueError(f"{name!r} needs {'num_warmup_steps' if W is None else 'num_training_steps'}")
    return _warmed_up(optimizer, W, shapes[name](), last_epoch)


def get_cosine_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, num_cycles: float = 0.5, last_epoch: int = -1
) -> LambdaLR:
    """Return the schedule "cosine" of ``get_scheduler``; with more than half a period it rises again."""
    shape = _cosine(num_warmup_steps, num_training_steps, num_cycles)
    return _warmed_up(optimizer, num_warmup_steps, shape, last_epoch)


def _warmed_up(optimizer: Optimizer, W: int, shape: Shape, last_epoch: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda i: i / max(1, W) if i < W else shape(i), last_epoch)


def _pieces(rules: str | None) -> Shape:
    """Return the shape that ``step_rules`` describes."""
    try:
        *pieces, last = rules.split(",")
        ends = sorted((int(end), float(factor)) for factor, end in (piece.split(":") for piece in pieces))
        rest = float(last)
    except (AttributeError, ValueError):
        raise ValueError(f"step_rules should be such as '1:10,0.1:20,0.005', found {rules!r}") from None
    return lambda i: next((factor for end, factor in ends if i < end), rest)


def _cosine(W: int, T: int, cycles: float) -> Shape:
    return lambda i: max(0.0, 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * ((i - W) / max(1, T - W)))))


def _restarts(W: int, T: int, cycles: int) -> Shape:
    def shape(i: int) -> float:
        done = (i - W) / max(1, T - W)
        return 0.0 if done >= 1.0 else max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((cycles * done) % 1.0))))

    return shape


def _polynomial(W: int, T: int, lr: float, power: float, end: float = 1e-7) -> Shape:
    """Return the shape that falls to a learning rate of ``end`` instead of 0."""
    if lr <= end:
        raise ValueError(f"'polynomial' falls to a learning rate of {end}, which should be below the first, {lr}")
    return lambda i: end / lr if i > T else ((lr - end) * (1 - (i - W) / (T - W)) ** power + end) / lr
