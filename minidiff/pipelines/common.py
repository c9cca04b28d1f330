"""What all latent pipelines share: random draws, guidance, and the denoising loop.

    x_0 <- x_T ~ N(0, I):  for each step  out = guide(unet(x, t, text));  x = scheduler.advance(x, out)

Classifier-free guidance: Ho & Salimans 2022 (https://arxiv.org/abs/2207.12598), equation 6. Its rescaling: Lin et al.
2023 (https://arxiv.org/abs/2305.08891), section 3.4. The loop works on a ``Run``, which belongs to one call, and on the
scheduler's pure core: the pipeline object itself is never written to, so any number of threads may share it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Generator, Tensor

from minidiff.adapters.lora import scale_argument
from minidiff.noise import randn
from minidiff.pipelines.request import Generators, Request
from minidiff.schedulers.base import Plan, Scheduler

if TYPE_CHECKING:
    from minidiff.fast.memo import Memo
    from minidiff.pipelines.foreign import ByFace

FACTS = (  # what a program may ask about a call after it
    *("plan", "stop", "guidance_scale", "guidance_rescale", "clip_skip", "cross_attention_kwargs", "interrupt"),
    *("denoising_start", "denoising_end", "image_guidance_scale", "timestep_cond"),
)
Network = Callable[[Tensor, Tensor, "Run"], Tensor]  # (x, t, run) -> out, with the conditions that the run holds


class Step(NamedTuple):
    """One step of a generation, as ``pipe.steps(...)`` yields it."""

    index: int  # 0, 1, 2...
    timestep: Tensor  # 0-d: what the UNet was told
    latents: Tensor  # (B, C, H, W), after the step
    denoised: Tensor  # (B, C, H, W), the clean latents that the UNet predicted at this step; ``pipe.decode`` shows them


@dataclass
class Run:
    """The state of one call. Callbacks may change ``guidance_scale``, the tensors, and ``interrupt``."""

    per_copy: ClassVar[tuple[str, ...]] = ("prompt_embeds",)  # tensors with a row for each copy of the latents

    plan: Plan
    latents: Tensor  # (B, C, H, W)
    prompt_embeds: Tensor  # (B, L, D), or (2 B, L, D) under guidance: negative first
    negative_prompt_embeds: Tensor | None
    guidance_scale: float
    guidance_rescale: float
    generator: Generators
    seeds: list[int] | None
    interrupt: bool = False
    stop: int | None = None  # the step before which the run ends; None = it takes all
    dropped: dict[str, list[str]] | None = None  # argument -> what was cut off each of its texts
    clip_skip: int | None = None
    cross_attention_kwargs: Mapping[str, Any] | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    timestep_cond: Tensor | None = None  # the encoded guidance scale, (1, width), for a UNet that is told it (LCM)
    core: "Scheduler | ByFace | None" = None  # what takes the steps
    flagged: list[bool] | None = None  # the pictures that a safety checker objects to; None = nobody looked
    step: int = 0  # of the plan, the one being taken
    memo: "Memo | None" = None  # what an optimized UNet remembers from step to step

    @property
    def indices(self) -> range:
        """The steps of the plan that this run takes."""
        return range(self.plan.start, len(self.plan.steps) if self.stop is None else self.stop)

    @property
    def guided(self) -> bool:
        """Whether this step asks the UNet twice, with and without the prompt."""
        return self.guidance_scale > 1 and self.timestep_cond is None

    @property
    def told(self) -> dict[str, Tensor]:
        """What a UNet is told that was made for it; others need not know the argument."""
        return {} if self.timestep_cond is None else {"timestep_cond": self.timestep_cond}

    @property
    def passes(self) -> int:
        """How many copies of the latents this step shows the UNet."""
        return 2 if self.guided else 1

    @property
    def num_timesteps(self) -> int:
        """How many steps the run takes."""
        return len(self.indices)

    @property
    def lora_scale(self) -> float:
        """What LoRA adapters are multiplied with in this step."""
        return scale_argument(self.cross_attention_kwargs)

    def check_rows(self) -> None:
        """Raise if a tensor has not one row for each copy of the latents: a callback may have changed either."""
        B = len(self.latents)
        for name in [name for kind in type(self).__mro__ for name in vars(kind).get("per_copy", ())]:
            rows = getattr(self, name)
            if rows is not None and len(rows) != B * self.passes:
                raise ValueError(
                    f"{name} has {len(rows)} rows for {B} pictures, and guidance_scale={self.guidance_scale} needs "
                    f"{self.passes} each: a callback that changes guidance or the pictures should return {name} with "
                    "rows to match, such as tensor.chunk(2)[-1] when guidance ends"
                )

    def forget(self) -> None:
        """Let go of everything but the numbers that a program may ask about after the call."""
        vars(self).update({name: None for name in vars(self) if name not in FACTS})

    def combine(self, out: Tensor) -> Tensor:
        """Return the guided prediction (B, C, H, W) from those for all copies (passes * B, C, H, W)."""
        return guide(*out.chunk(2), self.guidance_scale, self.guidance_rescale) if self.guided else out

    def settle(self, i: int, x: Tensor) -> Tensor:
        """Return the latents that the next step begins with, from those that step ``i`` ended with."""
        return x


def denoise(network: Network, run: Run) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Take every step of the run; yield its index, the x it started from and the guided prediction ``out``."""
    scheduler, plan, past = run.core, run.plan, ()
    for i in run.indices:
        if run.interrupt:
            return
        run.check_rows()
        run.step, x = i, run.latents
        x_in = torch.cat([x] * run.passes) if run.passes > 1 else x
        out = run.combine(network(scheduler.scale_input(plan, i, x_in), plan.timesteps[i], run))
        noise = scheduler.draw_noise(plan, i, x, run.generator)
        after, past = scheduler.advance(plan, i, x, out, past, noise)
        run.latents = like(x, run.settle(i, after))
        scheduler.show(plan, i + 1)
        yield i, x, out


