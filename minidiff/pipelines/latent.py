"""What every pipeline over latents does with a prepared run: the loop of a call, steps one by one, and decoding."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from minidiff.adapters.lora import lora_scaled
from minidiff.adapters.lora_loader import LoraLoader
from minidiff.adapters.textual_inversion import TextualInversionLoader
from minidiff.errors import ConfigError
from minidiff.networks.unet import UNet2DConditionModel
from minidiff.networks.vae import AutoencoderKL, DiagonalGaussian
from minidiff.outputs import Output
from minidiff.pipelines.base import DiffusionPipeline
from minidiff.pipelines.by_hand import ByHand
from minidiff.pipelines.callbacks import RUNS, Callback, Callbacks, Handling, OldCallback
from minidiff.pipelines.common import FACTS, Run, Step, denoise, initial_latents
from minidiff.pipelines.foreign import STEPS, ByFace, core_of, first, overridden
from minidiff.pipelines.request import Generators, Request, check_choice, check_count
from minidiff.schedulers.base import Plan, Scheduler
from minidiff.threads import computing

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from minidiff.images.processor import VaeImageProcessor
    from minidiff.images.regions import Region

    Images = list[Image.Image] | np.ndarray | Tensor

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class computed:  # lower case, as it is used like ``property``
    """A property that an instance may replace, by assigning to it."""

    def __init__(self, compute: Callable[[Any], Any]) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else self.compute(instance)


class LatentPipeline(ByHand, Callbacks, LoraLoader, TextualInversionLoader, DiffusionPipeline):
    """Base of the pipelines over latents. A subclass provides ``_start`` and ``_network``."""

    _optional_components: ClassVar[tuple[str, ...]] = ("image_encoder", "feature_extractor")
    output_class: ClassVar[type[Output]]  # of a call; has images, seeds and dropped, and the names of reference_fields
    unet_inputs: ClassVar[tuple[str, ...]] = ("latents",)  # what its UNets may read: keys of ``UNET_INPUTS``
    _calls: ClassVar[tuple[str, ...]] = ("encode_prompt", "prepare_extra_step_kwargs", "prepare_latents")

    @computed
    def vae_scale_factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae is not None else 8

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "pil") -> "Images":
        """Turn latents of the diffusion process (B, C, H, W) into pictures, as ``output_type`` of a call says.

        Raises:
            ValueError: if the decoded pictures hold NaN or infinity, naming the fix.
        """
        if output_type == "latent":
            return latents
        return self.image_processor.postprocess(self._decoded(latents), output_type)

    def _decoded(self, latents: Tensor) -> Tensor:
        if self.vae is None:
            raise ValueError("this pipeline has no vae: take the latents with output_type='latent'")
        vae = self._decoder()
        return first(vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor), "sample")

    def _decoder(self) -> AutoencoderKL:
        """Return the autoencoder in the dtype that it is to decode in."""
        return self.vae

    def _encoder(self) -> AutoencoderKL:
        """Return the autoencoder in the dtype that it is to encode in."""
        return self.vae

    @computed
    def image_processor(self) -> "VaeImageProcessor":
        """What prepares the images of this pipeline and makes pictures; another may be assigned."""
        from minidiff.images.processor import VaeImageProcessor  # brings PIL

        return VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, vae_latent_channels=self._latent_channels)

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Attenuate the UNet's skips by s and amplify the rest by b; see ``minidiff.networks.freeu``."""
        self.unet.enable_freeu(s1, s2, b1, b2)

    def disable_freeu(self) -> None:
        """Let the UNet compute as it was trained."""
        self.unet.disable_freeu()

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Do nothing, and say so: ``optimize`` is minidiff's way to be faster."""
        self.unet.fuse_qkv_projections()

    def unfuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Do nothing: nothing was fused."""

    @property
    def _latent_channels(self) -> int:
        return self.unet.config.out_channels if self.vae is None else self.vae.config.latent_channels

    def _read_image(
        self, image: Any, height: int | None = None, width: int | None = None, region: "Region | None" = None
    ) -> Tensor:
        """Return pixels (B, 3, H, W) in [-1, 1] or latents, see ``to_tensor``."""
        from minidiff.images.processor import to_tensor  # brings PIL

        channels = 3 if self.vae is None else self.vae.config.in_channels
        own = (self.vae_scale_factor, self._latent_channels, channels)
        return to_tensor(image, *own, height, width, region, self.image_processor)

    def _encode_image(
        self, x: Tensor, count: int, generator: Generators, like: Tensor, one_each: bool = True
    ) -> Tensor:
        """Return clean latents (count, Z, h, w), dealt out to the pictures in turn, in dtype and on the device of like.

        Args:
            x: pixels (B, 3, H, W) in [-1, 1], whose latents are drawn from the autoencoder's Gaussian and scaled; or
                latents (B, Z, h, w), which are taken as they are.
            generator: of a list, each draws for the picture it belongs to (``one_each``), or the first ones draw for
                the images.

        Raises:
            ValueError: if the images cannot be dealt out evenly, or there is no autoencoder for pixels.
        """
        if x.shape[1] == self._latent_channels:
            return dealt(x.to(like), count)
        if self.vae is None:
            raise ValueError("this pipeline has no vae: pass latents as image")
        vae = self._encoder()
        posterior = first(vae.encode(x.to(like).to(vae.dtype)), "latent_dist")
        if isinstance(generator, (list, tuple)) and one_each:
            posterior = DiagonalGaussian(dealt(posterior.parameters, count))
        elif isinstance(generator, (list, tuple)):
            generator = generator[: len(x)]
        return dealt(vae.config.scaling_factor * posterior.sample(generator).to(like), count)

    # --- one run -----------------------------------------------------------------------------------------------------

    def _start(self, request: Request) -> Run:
        """Encode the texts, plan the steps and make the first latents."""
        raise NotImplementedError

    def _network(self, x: Tensor, t: Tensor, run: Run) -> Tensor:
        """Predict from what the scheduler shows the network."""
        raise NotImplementedError

    def _begin(self, request: Request) -> Run:
        """Start a run with LoRA adapters at the request's scale; ``_predict`` keeps them there."""
        if absent := [f"no {name}" for name in ("unet", "scheduler") if getattr(self, name) is None]:
            it = "it" if len(absent) == 1 else "them"
            raise ValueError(f"this pipeline has {' and '.join(absent)}: pass {it} when it is made")
        self._say_what_is_scaled(request.lora_scale)
        self._refuse_what_is_not_called()
        width = self.unet.config.get("time_cond_proj_dim")
        object.__setattr__(request, "tells_guidance", width is not None)
        facts = {name: getattr(request, name) for name in FACTS if hasattr(request, name)} | {"core": core_of(self)}
        RUNS.set(self, SimpleNamespace(**facts, interrupt=False, guided=request.guided))
        with lora_scaled(request.lora_scale):
            run = self._start(request)
        vars(run).update(facts)
        if width is not None:
            w = torch.tensor([request.guidance_scale - 1])
            run.timestep_cond = self.get_guidance_scale_embedding(w, width).to(run.latents)
        return run

    @property
    def _core(self) -> "Scheduler | ByFace":
        """What takes the steps of the call that is under way in this thread."""
        return RUNS.get(self).core

    def _refuse_what_is_not_called(self) -> None:
        """Raise if a program overrides a method that the reference's call goes through and ours does not."""
        for name in STEPS:
            if name not in self._calls and overridden(self, name):
                raise TypeError(
                    f"{type(self).__name__}.{name} is overridden, and a call does not go through it: override "
                    f"{' or '.join(self._calls)}, or write a __call__ of your own"
                )

    def _noise(
        self, shape: tuple[int, ...], request: Request, plan: Plan, generator: Generators, like: Tensor
    ) -> Tensor:
        """Return the noise (B, C, h, w) of the plan's first level: given, drawn, or from ``prepare_latents``."""
        if overridden(self, "prepare_latents"):
            (B, C, h, w), f = shape, self.vae_scale_factor
            given = (like.dtype, like.device, generator, request.latents)
            return self.prepare_latents(B, C, h * f, w * f, *given)
        return initial_latents(shape, request.latents, generator, like.device, like.dtype) * plan.init_noise_sigma

    def _predict(self, x: Tensor, t: Tensor, run: Run) -> Tensor:
        with lora_scaled(run.lora_scale), computing(run):
            if not self._optimized:
                return self._network(x, t, run)
            from minidiff.fast.memo import Memo

            run.memo = run.memo or Memo(run.plan.timesteps)
            alone = x.shape[1] == self.unet.config.in_channels  # the UNet sees nothing else that could differ
            with run.memo.at(run.step, run.passes if alone else 1):
                return self._network(x, t, run)

    @property
    def _optimized(self) -> bool:
        return "_time_condition" in vars(self.unet)  # put there by ``minidiff.fast.optimize``

    def _handling(
        self, output_type: str, callback: Callback | None, tensors: Sequence[str], others: Mapping[str, Any]
    ) -> Handling:
        """Check what is to be done with steps and result, and that ``others``, unknown arguments, ask for nothing.

        A callback that is an object may name the tensors that it wants, as its ``tensor_inputs``.
        """
        others = dict(others)
        old = OldCallback.of(others.pop("callback", None), others.pop("callback_steps", None))
        if asked := [name for name, value in others.items() if value is not None]:
            raise TypeError(f"{type(self).__name__} does not implement the argument(s) {', '.join(asked)}")
        check_choice("output_type", output_type, _OUTPUT_TYPES)
        handling = Handling(output_type, callback, getattr(callback, "tensor_inputs", tensors) or (), old)
        for name in handling.callback_tensors:
            check_choice("callback_on_step_end_tensor_inputs", name, self._callback_tensor_inputs)
        return handling

    @torch.no_grad()
    def _respond(self, request: Request, handling: Handling, return_dict: bool) -> "Output | tuple[Any, ...]":
        """Do what a call does once its arguments are checked: run all steps; return the record or the tuple."""
        run = self._begin(request)
        with self._going_on(run):
            images = self._finish(run, handling)
            out = self.output_class(images=images, seeds=run.seeds, dropped=run.dropped)
            if run.flagged is not None:
                out.nsfw_content_detected = run.flagged
        return out if return_dict else tuple(getattr(out, name) for name in self.output_class.reference_fields)

    def _finish(self, run: Run, handling: Handling) -> "Images":
        """Take all steps of a run, with progress bar and callback, and decode."""
        counted = self._counted(run)
        with self.progress_bar(total=len(counted)) as bar:
            for i, _, _ in denoise(self._predict, run):
                self._call_back(handling, run, i)
                if i in counted:
                    bar.update()
                    self._call_back_as_before(handling, run, i)
        images = self._pictures(run, handling.output_type)
        self.maybe_free_model_hooks()
        return images

    def _pictures(self, run: Run, output_type: str) -> "Images":
        """Decode, and let ``run_safety_checker`` look at pixels in [-1, 1], where a program has set one."""
        checked = getattr(self, "safety_checker", None) is not None or overridden(self, "run_safety_checker")
        if output_type == "latent" or not checked:
            return self.decode(run.latents, output_type)
        image = self._decoded(run.latents)
        image, run.flagged = self.run_safety_checker(image, image.device, run.prompt_embeds.dtype)
        signed = None if run.flagged is None else [not flag for flag in run.flagged]
        return self.image_processor.postprocess(image, output_type, signed)

    def _counted(self, run: Run) -> list[int]:
        """Return the evaluations that end a step for the progress bar: solvers may take several, or some to warm up."""
        order, plan = run.core.order, run.plan
        warmup = max(len(plan.steps) - plan.num_inference_steps * order, 0)
        indices = run.indices
        return [i for k, i in enumerate(indices, start=1) if k == len(indices) or (k > warmup and k % order == 0)]

    @torch.no_grad()
    def _yield_steps(self, run: Run) -> Iterator[Step]:
        with self._going_on(run):
            for i, x, out in denoise(self._predict, run):
                x0 = run.core.denoised(run.plan, i, x, out)
                yield Step(i - run.plan.start, run.plan.timesteps[i], run.latents, x0)

    def _latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return height and width in latents; a side that was not given is what the UNet was trained on."""
        f = self.vae_scale_factor
        default = self._trained_size()
        sizes = []
        for name, pixels, latent in (("height", height, default[0]), ("width", width, default[1])):
            if pixels is None and latent is None:
                raise ValueError(f"{name} must be given: this UNet's config has no sample_size")
            if pixels is None:
                pixels = latent * f
            check_count(name, pixels)
            if pixels % f:
                raise ValueError(f"{name} should be divisible by {f}, found {pixels}; {pixels - pixels % f} would do")
            sizes.append(pixels // f)
        return sizes[0], sizes[1]

    def _trained_size(self) -> tuple[int | None, int | None]:
        """Return the latent height and width that the UNet was trained on, (None, None) if its config does not say."""
        size = self.unet.config.sample_size
        return (size[0], size[1]) if isinstance(size, list) else (size, size)

    def _check_width(self, name: str, embeds: Tensor | None) -> None:
        D = self.unet.config.cross_attention_dim
        if embeds is not None and embeds.shape[-1] != D:
            raise ValueError(
                f"{name} should be (B, L, {D}) for this UNet ({family(D)}), found {tuple(embeds.shape)} "
                f"({family(embeds.shape[-1])})"
            )


class UNetInput(NamedTuple):
    """What a UNet reads: that many of the autoencoder's latents, and further channels."""

    latents: int
    further: int
    what: str
    pipeline: str  # the end of the name of the pipeline that shows it this


