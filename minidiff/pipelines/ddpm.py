"""DDPM and DDIM: noise -> pictures, with nothing to steer by. The smallest pipeline, and the place to start reading.

    x_T ~ N(0, I);  for each step  out = unet(x, t);  x = scheduler.advance(x, out)

Papers: Ho et al. 2020 (DDPM, https://arxiv.org/abs/2006.11239), algorithm 2; Song et al. 2021 (DDIM,
https://arxiv.org/abs/2010.02502). Checked against ``diffusers.DDPMPipeline`` and ``diffusers.DDIMPipeline``, seed for
seed. The two differ in their defaults and in that the second one always samples with DDIM.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minidiff.errors import MOST
from minidiff.networks.unet_unconditional import UNet2DModel
from minidiff.noise import Generators, make_generators, randn
from minidiff.outputs import Output
from minidiff.pipelines.base import DiffusionPipeline
from minidiff.pipelines.foreign import ByFace, core_of, first
from minidiff.pipelines.request import as_python, check_choice, check_count, check_number
from minidiff.pipelines.state import Step
from minidiff.schedulers.base import Plan, Scheduler
from minidiff.schedulers.ddim import DDIMScheduler

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

_OUTPUT_TYPES = ("pil", "np", "pt")


@dataclass
class ImagePipelineOutput(Output):
    """What a call returns: the pictures and, if ``seed`` or ``seeds`` was given, the seed of each."""

    images: "list[Image.Image] | np.ndarray | Tensor"
    seeds: list[int] | None = None


@dataclass(frozen=True)
class PictureRequest:
    """What a caller asks for: how many pictures, in how many steps, and what draws their noise.

    Attributes:
        batch_size: the number of pictures, B.
        num_inference_steps: UNet evaluations (for most schedulers).
        generator: one, drawing for the whole batch, or a list with one per picture; default: torch's global one.
        seed, seeds: one CPU generator per picture: ``seeds`` lists them, ``seed=s`` means s, s + 1...
        eta: stochasticity of DDIM, 0 to 1; schedulers without it ignore it, as in the reference.
        use_clipped_model_output: of DDIM, see its ``step``; None leaves it to the scheduler.
    """

    num_inference_steps: int
    batch_size: int = 1
    generator: Generators = None
    seed: int | None = None
    seeds: Sequence[int] | None = None
    eta: float = 0.0
    use_clipped_model_output: bool | None = None

    def __post_init__(self) -> None:
        as_python(self)
        check_count("batch_size", self.batch_size, MOST)
        check_number("eta", self.eta, 0, 1)

    @property
    def count(self) -> int:
        """The number of pictures."""
        return self.batch_size


@dataclass
class PictureRun:
    """The state of one call: nothing of it is kept on the pipeline, so any number of threads may share that."""

    core: Scheduler | ByFace  # what takes the steps
    plan: Plan
    x: Tensor  # (B, C, H, W)
    generator: Generators
    seeds: list[int] | None


class UnconditionalPipeline(DiffusionPipeline):
    """What the two pipelines share: everything but the arguments of a call."""

    def __init__(self, unet: UNet2DModel, scheduler: Scheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def _respond(self, arguments: Mapping[str, Any]) -> ImagePipelineOutput | tuple[Any]:
        """Do what a call does; ``arguments`` are its ``locals()``."""
        asked = {name: value for name, value in arguments.items() if name != "self"}
        output_type, return_dict = asked.pop("output_type"), asked.pop("return_dict")
        check_choice("output_type", output_type, _OUTPUT_TYPES)
        run = self._start(PictureRequest(**asked))
        with self.progress_bar(total=len(run.plan.coefficients)) as bar:
            for _ in self._denoise(run):
                bar.update()
        images = self.decode(run.x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images, run.seeds) if return_dict else (images,)

    def steps(self, *args: Any, **arguments: Any) -> Iterator[Step]:
        """Generate step by step: yield a ``Step`` after each, with x and the clean pictures predicted.

        The arguments are those of a call that concern the generation::

            for step in pipe.steps(num_inference_steps=50, seed=7):
                preview = pipe.decode(step.denoised)
        """
        call = inspect.signature(self.__call__)
        given = {**call.bind_partial(*args).arguments, **arguments}
        given.setdefault("num_inference_steps", call.parameters["num_inference_steps"].default)
        return self._yield_steps(self._start(PictureRequest(**given)))

    @torch.no_grad()
    def _yield_steps(self, run: PictureRun) -> Iterator[Step]:
        for i, x, out in self._denoise(run):
            yield Step(i, run.plan.timesteps[i], run.x, run.core.denoised(run.plan, i, x, out))

    def _start(self, request: PictureRequest) -> PictureRun:
        """Plan the steps and draw the noise."""
        unet, scheduler, device = self.unet, core_of(self), self.device
        options: dict[str, Any] = {"eta": request.eta} if "eta" in scheduler.run_options else {}
        if request.use_clipped_model_output is not None:
            options["use_clipped_model_output"] = request.use_clipped_model_output
        plan = scheduler.plan(request.num_inference_steps, device=device, **options)
        scheduler.show(plan)
        if unet.config.time_embedding_type == "fourier" and min(plan.times) <= 0:
            raise ValueError(
                f"{type(self.scheduler).__name__} visits timestep {min(plan.times):g}, but this UNet takes the "
                "logarithm of the time (time_embedding_type 'fourier'), so that the pictures would be NaN"
            )
        generator, seeds = make_generators(request)
        shape = (request.count, unet.config.in_channels, *_trained_size(unet))
        noise = randn(shape, generator, device=device, dtype=unet.dtype)
        return PictureRun(scheduler, plan, noise * plan.init_noise_sigma, generator, seeds)

    def _denoise(self, run: PictureRun) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Take every step of the run; yield its index, the x it started from and the prediction ``out``."""
        scheduler, plan, past = run.core, run.plan, ()
        for i in range(plan.start, len(plan.coefficients)):
            x = run.x
            out = first(self.unet(scheduler.scale_input(plan, i, x), plan.timesteps[i]), "sample")
            noise = scheduler.draw_noise(plan, i, x, run.generator)
            run.x, past = scheduler.advance(plan, i, x, out, past, noise)
            scheduler.show(plan, i + 1)
            yield i, x, out

    def decode(self, x: Tensor, output_type: str = "pil") -> "list[Image.Image] | np.ndarray | Tensor":
        """Turn the x of the process (B, C, H, W), pixels in [-1, 1], into pictures, as ``output_type`` of a call says.

        Raises:
            ValueError: if they hold NaN or infinity.
        """
        from minidiff import images  # brings PIL

        return {"pil": images.to_pil, "np": images.to_numpy, "pt": images.to_unit}[output_type](x)


