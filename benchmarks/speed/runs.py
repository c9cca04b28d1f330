"""Whole runs of the embedded checkpoint, and scheduler steps."""

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import diffusers
import torch

import minidiff
from benchmarks import scheduler_cost
from benchmarks.speed.timing import Measured, in_turn, name_of
from minidiff.embedded import GUIDANCE, embedded_checkpoint

PROMPT = "red apple"


def embedded_runs(
    dtype: torch.dtype, device: torch.device, rounds: int, *, steps: int = 20, batch: int = 1
) -> Iterator[Measured]:
    """Time whole calls of the embedded checkpoint: prompt to picture."""
    pipes = {
        "ours": minidiff.StableDiffusionPipeline.from_pretrained(embedded_checkpoint(), torch_dtype=dtype),
        "ours, optimized": minidiff.StableDiffusionPipeline.from_pretrained(embedded_checkpoint(), torch_dtype=dtype),
        "theirs": _theirs(dtype),
        "theirs, channels_last": _theirs(dtype),
    }
    for pipe in pipes.values():
        pipe.to(device)
        pipe.set_progress_bar_config(disable=True)
    pipes["ours, optimized"].optimize()  # on its device: what it does depends on it
    for name in ("unet", "vae"):
        getattr(pipes["theirs, channels_last"], name).to(memory_format=torch.channels_last)

    def draw(pipe: Any) -> Any:
        generator = torch.Generator(device).manual_seed(0)
        return pipe([PROMPT] * batch, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generator)

    figures = in_turn({name: partial(draw, pipe) for name, pipe in pipes.items()}, rounds, device)
    yield Measured("run", f"embedded checkpoint, {batch} x 64x64, {steps} steps", name_of(dtype), figures)


def _theirs(dtype: torch.dtype) -> Any:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(embedded_checkpoint(), torch_dtype=dtype)
    pipe.text_encoder.to(dtype)  # transformers leaves it as stored
    return pipe


def scheduler_steps(rounds: int) -> Iterator[Measured]:
    """Time a step of every scheduler, and say the median over all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = {k: scheduler_cost.compare(k, rounds) for k in minidiff.__all__ if k.endswith("Scheduler")}
    torch.set_num_threads(threads)
    for kind, r in results.items():
        figures = {"ours": [r["ours_us"] / 1e6], "theirs": [r["ours_us"] / r["ratio"] / 1e6]}
        yield Measured("scheduler", f"{kind} step, 4x64x64", "float32", figures)
    ratio = statistics.median(r["ratio"] for r in results.values())
    ours = statistics.median(r["ours_us"] for r in results.values()) / 1e6
    figures = {"ours": [ours], "theirs": [ours / ratio]}
    yield Measured("scheduler", "median over all schedulers", "float32", figures)
