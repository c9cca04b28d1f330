"""The story of every generation with latents, and the loop that it ends in.

    x_0 <- x_T ~ N(0, I):  for each step  out = guide(unet(x, t, text));  x = scheduler.advance(x, out)

``LatentGeneration._generate`` tells it, whatever the pipeline. A pipeline is made of parts that each say one thing:

    family      how texts become a condition                       Stable Diffusion, Stable Diffusion XL
    task        where a run begins, and what the UNet reads        ``TextToImage`` below, image to image,
                beside the latents                                 inpainting, editing
    condition   what else the UNet is shown at every step          sizes (XL), the guidance scale (LCM)
    guidance    how predictions for several texts become one       ``ClassifierFree`` below, two scales (editing)

What belongs to one call is in its ``Run`` (``minidiff.pipelines.state``); the pipeline object is never written to, and
of the scheduler the pure core is used, so any number of threads may share both.

Classifier-free guidance: Ho & Salimans 2022 (https://arxiv.org/abs/2207.12598), equation 6. Its rescaling: Lin et al.
2023 (https://arxiv.org/abs/2305.08891), section 3.4.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from minidiff.adapters.lora import lora_scaled
from minidiff.noise import initial_latents, make_generators
from minidiff.outputs import Output
from minidiff.pipelines.callbacks import Callbacks, OutputOptions
from minidiff.pipelines.foreign import core_of, encoding, first, overridden
from minidiff.pipelines.not_finite import cause, first_layer, is_finite
from minidiff.pipelines.request import Request
from minidiff.pipelines.state import FACTS, Condition, Guidance, Run, Step
from minidiff.pipelines.strength import steps_until
from minidiff.schedulers.base import Plan
from minidiff.threads import computing

if TYPE_CHECKING:
    from minidiff.images.tensors import Images


# --- guidance --------------------------------------------------------------------------------------------------------


def guide(negative: Tensor, positive: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Return negative + scale (positive - negative), its contrast pulled back to that of ``positive``.

    Args:
        negative: prediction for the negative (or empty) prompt, (B, C, H, W).
        positive: prediction for the prompt, (B, C, H, W).
        scale: 1 is the plain conditional prediction; 7.5 is usual.
        rescale: 0 to 1, how far the standard deviation of each picture goes back to that of ``positive``.
    """
    return rescaled(negative + scale * (positive - negative), positive, rescale)


def rescaled(out: Tensor, positive: Tensor, rescale: float) -> Tensor:
    """Pull the standard deviation of each picture of ``out`` back to that of ``positive``, by the share ``rescale``."""
    if rescale == 0:
        return out
    axes = tuple(range(1, out.ndim))
    full = out * (positive.std(dim=axes, keepdim=True) / out.std(dim=axes, keepdim=True))
    return rescale * full + (1 - rescale) * out