def like(before: Tensor, after: Tensor) -> Tensor:
    """Return ``after``; raise if it does not have the shape of ``before``: a step neither adds nor drops pictures."""
    if after.shape != before.shape:
        raise ValueError(
            f"latents became {tuple(after.shape)} in a step from {tuple(before.shape)}: what the run remembers of the "
            "steps before (a multistep scheduler, a mask) is of other pictures than a callback has left"
        )
    return after


def guide(negative: Tensor, positive: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Return negative + scale (positive - negative), its contrast pulled back to that of ``positive``.

    Args:
        negative: prediction for the negative (or empty) prompt, (B, C, H, W).
        positive: prediction for the prompt, (B, C, H, W).
        scale: 1 is the plain conditional prediction; 7.5 is usual.
        rescale: 0 to 1, how far the standard deviation of each picture goes back to that of ``positive``.
    """
    return rescaled(negative + scale * (positive - negative), positive, rescale)


def rescaled(out: Tensor, positive: Tensor, rescale: float) -> Tensor:
    """Pull the standard deviation of each picture of ``out`` back to that of ``positive``, by the share ``rescale``."""
    if rescale == 0:
        return out
    axes = tuple(range(1, out.ndim))
    full = out * (positive.std(dim=axes, keepdim=True) / out.std(dim=axes, keepdim=True))
    return rescale * full + (1 - rescale) * out


def make_plan(scheduler: Scheduler, request: Request, device: torch.device) -> Plan:
    """Plan a run; custom ``timesteps`` or ``sigmas`` replace the number of steps; ``eta`` is for DDIM-like solvers."""
    options = {"eta": request.eta} if "eta" in scheduler.run_options else {}
    custom = request.timesteps is not None or request.sigmas is not None
    steps = None if custom else request.num_inference_steps
    plan = scheduler.plan(steps, device=device, timesteps=request.timesteps, sigmas=request.sigmas, **options)
    scheduler.show(plan)
    return plan


class Asked(Protocol):
    """What a request must say for its noise to be drawn."""

    count: int
    generator: Generators
    seed: int | None
    seeds: Sequence[int] | None


def make_generators(request: Asked) -> tuple[Generators, list[int] | None]:
    """Return what draws the noise of the pictures, and their seeds if they have some.

    Seeds give every picture a CPU generator of its own, so picture k depends neither on the rest of the batch nor on
    the device; ``seed=s`` stands for ``seeds=[s, s + 1, ...]``. A ``generator`` is used as the reference uses it.
    """
    generator, seed, seeds, count = request.generator, request.seed, request.seeds, request.count
    if sum(one is not None for one in (generator, seed, seeds)) > 1:
        raise ValueError("give one of generator=, seed= and seeds=")
    if seed is not None:
        seeds = [_checked_seed(seed) + k for k in range(count)]
    if seeds is None:
        if isinstance(generator, (list, tuple)) and len(generator) != count:
            raise ValueError(f"generator is a list of {len(generator)} for {count} pictures: give one each, or one")
        return generator, None
    if isinstance(seeds, str) or not isinstance(seeds, Sequence) or len(seeds) != count:
        raise ValueError(f"seeds should be a list of {count} integers, one per picture; found {seeds!r}")
    seeds = [_checked_seed(s) for s in seeds]
    return [Generator("cpu").manual_seed(s) for s in seeds], seeds


def _checked_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"a seed should be an integer, found {seed!r}")
    return int(seed)


def initial_latents(
    shape: tuple[int, ...], latents: Tensor | None, generator: Generators, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the given latents, checked, or draw standard normal ones; not yet scaled to the scheduler's sigma."""
    if latents is None:
        return randn(shape, generator, device=device, dtype=dtype)
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents should be {shape} for this batch and size, found {tuple(latents.shape)}")
    return latents.to(device, dtype)
