"""What every scheduler has besides its mathematics: a file, its relatives, and published lists of timesteps."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from minidiff.outputs import Output
from minidiff.registry import public

CONFIG_NAME = "scheduler_config.json"
T = TypeVar("T", bound="SchedulerMixin")

# The classes that may replace each other in a pipeline, by the reference's list. minidiff has no DPMSolverSDE.
KarrasDiffusionSchedulers = Enum(
    "KarrasDiffusionSchedulers",
    "DDIMScheduler DDPMScheduler PNDMScheduler LMSDiscreteScheduler EulerDiscreteScheduler HeunDiscreteScheduler "
    "EulerAncestralDiscreteScheduler DPMSolverMultistepScheduler DPMSolverSinglestepScheduler KDPM2DiscreteScheduler "
    "KDPM2AncestralDiscreteScheduler DEISMultistepScheduler UniPCMultistepScheduler DPMSolverSDEScheduler "
    "EDMEulerScheduler",
)

# Timesteps and noise levels for few steps, optimised for each model by Sabour et al. 2024 ("Align Your Steps"),
# https://arxiv.org/abs/2404.14507. For ``pipe(..., timesteps=...)`` and ``sigmas=``.
AysSchedules = {
    "StableDiffusionTimesteps": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24],
    "StableDiffusionSigmas": [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0],
    "StableDiffusionXLTimesteps": [999, 845, 730, 587, 443, 310, 193, 116, 53, 13],
    "StableDiffusionXLSigmas": [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.0],
    "StableDiffusionVideoSigmas": [700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.0],
}


@dataclass
class SchedulerOutput(Output):
    """What ``step`` returns: the next sample and, from solvers that predict it, the clean one."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class SchedulerMixin:
    """Base of schedulers, beside ``ConfigMixin``: loading, saving, and which classes may take this one's place."""

    config_name: ClassVar[str | None] = CONFIG_NAME
    has_compatibles: ClassVar[bool] = True
    _compatibles: ClassVar[Sequence[str]] = ()

    @classmethod
    def from_pretrained(
        cls: type[T],
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **overrides: Any,
    ) -> T | tuple[T, dict[str, Any]]:
        """Read ``scheduler_config.json`` of a folder or a Hub repository; it may be another scheduler's.

        ``overrides`` are fields of the configuration and the arguments of ``load_config``.

        Raises CheckpointNotFoundError if there is none, ConfigError for values this class does not implement.
        """
        source = pretrained_model_name_or_path
        config, overrides = cls.load_config(source, return_unused_kwargs=True, subfolder=subfolder, **overrides)
        return cls.from_config(config, return_unused_kwargs, **overrides)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False) -> None:
        """Write ``scheduler_config.json`` into ``save_directory`` (made if missing), as the reference reads it."""
        self.save_config(save_directory, push_to_hub)

    @property
    def compatibles(self) -> list[type]:
        """The scheduler classes that may take this one's place, itself included; LCM and TCD have no other."""
        return self._get_compatibles()

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        names = dict.fromkeys([cls.__name__, *cls._compatibles])
        return [kind for kind in map(public, names) if kind is not None]
