"""What the samplers of distilled consistency models share (LCM, TCD): few steps, over the timesteps of distillation.

Distillation visits ``original_inference_steps`` timesteps k, 2 k, 3 k ... minus 1, with k = T // original steps. A run
of n steps takes every so many of them, evenly, largest first.
"""

from collections.abc import Sequence

import numpy as np
import torch

from minidiff.schedulers import noise_schedule
from minidiff.schedulers.base import Device, Grid, Plan, Scheduler


class ConsistencyScheduler(Scheduler):
    """Base of LCM and TCD. ``steps_offset`` and ``timestep_spacing`` have no effect, as in the reference."""

    _compatibles = ()

    def _grid(
        self,
        count: int,
        timesteps: Sequence[int] | None = None,
        original_inference_steps: int | None = None,
        strength: float = 1.0,
    ) -> Grid:
        if not 0 < strength <= 1:
            raise ValueError(f"strength should be above 0 and at most 1, found {strength}")
        if timesteps is None:
            origin = self._distilled(original_inference_steps, strength)[::-1]
            if count > len(origin):
                raise ValueError(
                    f"{count} steps are more than the {len(origin)} timesteps that original_inference_steps x strength "
                    "leaves: use fewer steps or raise original_inference_steps"
                )
            places = np.floor(np.linspace(0, len(origin), num=count, endpoint=False)).astype(np.int64)
            times = torch.from_numpy(origin[places].copy())
        else:
            times = noise_schedule.custom_timesteps(timesteps, len(self))
            times = times[count - min(int(count * strength), count) :]
        return self._grid_of(times)

    def _distilled(self, original_steps: int | None, strength: float) -> np.ndarray:
        """Return the timesteps of distillation, smallest first, up to ``strength``."""
        steps = self.config.original_inference_steps if original_steps is None else original_steps
        if not 0 < steps <= len(self):
            raise ValueError(f"original_inference_steps should lie in 1 ... {len(self)}, found {steps}")
        return np.arange(1, int(steps * strength) + 1) * (len(self) // steps) - 1

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """Plan a run and forget the previous one; ``strength`` below 1 leaves out the noisiest timesteps."""
        given = {"timesteps": timesteps, "original_inference_steps": original_inference_steps, "strength": strength}
        self._begin(self.plan(num_inference_steps, device=device, **given))

    def _is_last(self, plan: Plan, i: int) -> bool:
        return i == plan.num_inference_steps - 1
