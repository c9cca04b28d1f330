"""Whole runs and scheduler steps."""

import statistics
from collections.abc import Iterator

import diffusers
import torch

import minidiff
from benchmarks import scheduler_cost
from benchmarks.speed.timing import Measured, in_turn
from minidiff.embedded import GUIDANCE, embedded_checkpoint

PROMPT = "red apple"


def whole_runs(device: torch.device, rounds: int, steps: int = 20, batch: int = 1) -> Iterator[Measured]:
    """Time whole calls of the embedded checkpoint: prompt to picture."""
    pipes = {
        "ours": minidiff.StableDiffusionPipeline.from_pretrained(embedded_checkpoint()),
        "ours, optimized": minidiff.StableDiffusionPipeline.from_pretrained(embedded_checkpoint()).optimize(),
        "theirs": diffusers.StableDiffusionPipeline.from_pretrained(embedded_checkpoint(), torch_dtype=torch.float32),
    }
    pipes["theirs"].text_encoder.to(torch.float32)  # transformers leaves it as stored
    for pipe in pipes.values():
        pipe.to(device)
        pipe.set_progress_bar_config(disable=True)

    def draw(pipe: object) -> object:
        prompts = [PROMPT] * batch
        return pipe(
            prompts, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(0)
        )

    figures = in_turn({name: lambda p=pipe: draw(p) for name, pipe in pipes.items()}, rounds, device)
    yield Measured("run", f"embedded checkpoint, {batch} x 64x64, {steps} steps", "float32", figures)


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
