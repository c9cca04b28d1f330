"""Latent consistency models: pictures in two to eight steps, by a UNet that is told how strongly to guide.

    x0 = f(x, t, text, guidance_scale - 1);  x = noised(x0, next t)

They were distilled from Stable Diffusion 1.x with guidance by the empty text, so they know no negative prompt, and are
asked once per step, whatever the scale. ``StableDiffusionPipeline`` does the same with such a UNet
(``time_cond_proj_dim``); these are the classes that the index of ``SimianLuo/LCM_Dreamshaper_v7`` names, with the
defaults of the paper and with ``original_inference_steps``.

Paper: Luo et al. 2023 (https://arxiv.org/abs/2310.04378). Checked against ``diffusers.LatentConsistencyModelPipeline``
and ``LatentConsistencyModelImg2ImgPipeline``, seed for seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from minidiff.errors import ConfigError, check_count
from minidiff.noise import Generators
from minidiff.pipelines.callbacks import Callback, OutputOptions
from minidiff.pipelines.image_to_image import ImageToImage
from minidiff.pipelines.request import Prompt, Request
from minidiff.pipelines.request_image import ImageRequest
from minidiff.pipelines.run import LatentGeneration, TextToImage
from minidiff.pipelines.stable_diffusion import StableDiffusion, StableDiffusionPipelineOutput
from minidiff.pipelines.state import Condition, Run
from minidiff.schedulers.base import Plan

if TYPE_CHECKING:
    from minidiff.images.tensors import Images


@dataclass(frozen=True)
class AsksForConsistency:
    """What the two pipelines below ask for besides the fields of ``Request``.

    Attributes:
        original_inference_steps: how many timesteps the model was distilled on; default: the scheduler's (50).
    """

    num_inference_steps: int = 4
    guidance_scale: float = 8.5
    original_inference_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.original_inference_steps is not None:
            check_count("original_inference_steps", self.original_inference_steps)
        for name in ("negative_prompt", "negative_prompt_embeds"):  # fields of a request, which ``steps`` would take
            if getattr(self, name) is not None:
                raise TypeError(f"this task takes no {name}: the model was distilled with the empty text")


@dataclass(frozen=True)
class ConsistencyRequest(AsksForConsistency, Request):
    """The arguments of one generation from text."""


@dataclass(frozen=True)
class ConsistencyImageRequest(AsksForConsistency, ImageRequest):
    """The arguments of one generation from an image; ``latents`` are taken as they are, noised already."""

    absent: ClassVar[tuple[str, ...]] = ("height", "width", "guidance_rescale")


class LatentConsistency(LatentGeneration):
    """What both tasks share: the timesteps of distillation, and a UNet that is told the guidance scale."""

    scheduler_corrections: ClassVar[Mapping[str, Any]] = {}
    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = ("latents", "denoised", "prompt_embeds", "w_embedding")

    def _open(self, request: Request) -> Run:
        run = super()._open(request)
        if not run.told_guidance:
            raise ConfigError(
                f"{type(self).__name__} tells the UNet the guidance scale, and this one has no time_cond_proj_dim: use "
                "StableDiffusionPipeline, which guides it"
            )
        return run

    def _plan(self, request: Any, run: Run) -> Plan:
        """Plan all steps; ``strength`` shortens the timesteps of distillation, not the number of steps."""
        options = {"original_inference_steps": request.original_inference_steps}
        options |= {"strength": request.strength} if isinstance(request, ImageRequest) else {}
        steps = None if request.timesteps is not None else request.num_inference_steps
        plan = run.core.plan(steps, device=self.device, timesteps=request.timesteps, **options)
        run.core.show(plan)
        return plan

    def _conditions(self, request: Request, run: Run) -> list[Condition]:
        """Return what tells the UNet the guidance scale, with a row for each picture that callbacks may change."""
        super()._conditions(request, run)
        run.tensors["w_embedding"] = run.timestep_cond.expand(len(run.latents), -1)
        return [lambda x, t, run: {"timestep_cond": run.tensors["w_embedding"]}]

    def _call_back(self, options: OutputOptions, run: Run, ends_step: bool) -> None:
        """Let callbacks see, and change, the clean latents."""
        if "denoised" not in options.callback_tensors:
            super()._call_back(options, run, ends_step)
            return
        run.tensors["denoised"] = run.core.denoised(run.plan, run.step, run.x, run.out)
        super()._call_back(options, run, ends_step)
        run.task_state = run.tensors.pop("denoised")

    def _pictures(self, run: Run, output_type: str) -> "Images":
        """Decode the clean latents of the last step: given ``timesteps`` and a strength, noise comes upon the latents.

        So it is in the reference, where the scheduler counts the timesteps before the strength takes some away.
        """
        if run.task_state is not None:
            run.latents = run.task_state
        elif run.out is not None:
            run.latents = run.core.denoised(run.plan, run.step, run.x, run.out)
        return super()._pictures(run, output_type)


class LatentConsistencyModelPipeline(LatentConsistency, TextToImage, StableDiffusion):
    """Text to image with a latent consistency model; components and errors are those of ``StableDiffusion``."""

    request = ConsistencyRequest

    def __call__(
        self,
        prompt: Prompt = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        guidance_scale: float = 8.5,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        long_prompt: str = "cut",
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        **not_implemented: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any, ...]:
        """Generate pictures.

        Args: the fields of ``ConsistencyRequest`` describe the generation; the rest is as for
            ``StableDiffusionPipeline``.

        Raises:
            ConfigError: if the UNet is not told the guidance scale.
            TypeError, ValueError: naming the argument, what was found and what was expected.
        """
        return self._respond(locals())


class LatentConsistencyModelImg2ImgPipeline(LatentConsistency, ImageToImage, StableDiffusion):
    """Image to image with a latent consistency model; components and errors are those of ``StableDiffusion``."""

    request = ConsistencyImageRequest

    def __call__(
        self,
        prompt: Prompt = None,
        image: Any = None,
        num_inference_steps: int = 4,
        strength: float = 0.8,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        guidance_scale: float = 8.5,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        long_prompt: str = "cut",
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        **not_implemented: Any,
    ) -> StableDiffusionPipelineOutput | tuple[Any, ...]:
        """Generate pictures from pictures, in all of ``num_inference_steps`` steps.

        Args: the fields of ``ConsistencyImageRequest`` describe the generation; the rest is as for
            ``StableDiffusionPipeline``.

        Raises:
            ConfigError: if the UNet is not told the guidance scale.
            TypeError, ValueError: naming the argument, what was found and what was expected.
        """
        return self._respond(locals())
