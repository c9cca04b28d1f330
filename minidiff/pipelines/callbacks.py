"""What a callback written for the reference may look at and set on the pipeline while a call is running.

The state belongs to the call, not to the pipeline, which threads share; so the attributes below answer only inside
``callback_on_step_end``, for the call and the thread that it belongs to.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from minidiff.pipelines.common import Run
from minidiff.pipelines.request import check_choice

Callback = Callable[..., Mapping[str, Tensor]]


class Callbacks:
    """Adds ``callback_on_step_end`` to a pipeline."""

    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = ("latents", "prompt_embeds", "negative_prompt_embeds")

    def __init__(self) -> None:
        self._current = threading.local()  # .run: the run whose callback this thread is in

    def _call_back(self, callback: Callback, run: Run, i: int, names: Sequence[str]) -> None:
        """Hand the run's tensors to the user's callback and take over those it returns."""
        self._current.run = run
        try:
            tensors = {name: getattr(run, name) for name in names}
            returned = callback(self, i - run.plan.start, run.plan.timesteps[i], tensors)
        finally:
            self._current.run = None
        if not isinstance(returned, Mapping):
            raise TypeError(f"callback_on_step_end should return a dict of tensors, found {type(returned).__name__}")
        for name, tensor in returned.items():
            check_choice("a tensor returned by callback_on_step_end", name, self._callback_tensor_inputs)
            setattr(run, name, tensor)

    def _run(self) -> Run:
        run = getattr(self._current, "run", None)
        if run is None:
            raise AttributeError("this attribute describes a running call: read or set it in callback_on_step_end")
        return run

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the call whose callback is running."""
        return self._run().guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call whose callback is running is guided."""
        return self._run().guided

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the call whose callback is running."""
        return len(self._run().indices)

    @property
    def interrupt(self) -> bool:
        """Whether the call whose callback is running will stop after this step."""
        return self._run().interrupt

    @property
    def _interrupt(self) -> bool:
        return self._run().interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._run().interrupt = value

    @property
    def _guidance_scale(self) -> float:
        return self._run().guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:
        self._run().guidance_scale = value
