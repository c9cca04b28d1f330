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
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor

from minidiff.pipelines.request import check_choice, check_count
from minidiff.threads import PerThread

if TYPE_CHECKING:
    from minidiff.pipelines.state import Run

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Callback = Callable[..., Mapping[str, Tensor]]
RUNS: PerThread[Any] = PerThread()  # pipeline -> its call in this thread, under way or last
_under_way: WeakKeyDictionary[Any, dict[int, Any]] = WeakKeyDictionary()  # those of all threads
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
        message = "callback and callback_steps are deprecated: use callback_on_step_end"
        warnings.warn(message, FutureWarning, stacklevel=5)  # whoever calls the pipeline
        check_callable("callback", call)
        every = 1 if every is None else every
        check_count("callback_steps", every)
        return None if call is None else cls(call, every)


@dataclass(frozen=True)
class OutputOptions:
    """What a caller wants done with the steps and the result, as opposed to what is generated."""

    output_type: str
    return_dict: bool
    callback: Callback | None
    callback_tensors: Sequence[str]  # a callback that is an object may name them itself, as its ``tensor_inputs``
    old_callback: OldCallback | None

    @classmethod
    def of(cls, pipe: "Callbacks", arguments: Mapping[str, Any]) -> tuple["OutputOptions", dict[str, Any]]:
        """Take the arguments of a call apart (its ``locals()``): these, and those of the request.

        Raises ``TypeError`` for arguments that minidiff does not know, unless they ask for nothing.
        """
        asked = {name: value for name, value in arguments.items() if name not in ("self", "__class__")}
        others = asked.pop("not_implemented")
        old = OldCallback.of(others.pop("callback", None), others.pop("callback_steps", None))
        if unknown := [name for name, value in others.items() if value is not None]:
            raise TypeError(f"{type(pipe).__name__} does not implement the argument(s) {', '.join(unknown)}")
        output_type, return_dict = asked.pop("output_type"), asked.pop("return_dict")
        check_choice("output_type", output_type, OUTPUT_TYPES)
        callback, tensors = asked.pop("callback_on_step_end"), asked.pop("callback_on_step_end_tensor_inputs")
        check_callable("callback_on_step_end", callback)
        tensors = getattr(callback, "tensor_inputs", tensors) or ()
        if not isinstance(tensors, list | tuple):
            raise TypeError(f"callback_on_step_end_tensor_inputs should be a list of names, found {tensors!r}")
        for name in tensors:
            check_choice("callback_on_step_end_tensor_inputs", name, pipe._callback_tensor_inputs)
        return cls(output_type, return_dict, callback, tensors, old), asked


def check_callable(name: str, call: Any) -> None:
    """Raise if what is to be called at each step is no function; None is nothing to call."""
    if call is not None and not callable(call):
        raise TypeError(f"{name} should be a function, found {call!r}")


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
    def _going_on(self, run: "Run") -> Iterator[None]:
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

    def _call_back(self, options: OutputOptions, run: "Run", ends_step: bool) -> None:
        """Hand the run's tensors to the user's callback and take over those it returns; then call the old one."""
        k, t = run.step - run.plan.start, run.plan.timesteps[run.step]
        if options.callback is not None:
            known = {"latents": run.latents, **run.tensors}
            tensors = {name: known.get(name) for name in options.callback_tensors}
            returned = options.callback(self, k, t, tensors)
            if not isinstance(returned, Mapping):
                found = type(returned).__name__
                raise TypeError(f"callback_on_step_end should return a dict of tensors, found {found}")
            for name in returned:
                check_choice("a tensor returned by callback_on_step_end", name, self._callback_tensor_inputs)
            returned = dict(returned)
            run.latents = returned.pop("latents", run.latents)
            run.tensors.update(returned)
        old = options.old_callback
        if old is not None and ends_step and k % old.every == 0:
            old.call(k // run.core.order, t, run.latents)
