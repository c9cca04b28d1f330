"""What a program may ask a pipeline about its call, and what callbacks see and change of it.

The state belongs to the call, not to the pipeline, which threads share: ``pipe.guidance_scale`` and the like answer for
the call that is under way in this thread or, when there is none, for the last one.
"""

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor

from minidiff.pipelines.common import Run
from minidiff.pipelines.request import check_choice, check_count
from minidiff.threads import PerThread

Callback = Callable[..., Mapping[str, Tensor]]
RUNS: PerThread[Any] = PerThread()  # pipeline -> its call in this thread, under way or last
_under_way: "WeakKeyDictionary[Callbacks, dict[int, Run]]" = WeakKeyDictionary()  # those of all threads
_lock = threading.Lock()


class Fact:
    """An attribute of a pipeline that is its call's: ``_guidance_scale`` may be set, ``guidance_scale`` is read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name, self.may_be_set = name.lstrip("_"), name.startswith("_")

    def __get__(self, pipe: "Callbacks | None", owner: type | None = None) -> Any:
        if pipe is None:
            return self
        try:
            return getattr(RUNS.get(pipe), self.name)
        except AttributeError:
            raise AttributeError(f"{self.name} is that of a call, and there was none in this thread") from None

    def __set__(self, pipe: "Callbacks", value: Any) -> None:
        if not self.may_be_set:
            raise AttributeError(f"{self.name} is read only: a callback sets _{self.name}")
        for run in pipe._runs_meant():
            setattr(run, self.name, value)


class OldCallback(NamedTuple):
    """``callback=`` of old programs: called as f(step, timestep, latents) at every so many steps."""

    call: Callable[[int, Tensor, Tensor], None]
    every: int

    @classmethod
    def of(cls, call: Any, every: Any) -> "OldCallback | None":
        """Return what the two arguments ask for, with the reference's warning."""
        if call is None and every is None:
            return None
        warnings.warn(
            "callback and callback_steps are deprecated: use callback_on_step_end", FutureWarning, stacklevel=4
        )
        every = 1 if every is None else every
        check_count("callback_steps", every)
        return None if call is None else cls(call, every)


@dataclass(frozen=True)
class Handling:
    """What a caller wants done with the steps and the result, as opposed to what is generated."""

    output_type: str = "pil"
    callback: Callback | None = None
    callback_tensors: Sequence[str] = ("latents",)
    old_callback: OldCallback | None = None


class Callbacks:
    """Adds ``callback_on_step_end``, and the facts of a call, to a pipeline."""

    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = ("latents", "prompt_embeds", "negative_prompt_embeds")

    guidance_scale, _guidance_scale = Fact(), Fact()
    guidance_rescale, _guidance_rescale = Fact(), Fact()
    clip_skip, _clip_skip = Fact(), Fact()
    cross_attention_kwargs, _cross_attention_kwargs = Fact(), Fact()
    denoising_start, _denoising_start = Fact(), Fact()
    denoising_end, _denoising_end = Fact(), Fact()
    num_timesteps, _num_timesteps = Fact(), Fact()
    interrupt, _interrupt = Fact(), Fact()

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call is guided: each step asks the UNet with and without the prompt."""
        run = RUNS.get(self)
        return run.guided if hasattr(run, "guided") else self.guidance_scale > 1

    def _runs_meant(self) -> list[Any]:
        """Return what setting an attribute changes: this thread's call or, outside of it, all that are under way.

        So a button may set ``pipe._interrupt = True`` in a thread of its own.
        """
        run, others = RUNS.get(self), dict(_under_way.get(self, {}))
        if id(run) in others:
            return [run]
        if run is None:
            RUNS.set(self, run := SimpleNamespace())
        return [run, *others.values()]

    @contextmanager
    def _going_on(self, run: Run) -> Iterator[None]:
        """Know of a run in all threads; at the end let go of what takes memory."""
        RUNS.set(self, run)
        with _lock:
            _under_way.setdefault(self, {})[id(run)] = run
        try:
            yield
        finally:
            with _lock:
                _under_way[self].pop(id(run))
            run.forget()

    def _call_back(self, handling: Handling, run: Run, i: int) -> None:
        """Hand the run's tensors to the user's callback and take over those it returns."""
        if handling.callback is None:
            return
        tensors = {name: getattr(run, name) for name in handling.callback_tensors}
        returned = handling.callback(self, i - run.plan.start, run.plan.timesteps[i], tensors)
        if not isinstance(returned, Mapping):
            raise TypeError(f"callback_on_step_end should return a dict of tensors, found {type(returned).__name__}")
        for name, tensor in returned.items():
            check_choice("a tensor returned by callback_on_step_end", name, self._callback_tensor_inputs)
            setattr(run, name, tensor)

    def _call_back_as_before(self, handling: Handling, run: Run, i: int) -> None:
        """Call ``callback=`` where it is its turn."""
        old, k = handling.old_callback, i - run.plan.start
        if old is not None and k % old.every == 0:
            old.call(k // run.core.order, run.plan.timesteps[i], run.latents)
