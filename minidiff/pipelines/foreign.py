"""What is not minidiff's own in a pipeline: methods that a program overrides, and schedulers that it brings.

The pure core of a scheduler never calls its public methods. Where one of these is somebody else's (of a subclass,
patched over ours, or of a class of its own), the run goes through ``ByFace``, which has the core's functions and does
what they do by the public methods alone, as a loop written by hand::

    plan         set_timesteps, timesteps, init_noise_sigma
    scale_input  scale_model_input
    advance      step(out, t, x, **prepare_extra_step_kwargs(generator, eta))
    noised       add_noise

Such a scheduler keeps its state on itself, so only one run at a time may use it.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from minidiff.noise import Generators
from minidiff.pipelines.request import Request
from minidiff.schedulers.base import Plan, Scheduler

FACE = ("set_timesteps", "timesteps", "init_noise_sigma", "scale_model_input", "step", "add_noise")
STEPS = (  # the methods that a call of the reference's pipelines goes through
    *("check_inputs", "encode_prompt", "prepare_latents", "prepare_extra_step_kwargs", "get_timesteps"),
    *("prepare_image_latents", "prepare_mask_latents", "upcast_vae"),
    *("_get_add_time_ids", "_encode_vae_image", "_encode_prompt"),
)
ENCODED = {  # the arguments of ``encode_prompt`` that a request has
    f"{side}{name}"
    for side in ("", "negative_")
    for name in ("prompt", "prompt_2", "prompt_embeds", "pooled_prompt_embeds")
} | {"num_images_per_prompt"}


def overridden(owner: object, name: str) -> bool:
    """Say whether a public method is not minidiff's: patched on the object or its class, or of somebody's class."""
    if name in getattr(owner, "__dict__", {}):
        return True
    found = inspect.getattr_static(type(owner), name, None)
    found = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
    while found is not None and _home(found).startswith("torch."):  # a decorator such as no_grad
        found = found.__wrapped__
    return found is not None and not _home(found).startswith("minidiff.")


def _home(function: Any) -> str:
    """Return the module that a function's code stands in; unlike ``__module__`` no decorator changes it."""
    return getattr(function, "__globals__", {}).get("__name__", "")


def core_of(pipe: Any) -> "Scheduler | ByFace":
    """Return what takes the steps of a pipeline's run: its scheduler's core, or its scheduler's face."""
    scheduler = pipe.scheduler
    ours = isinstance(scheduler, Scheduler) and not any(overridden(scheduler, name) for name in FACE)
    return scheduler if ours and not overridden(pipe, "prepare_extra_step_kwargs") else ByFace(pipe)


def encoding(request: Request, guided: bool, device: torch.device) -> dict[str, Any]:
    """Return the arguments of ``encode_prompt``, by the names that all of the reference's have for them."""
    names = [field.name for field in fields(request) if field.name in ENCODED]
    scale = (request.cross_attention_kwargs or {}).get("scale")
    how = {"device": device, "do_classifier_free_guidance": guided, "lora_scale": scale}
    how |= {"long_prompt": request.long_prompt} if request.long_prompt != "cut" else {}
    return {name: getattr(request, name) for name in names} | how | {"clip_skip": request.clip_skip}


def taken_by_step(scheduler: Any, **options: Any) -> dict[str, Any]:
    """Return those of the options that a scheduler's ``step`` takes."""
    takes = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in options.items() if name in takes}


def first(answer: Any, name: str) -> Any:
    """Return what a network answers, from its record or its tuple."""
    return answer[0] if isinstance(answer, tuple) else getattr(answer, name)


class ByFace:
    """The functions of a scheduler's core for one run of a pipeline, by the scheduler's public methods."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.scheduler = pipe, pipe.scheduler
        self.order, self.config = getattr(pipe.scheduler, "order", 1), pipe.scheduler.config
        self.run_options: Mapping[str, Any] = {"eta": 0.0}
        self._extra: dict[str, Any] | None = None

    def plan(
        self,
        steps: int | None,
        *,
        device: torch.device,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        **options: Any,
    ) -> Plan:
        """Call ``set_timesteps``; return what the scheduler has planned."""
        scheduler = self.scheduler
        custom = {name: value for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
        for name in custom:
            if name not in inspect.signature(scheduler.set_timesteps).parameters:
                raise ValueError(f"{type(scheduler).__name__} cannot plan from {name}=")
        if custom:
            scheduler.set_timesteps(device=device, **custom)
        else:
            scheduler.set_timesteps(steps, device=device)
        times = tuple(scheduler.timesteps.tolist())
        sigmas = getattr(scheduler, "sigmas", torch.empty(0))
        count = len(times) if custom else steps
        return Plan(scheduler.timesteps, sigmas, times, times, count, scheduler.init_noise_sigma, 0, options)

    def start_at(self, plan: Plan, start: int) -> Plan:
        """Begin at step ``start``."""
        if not 0 <= start < len(plan.times):
            raise ValueError(f"a run of {len(plan.times)} steps cannot start at step {start}")
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start)
        return plan._replace(start=start)

    def show(self, plan: Plan, step_index: int | None = None) -> None:
        """Do nothing: the scheduler itself shows where it is."""

    def scale_input(self, plan: Plan, i: int, x: Tensor) -> Tensor:
        """Return what the network is shown."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return x
        return self.scheduler.scale_model_input(x, plan.timesteps[i])

    def draw_noise(self, plan: Plan, i: int, x: Tensor, generator: Generators = None) -> dict[str, Any]:
        """Return, in place of noise, what ``step`` is to be given: it draws by itself."""
        if self._extra is None:
            self._extra = self._step_arguments(generator, plan.options)
        return self._extra

    def _step_arguments(self, generator: Generators, options: Mapping[str, Any]) -> dict[str, Any]:
        if overridden(self.pipe, "prepare_extra_step_kwargs"):
            return self.pipe.prepare_extra_step_kwargs(generator, options["eta"])
        return taken_by_step(self.scheduler, **options, generator=generator)

    def advance(
        self, plan: Plan, i: int, x: Tensor, out: Tensor, past: tuple[Any, ...], noise: dict[str, Any]
    ) -> tuple[Tensor, tuple[Any, ...]]:
        """Take step ``i``."""
        return self.scheduler.step(out, plan.timesteps[i], x, **noise, return_dict=False)[0], ()

    def noised(self, plan: Plan, x0: Tensor, noise: Tensor) -> Tensor:
        """Return x0 with the noise of step ``plan.start``."""
        return self.scheduler.add_noise(x0, noise, plan.timesteps[plan.start].expand(len(x0)))

    def denoised(self, plan: Plan, i: int, x: Tensor, out: Tensor) -> Tensor:
        """Return the clean x0 that the network's output implies, if the scheduler is a relative of ours."""
        if not isinstance(self.scheduler, Scheduler):
            raise TypeError(
                f"{type(self.scheduler).__name__} does not say the clean latents of a step: call the pipeline"
            )
        return self.scheduler.denoised(self.scheduler._ready_plan(), i, x, out)
