"""Several processes that train one network: each takes its share of every batch, and the gradients are averaged.

Start them with ``torchrun --nproc-per-node 2 weights/train_denoiser.py ...``; without torchrun there is one worker and
nothing here does anything. On a CPU, one worker per core beats one process with a thread per core: the workers meet
once in a step, threads meet in every layer.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor

RANK = int(os.environ.get("RANK", 0))  # set by torchrun
WORKERS = int(os.environ.get("WORLD_SIZE", 1))


def start() -> None:
    """Meet the other workers."""
    if WORKERS > 1:
        dist.init_process_group("gloo")


def finish() -> None:
    """Part from the other workers."""
    if WORKERS > 1:
        dist.destroy_process_group()


def average_gradients(parameters: list[Tensor]) -> None:
    """Replace each gradient by its mean over the workers, in one message."""
    if WORKERS == 1:
        return
    gradients = [p.grad for p in parameters]
    message = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(message)
    for g, mean in zip(gradients, message.split([g.numel() for g in gradients]), strict=True):
        g.copy_(mean.view(g.shape)).div_(WORKERS)


def from_owner(i: int, value: Tensor) -> Tensor:
    """Return ``value`` as the worker that owns item ``i`` has it."""
    if WORKERS > 1:
        dist.broadcast(value, src=i % WORKERS)
    return value


def owns(i: int) -> bool:
    """Say whether this worker computes item ``i`` of a list of work that is shared out."""
    return i % WORKERS == RANK