UNET_INPUTS = {
    "latents": UNetInput(1, 0, "a text-to-image UNet", "Pipeline"),
    "image": UNetInput(2, 0, "an instruct-pix2pix UNet, which also reads the image", "InstructPix2PixPipeline"),
    "mask": UNetInput(2, 1, "an inpainting UNet, which also reads mask and masked image", "InpaintPipeline"),
}


def check_channels(
    pipeline: type[LatentPipeline], vae: AutoencoderKL | None, unet: UNet2DConditionModel | None
) -> None:
    """Raise ``ConfigError`` if the UNet does not read what the pipeline shows it, naming the pipeline that does."""
    if not hasattr(unet, "spec"):  # absent, or of another make
        return
    Z = unet.config.out_channels if vae is None else vae.config.latent_channels
    channels = {name: kind.latents * Z + kind.further for name, kind in UNET_INPUTS.items()}
    expected = [channels[name] for name in pipeline.unet_inputs]
    found = unet.config.in_channels
    if unet.config.out_channels == Z and found in expected:
        return
    for name, kind in UNET_INPUTS.items():
        if channels[name] == found and unet.config.out_channels == Z:
            family = "StableDiffusion" if unet.spec.added is None else "StableDiffusionXL"
            advice = f"this is {kind.what}: use {family}{kind.pipeline}"
            break
    else:
        advice = "no pipeline of minidiff takes this UNet"
    raise ConfigError(
        f"vae and unet do not fit {pipeline.__name__}: for {Z} latent channels it takes a UNet with in_channels "
        f"{' or '.join(map(str, expected))} and out_channels {Z}, found in_channels {found} and out_channels "
        f"{unet.config.out_channels}; {advice}"
    )


def dealt(x: Tensor, count: int, what: str = "images") -> Tensor:
    """Repeat a batch (B, ...) in turn until it has ``count`` items; raise ``ValueError`` if that does not come out."""
    if len(x) > count or count % len(x):
        raise ValueError(f"{len(x)} {what} cannot be dealt out to {count} pictures evenly")
    return x.repeat(count // len(x), *[1] * (x.ndim - 1))


def family(D: int) -> str:
    """Return which published models have text embeddings of width ``D``."""
    return {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL refiner", 2048: "SDXL base"}.get(D, "no published family")