class ClassifierFree:
    """Guidance by one scale: the UNet is asked with and without the prompt, and the difference is enlarged."""

    copies: ClassVar[int] = 2  # of the latents

    def wanted(self, run: Run) -> bool:
        """Whether the scales of the run ask for guidance."""
        return run.guidance_scale > 1

    def rows(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Return what the UNet is shown in one batch, in the order that ``combine`` expects."""
        return torch.cat([negative, positive])

    def combine(self, out: Tensor, run: Run) -> Tensor:
        """Return the guided prediction (B, C, H, W) from those for all copies (copies * B, C, H, W)."""
        return guide(*out.chunk(2), run.guidance_scale, run.guidance_rescale)


# --- the story --------------------------------------------------------------------------------------------------------


class LatentGeneration(Callbacks):
    """The story. Parts of a pipeline answer its questions; each may add to what the next one says (``super()``)."""

    request: ClassVar[type[Request]]  # the arguments of a call that concern the generation
    output_class: ClassVar[type[Output]]  # of a call; has images, seeds and dropped, and the names of reference_fields
    guidance: ClassVar[Guidance] = ClassifierFree()
    _by_position: ClassVar[tuple[str, ...]] = ()  # the arguments that ``encode_prompt`` is given by position

    @torch.no_grad()
    def _generate(self, request: Request, output_type: str | None = None) -> Iterator[Run]:
        """Generate pictures: all that happens, in order. Yield the run before the first step and after each."""
        run = self._open(request)
        with self._going_on(run):
            with lora_scaled(run.lora_scale):
                size = self._size(request)  # task: height and width in latents; None = those of the image
                run.plan = self._plan(request, run)  # task: all steps, or the last ones
                run.stop = steps_until(run.core, run.plan, run.denoising_end)
                run.tensors = self._encode(request, run)  # family: the texts
                run.latents = self._first_latents(request, run, size)  # task: noise, or an image under noise
                run.conditions = self._conditions(request, run)
            yield run
            for _ in denoise(self._predict, run):
                yield run
            if output_type is not None:
                run.images = self._pictures(run, output_type)

    def _size(self, request: Request) -> tuple[int, int] | None:
        """Return the height and width of the latents, None if they are those of an image. A task answers."""
        raise NotImplementedError

    def _first_latents(self, request: Request, run: Run, size: tuple[int, int] | None) -> Tensor:
        """Return what the run begins with, (B, C, h, w) at the noise level of the plan's first step. A task answers.

        It may add to ``run.tensors`` what the UNet reads beside them (``run.beside``), and set ``run.after_step``.
        """
        raise NotImplementedError

    def _embed(self, asked: Mapping[str, Any], read: Any = None) -> tuple[Any, ...]:
        """Return what ``encode_prompt`` does with these arguments, and what was cut off. A family answers."""
        raise NotImplementedError

    def _text_tensors(self, run: Run, *encoded: Tensor | None) -> dict[str, Tensor]:
        """Return encoded texts by their names in ``run.tensors``, a row for each copy. A family answers."""
        raise NotImplementedError

    def _open(self, request: Request) -> Run:
        """Open the run of a request. Raises if this pipeline cannot serve it."""
        if absent := [f"no {name}" for name in ("unet", "scheduler") if getattr(self, name) is None]:
            it = "it" if len(absent) == 1 else "them"
            raise ValueError(f"this pipeline has {' and '.join(absent)}: pass {it} when it is made")
        self._warn_unless_scaled(request.lora_scale)
        self._refuse_what_is_not_called()
        generator, seeds = make_generators(request)
        told = self.unet.config.get("time_cond_proj_dim") is not None
        facts = {name: getattr(request, name) for name in FACTS if hasattr(request, name)}
        return Run(core_of(self), self.guidance, generator, seeds, **facts, told_guidance=told)

    def _plan(self, request: Request, run: Run) -> Plan:
        """Plan all steps; custom ``timesteps`` or ``sigmas`` replace their number; ``eta`` is for DDIM-like solvers."""
        options = {"eta": request.eta} if "eta" in run.core.run_options else {}
        custom = request.timesteps is not None or request.sigmas is not None
        steps = None if custom else request.num_inference_steps
        where = {"device": self.device, "timesteps": request.timesteps, "sigmas": request.sigmas}
        plan = run.core.plan(steps, **where, **options)
        run.core.show(plan)
        return plan

    def _encode(self, request: Request, run: Run) -> dict[str, Tensor]:
        """Encode the texts of a request; return what goes into its run, with a row for each copy of the latents."""
        self._check_clip_skip(request.clip_skip)
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            self._check_width(name, getattr(request, name))
        asked = encoding(request, run.guided, self.device)
        if overridden(self, "encode_prompt"):
            found = self.encode_prompt(*[asked.pop(name) for name in self._by_position], **asked)
        else:
            *found, run.dropped = self._embed(asked)
        return self._text_tensors(run, *found)

    def _conditions(self, request: Request, run: Run) -> list[Condition]:
        """Return what shows the UNet more than the text: here the guidance scale, to a UNet that is told it.

        Asked last: ``run.tensors`` and ``run.latents`` are there. What a condition needs of the request it closes over.
        """
        if not run.told_guidance:
            return []
        w = torch.tensor([run.guidance_scale - 1])
        embedding = self.get_guidance_scale_embedding(w, self.unet.config.time_cond_proj_dim)
        run.timestep_cond = embedding.to(run.latents)
        return [lambda x, t, run: {"timestep_cond": run.timestep_cond}]

    def _predict(self, x: Tensor, t: Tensor, run: Run) -> Tensor:
        """Ask the UNet about what the scheduler shows it, x (passes * B, C, H, W)."""
        x = torch.cat([x, *(run.tensors[name] for name in run.beside)], dim=1) if run.beside else x
        shown: dict[str, Any] = {}
        for condition in run.conditions:
            for name, value in condition(x, t, run).items():  # what is said in a dict is added to those of others
                shown[name] = {**shown.get(name, {}), **value} if isinstance(value, Mapping) else value
        with lora_scaled(run.lora_scale), computing(run):
            return first(self.unet(x, t, encoder_hidden_states=run.tensors["prompt_embeds"], **shown), "sample")

    def _pictures(self, run: Run, output_type: str) -> "Images":
        """Decode, and let ``run_safety_checker`` look at pixels in [-1, 1]; what it flags is black already."""
        if not is_finite(run.latents):
            networks = {name: part for name, part in self._parts().items() if isinstance(part, nn.Module)}
            raise ValueError(f"the latents hold NaN or infinity: {cause(networks, run.tensors)}")
        checked = getattr(self, "safety_checker", None) is not None or overridden(self, "run_safety_checker")
        if output_type == "latent" or not checked:
            return self.decode(run.latents, output_type)
        image = self._decoded(run.latents)
        image, run.flagged = self.run_safety_checker(image, image.device, run.tensors["prompt_embeds"].dtype)
        signed = None if run.flagged is None else [not flag for flag in run.flagged]
        return self.image_processor.postprocess(image, output_type, signed)

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
        z = self._unscaled(latents.to(vae.dtype), vae)
        image = first(vae.decode(z), "sample")
        if not is_finite(image) and is_finite(latents):  # the first alone where all is well: each waits for the device
            layer = first_layer(vae, lambda: vae.decode(z))
            why = cause({"vae": vae}, {}, f"layer {layer} overflows in {vae.dtype}")
            raise ValueError(f"the decoded pictures hold NaN or infinity: {why}; try pipe.vae.to(torch.float32)")
        return image

    # --- the two ways to ask -----------------------------------------------------------------------------------------

    def _respond(self, arguments: Mapping[str, Any]) -> "Output | tuple[Any, ...]":
        """Do what a call does: check its ``locals()``, run all steps; return the record or the tuple."""
        options, asked = OutputOptions.of(self, arguments)
        # Closed also where a callback raises: what is held of the error would else keep the call under way.
        with torch.no_grad(), closing(self._generate(self.request(**asked), options.output_type)) as generation:
            run = next(generation)
            counted = self._counted(run)
            with self.progress_bar(total=len(counted)) as bar:
                for _ in generation:
                    self._call_back(options, run, run.step in counted)
                    bar.update(run.step in counted)
            self.maybe_free_model_hooks()
        out = self.output_class(images=run.images, seeds=run.seeds, dropped=run.dropped)
        if run.flagged is not None:
            out.nsfw_content_detected = run.flagged
        run.images = None  # the pipeline remembers its last run
        return out if options.return_dict else tuple(getattr(out, name) for name in self.output_class.reference_fields)

    def steps(self, *args: Any, **arguments: Any) -> Iterator[Step]:
        """Generate step by step: yield a ``Step`` after each, with the latents and the clean latents predicted.

        The arguments are those of a call that concern the generation. Leaving the loop early stops the generation::

            for step in pipe.steps("red apple", num_inference_steps=20, seed=7):
                preview = pipe.decode(step.denoised)  # minidiff.previews has quicker ways

        With ``padding_mask_crop`` the latents are those of the part that is worked on.
        """
        calls = [kind for kind in type(self).__mro__ if "__call__" in vars(kind)]  # a program's may take anything
        kind = next((kind for kind in calls if kind.__module__.startswith("minidiff.")), calls[0])
        given = inspect.signature(kind.__call__).bind_partial(self, *args).arguments
        given.pop("self")
        generation = self._generate(self.request(**given, **arguments))
        next(generation)  # what is wrong is said now
        return self._yield_steps(generation)

    @torch.no_grad()
    def _yield_steps(self, generation: Iterator[Run]) -> Iterator[Step]:
        for run in generation:
            i, plan = run.step, run.plan
            yield Step(i - plan.start, plan.timesteps[i], run.latents, run.core.denoised(plan, i, run.x, run.out))

    def _counted(self, run: Run) -> list[int]:
        """Return the evaluations that end a step for the progress bar: solvers may take several, or some to warm up."""
        order, plan = run.core.order, run.plan
        warmup = max(len(plan.coefficients) - plan.num_inference_steps * order, 0)
        indices = run.indices
        return [i for k, i in enumerate(indices, start=1) if k == len(indices) or (k > warmup and k % order == 0)]


class TextToImage(LatentGeneration):
    """The plainest task: all steps, beginning with noise alone."""

    def _size(self, request: Request) -> tuple[int, int] | None:
        return self._latent_size(request.height, request.width)

    def _first_latents(self, request: Request, run: Run, size: tuple[int, int]) -> Tensor:
        return self._noise(request, run, (request.count, self.unet.config.in_channels, *size))

    def _noise(self, request: Request, run: Run, shape: tuple[int, ...]) -> Tensor:
        """Return noise (B, C, h, w) of the plan's first level: given, drawn, or from ``prepare_latents``."""
        like = run.tensors["prompt_embeds"]
        if overridden(self, "prepare_latents"):
            (B, C, h, w), f = shape, self.vae_scale_factor
            return self.prepare_latents(*(B, C, h * f, w * f), like.dtype, like.device, run.generator, request.latents)
        noise = initial_latents(shape, request.latents, run.generator, like.device, like.dtype)
        return noise * run.plan.init_noise_sigma


def denoise(network: Callable[[Tensor, Tensor, Run], Tensor], run: Run) -> Iterator[int]:
    """Take every step of the run and yield its index; ``run`` holds what it began with, predicted and ended with."""
    scheduler, plan, past = run.core, run.plan, ()
    for i in run.indices:
        if run.interrupt:
            return
        run.check_rows()
        run.step, x = i, run.latents
        x_in = torch.cat([x] * run.passes) if run.passes > 1 else x
        out = network(scheduler.scale_input(plan, i, x_in), plan.timesteps[i], run)
        out = run.guidance.combine(out, run) if run.guided else out
        noise = scheduler.draw_noise(plan, i, x, run.generator)
        after, past = scheduler.advance(plan, i, x, out, past, noise)
        run.latents = same_shape(x, after if run.after_step is None else run.after_step(run, i, after))
        scheduler.show(plan, i + 1)
        run.x, run.out = x, out
        yield i


def same_shape(before: Tensor, after: Tensor) -> Tensor:
    """Return ``after``; raise if it does not have the shape of ``before``: a step neither adds nor drops pictures."""
    if after.shape != before.shape:
        raise ValueError(
            f"latents became {tuple(after.shape)} in a step from {tuple(before.shape)}: what the run remembers of the "
            "steps before (a multistep scheduler, a mask) is of other pictures than a callback has left"
        )
    return after


def repeat_to_batch(x: Tensor, count: int, what: str = "images") -> Tensor:
    """Repeat a batch (B, ...) in turn until it has ``count`` items; raise ``ValueError`` if that does not come out."""
    if len(x) > count or count % len(x):
        raise ValueError(f"{len(x)} {what} cannot be dealt out to {count} pictures evenly")
    return x.repeat(count // len(x), *[1] * (x.ndim - 1))
