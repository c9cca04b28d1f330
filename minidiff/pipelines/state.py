"""What belongs to one call of a pipeline over latents: its ``Run``, and the types of the parts that work on it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

from minidiff.adapters.lora import scale_argument
from minidiff.noise import Generators
from minidiff.pipelines.foreign import ByFace
from minidiff.schedulers.base import Plan, Scheduler

if TYPE_CHECKING:
    from minidiff.images.tensors import Images

FACTS = (  # what a program may ask about a call after it
    *("guidance_scale", "guidance_rescale", "clip_skip", "cross_attention_kwargs", "interrupt"),
    *("denoising_start", "denoising_end", "image_guidance_scale", "timestep_cond"),
)
KEPT = (
    *FACTS,
    "num_timesteps",
    "core",
    "guidance",
    "told_guidance",
    "plan",
    "stop",
    "seeds",
    "dropped",
    "images",
    "flagged",
)


class computed:  # lower case, as it is used like ``property``
    """A property that an instance may replace, by assigning to it."""

    def __init__(self, compute: Callable[[Any], Any]) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else self.compute(instance)


class Step(NamedTuple):
    """One step of a generation, as ``pipe.steps(...)`` yields it."""

    index: int  # 0, 1, 2...
    timestep: Tensor  # 0-d: what the UNet was told
    latents: Tensor  # (B, C, H, W), after the step
    denoised: Tensor  # (B, C, H, W), the clean latents that the UNet predicted at this step; ``pipe.decode`` shows them


Condition = Callable[[Tensor, Tensor, "Run"], Mapping[str, Any]]
"""(x, t, run) -> arguments of the UNet's ``forward``: what it is shown in this step besides the text."""


class Guidance(Protocol):
    """How a step makes one prediction of those for several texts."""

    copies: int  # of the latents, that the UNet is shown

    def wanted(self, run: "Run") -> bool:
        """Whether the scales of the run ask for it."""

    def rows(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Return what the UNet is shown in one batch, in the order that ``combine`` expects."""

    def combine(self, out: Tensor, run: "Run") -> Tensor:
        """Return the guided prediction (B, C, H, W) from those for all copies (copies * B, C, H, W)."""


@dataclass(eq=False)
class Run:
    """The state of one call. Callbacks may change ``guidance_scale``, the tensors, and ``interrupt``.

    ``tensors`` are those that callbacks may ask for besides the latents, each with a row for every copy of the latents
    that the UNet is shown (but ``negative_prompt_embeds``, which prompt_embeds holds already).
    """

    core: Scheduler | ByFace  # what takes the steps
    guidance: Guidance
    generator: Generators
    seeds: list[int] | None
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    image_guidance_scale: float | None = None
    clip_skip: int | None = None
    cross_attention_kwargs: Mapping[str, Any] | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    told_guidance: bool = False  # the UNet is told the scale instead of being asked twice (LCM)

    plan: Plan = field(init=False, repr=False)
    stop: int | None = None  # the step before which the run ends; None = it takes all
    latents: Tensor = field(init=False, repr=False)  # (B, C, H, W)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    beside: tuple[str, ...] = ()  # the tensors that the UNet reads as further channels of its sample
    conditions: Sequence[Condition] = ()
    after_step: Callable[["Run", int, Tensor], Tensor] | None = None  # the task's, on the latents
    task_state: Any = None  # what the task remembers until the pictures are there
    dropped: dict[str, list[str]] | None = None  # argument -> what was cut off each of its texts
    timestep_cond: Tensor | None = None  # the encoded guidance scale, (1, width), for a UNet that is told it

    interrupt: bool = False
    step: int = 0  # of the plan, the one being taken
    x: Tensor | None = None  # what the step began with
    out: Tensor | None = None  # the guided prediction of the step
    images: "Images | None" = None
    flagged: list[bool] | None = None  # the pictures that a safety checker objects to; None = nobody looked

    @property
    def indices(self) -> range:
        """The steps of the plan that this run takes."""
        return range(self.plan.start, len(self.plan.coefficients) if self.stop is None else self.stop)

    @property
    def guided(self) -> bool:
        """Whether this step asks the UNet for several texts."""
        return not self.told_guidance and self.guidance.wanted(self)

    @property
    def passes(self) -> int:
        """How many copies of the latents this step shows the UNet."""
        return self.guidance.copies if self.guided else 1

    @computed
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
        for name, rows in self.tensors.items():
            if name != "negative_prompt_embeds" and rows is not None and len(rows) != B * self.passes:
                raise ValueError(
                    f"{name} has {len(rows)} rows for {B} pictures, and guidance_scale={self.guidance_scale} needs "
                    f"{self.passes} each: a callback that changes guidance or the pictures should return {name} with "
                    "rows to match, such as tensor.chunk(2)[-1] when guidance ends"
                )

    def forget(self) -> None:
        """Let go of everything but the numbers that a program may ask about after the call."""
        vars(self).update({name: None for name in vars(self) if name not in KEPT})