class DDPMPipeline(UnconditionalPipeline):
    """Generate pictures with an unconditional UNet, by default in all the 1000 steps of the process it learned.

    Args:
        unet: predicts in pixels, or in whatever its pictures are made of.
        scheduler: any.
    """

    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 1000,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate pictures of the size that the UNet was trained on.

        Args: see ``PictureRequest``; besides
            batch_size: the number of pictures, B.
            output_type: "pil", "np" (B, H, W, C) in [0, 1], or "pt" (B, C, H, W) in [0, 1].
            return_dict: whether to return a record or the tuple (images,).

        Raises:
            TypeError, ValueError: naming the argument, what was found and what was expected.
        """
        return self._respond(locals())


class DDIMPipeline(UnconditionalPipeline):
    """Generate pictures with an unconditional UNet and DDIM, by default in 50 steps and without noise on the way.

    Args:
        unet: predicts in pixels, or in whatever its pictures are made of.
        scheduler: any; what is used is a ``DDIMScheduler`` with its configuration.
    """

    def __init__(self, unet: UNet2DModel, scheduler: Scheduler) -> None:
        super().__init__(unet, DDIMScheduler.from_config(scheduler.config))

    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate pictures of the size that the UNet was trained on.

        Args: see ``PictureRequest``, and ``DDPMPipeline`` for the others.

        Raises:
            TypeError, ValueError: naming the argument, what was found and what was expected.
        """
        return self._respond(locals())


def _trained_size(unet: UNet2DModel) -> tuple[int, int]:
    """Return the height and width that the UNet was trained on."""
    size = unet.config.sample_size
    sizes = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(sizes) != 2:
        raise ValueError(f"the UNet's sample_size should be a number or (height, width) to draw noise, found {size}")
    return sizes
