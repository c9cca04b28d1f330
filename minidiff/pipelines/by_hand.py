"""What a loop written by hand calls on a built-in pipeline: the reference's methods between ``__call__``'s lines.

Most published pipelines are a class derived from a built-in one with a ``__call__`` of its own, which calls these
methods, the networks, and ``scheduler.step``. minidiff's own pipelines work with a ``Request``, a ``Plan`` and a
``Run`` instead; what both need is done by the same code. Checked against the methods of the same names.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.networks.layers import guidance_embedding
from minidiff.noise import Generators, initial_latents, randn
from minidiff.pipelines.foreign import taken_by_step
from minidiff.pipelines.request import Request, check_count, check_number
from minidiff.pipelines.run import repeat_to_batch, rescaled
from minidiff.pipelines.strength import take_over

if TYPE_CHECKING:
    import numpy as np

    from minidiff.networks.vae import AutoencoderKLOutput
    from minidiff.schedulers.base import Scheduler

CHECKED = {  # the arguments of check_inputs, in order, and how the names of the classes that have them end
    "Pipeline": "height width callback_steps",
    "Img2ImgPipeline": "strength callback_steps",
    "XLImg2ImgPipeline": "strength num_inference_steps callback_steps",
    "InpaintPipeline": "image mask_image height width strength callback_steps output_type",
    "InstructPix2PixPipeline": "callback_steps",
}


def retrieve_timesteps(
    scheduler: "Scheduler",
    num_inference_steps: int | None = None,
    device: torch.device | str | None = None,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, int]:
    """Call ``scheduler.set_timesteps``; return the timesteps of the run and the number of steps that it is asked for.

    Raises ``ValueError`` if timesteps and sigmas are both given, or the scheduler does not take what is given.
    """
    if timesteps is not None and sigmas is not None:
        raise ValueError("give timesteps= or sigmas=, not both")
    custom = {name: value for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
    scheduler.set_timesteps(None if custom else num_inference_steps, device=device, **custom, **kwargs)
    return scheduler.timesteps, len(scheduler.timesteps) if custom else num_inference_steps


def retrieve_latents(
    encoder_output: "AutoencoderKLOutput", generator: Generators = None, sample_mode: str = "sample"
) -> Tensor:
    """Return latents from what an autoencoder's ``encode`` returned: drawn, or the most likely ones ("argmax")."""
    if not hasattr(encoder_output, "latent_dist"):
        return encoder_output.latents
    posterior = encoder_output.latent_dist
    return posterior.mode() if sample_mode == "argmax" else posterior.sample(generator)


def rescale_noise_cfg(noise_cfg: Tensor, noise_pred_text: Tensor, guidance_rescale: float = 0.0) -> Tensor:
    """Return the guided prediction with its contrast pulled back, see ``minidiff.pipelines.run.rescaled``."""
    return rescaled(noise_cfg, noise_pred_text, guidance_rescale)


class ByHand:
    """The methods of the pipelines that begin with noise, and of all others."""

    watermark: None = None  # as in the reference without an invisible watermark

    def check_inputs(self, prompt: Any, *args: Any, **kwargs: Any) -> None:
        """Raise ``TypeError`` or ``ValueError`` if the arguments of a call are wrong; the order is the reference's."""
        given = dict(zip(("prompt", *self._checked()), (prompt, *args), strict=False)) | kwargs
        if len(given) != 1 + len(args) + len(kwargs) or not {"prompt", *self._checked()} >= set(given):
            raise TypeError(f"{type(self).__name__}.check_inputs takes prompt, {', '.join(self._checked())}")
        for name in ("height", "width"):
            if given.get(name) is not None and given[name] % self.vae_scale_factor:
                raise ValueError(f"{name} should be divisible by {self.vae_scale_factor}, found {given[name]}")
        if given.get("callback_steps") is not None:
            check_count("callback_steps", given["callback_steps"])
        if "strength" in given:
            check_number("strength", given["strength"], 0, 1)
        if absent := [name for name, value in given.items() if name.startswith("ip_adapter") and value is not None]:
            raise TypeError(f"{type(self).__name__} does not implement the argument(s) {', '.join(absent)}")
        for name in given.get("callback_on_step_end_tensor_inputs") or ():
            if name not in self._callback_tensor_inputs:
                raise ValueError(f"callback_on_step_end_tensor_inputs are {self._callback_tensor_inputs}, found {name}")
        texts = [field.name for field in fields(Request) if field.name.endswith(("prompt", "prompt_embeds"))]
        Request(**{name: given[name] for name in texts if name in given})

    @classmethod
    def _checked(cls) -> list[str]:
        """Return the arguments of ``check_inputs`` after the prompt."""
        name = next(kind.__name__ for kind in cls.__mro__ if kind.__module__.startswith("minidiff."))
        xl, task = "XL" in name, name.removeprefix("StableDiffusion")
        middle = (CHECKED.get(task) or CHECKED[task.removeprefix("XL")]).split()
        second, pooled = xl and "Pix2Pix" not in task, task == "XLPipeline"
        names = [*["prompt_2"] * second, *middle, "negative_prompt", *["negative_prompt_2"] * second]
        names += ["prompt_embeds", "negative_prompt_embeds"]
        names += ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"] * pooled
        names += ["ip_adapter_image", "ip_adapter_image_embeds"] * (not xl or second)
        return [*names, "callback_on_step_end_tensor_inputs", *["padding_mask_crop"] * ("Inpaint" in task)]

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Generators,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Return the latents (B, C, h, w) that a run begins with: drawn or given, times the scheduler's first sigma."""
        shape = (batch_size, num_channels_latents, height // self.vae_scale_factor, width // self.vae_scale_factor)
        return initial_latents(shape, latents, generator, torch.device(device), dtype) * self.scheduler.init_noise_sigma

    def prepare_extra_step_kwargs(self, generator: Generators, eta: float) -> dict[str, Any]:
        """Return what to hand to ``scheduler.step`` besides the tensors: what of the two it takes."""
        return taken_by_step(self.scheduler, eta=eta, generator=generator)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> "np.ndarray":
        """Turn latents into pixels (B, H, W, 3) in [0, 1]."""
        return self.decode(latents, "np")

    def run_safety_checker(self, image: Any, device: Any, dtype: Any) -> tuple[Any, list[bool] | None]:
        """Return pictures and flags as the ``safety_checker`` does, the flags None without one.

        It is called with images=pixels (B, 3, H, W) in [-1, 1] and clip_input=what the ``feature_extractor`` makes of
        them, None without one.
        """
        if self.safety_checker is None:
            return image, None
        features = None
        if self.feature_extractor is not None:
            tensor = isinstance(image, Tensor)
            pictures = self.image_processor.postprocess(image) if tensor else self.numpy_to_pil(image)
            features = self.feature_extractor(pictures, return_tensors="pt").to(device).pixel_values.to(dtype)
        return self.safety_checker(images=image, clip_input=features)

    def upcast_vae(self) -> None:
        """Make the autoencoder float32."""
        self.vae.to(torch.float32)

    def get_guidance_scale_embedding(
        self, w: Tensor, embedding_dim: int = 512, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Encode guidance scales (B,), as a UNet is told them (LCM): see ``guidance_embedding``."""
        return guidance_embedding(w, embedding_dim, dtype)

    @property
    def default_sample_size(self) -> int | list[int]:
        """The size in latents that the UNet was trained on."""
        return self.unet.config.sample_size

    @property
    def _is_unet_config_sample_size_int(self) -> bool:
        return isinstance(self.unet.config.sample_size, int)


class ImageByHand(ByHand):
    """The methods of the pipelines that begin with an image."""

    def get_timesteps(
        self, num_inference_steps: int, strength: float, device: Any = None, denoising_start: float | None = None
    ) -> tuple[Tensor, int]:
        """Begin the scheduler's run at ``strength``; return its timesteps from there and their number of steps."""
        scheduler, n = self.scheduler, num_inference_steps
        taken = min(int(n * strength), n)
        start = (n - taken) * scheduler.order
        if denoising_start is not None:
            start = take_over(scheduler, scheduler._ready_plan(), denoising_start).start
            taken = len(scheduler.timesteps) - start
        scheduler.set_begin_index(start)
        return scheduler.timesteps[start:], taken

    def prepare_latents(
        self,
        image: Tensor,
        timestep: Tensor,
        batch_size: int,
        num_images_per_prompt: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Generators = None,
        add_noise: bool = True,
    ) -> Tensor:
        """Return the latents of pixels or latents (B, C, H, W) for each picture, noised to ``timestep``."""
        like = torch.empty((), dtype=dtype, device=device)
        x0 = self._encode_image(image, batch_size * num_images_per_prompt, generator, like)
        if not add_noise:
            return x0
        return self.scheduler.add_noise(x0, randn(x0.shape, generator, like.device, dtype), timestep)


class InpaintByHand(ImageByHand):
    """The methods of the pipelines that begin with an image and a mask."""

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Generators,
        latents: Tensor | None = None,
        image: Tensor | None = None,
        timestep: Tensor | None = None,
        is_strength_max: bool = True,
        *,
        add_noise: bool = True,
        return_noise: bool = False,
        return_image_latents: bool = False,
    ) -> tuple[Tensor, ...]:
        """Return the latents that a run begins with and, if asked for, their noise and the clean ones of the image."""
        if (image is None or timestep is None) and not is_strength_max:
            raise ValueError("a strength below 1 begins with the image: pass image and timestep")
        like, x0 = torch.empty((), dtype=dtype, device=device), None
        if return_image_latents or not add_noise or (latents is None and not is_strength_max):
            x0 = self._encode_image(image, batch_size, generator, like, one_each=False)
        shape = (batch_size, num_channels_latents, height // self.vae_scale_factor, width // self.vae_scale_factor)
        noise = initial_latents(shape, latents, generator, like.device, dtype)
        if not add_noise:
            first = x0
        elif is_strength_max or latents is not None:
            first = noise * self.scheduler.init_noise_sigma
        else:
            first = self.scheduler.add_noise(x0, noise, timestep)
        return (first, *[noise] * return_noise, *[x0] * return_image_latents)

    def _encode_vae_image(self, image: Tensor, generator: Generators) -> Tensor:
        """Return the scaled latents of pixels (B, C, H, W)."""
        return self._encode_image(image, len(image), generator, image, one_each=False)

    def prepare_mask_latents(
        self,
        mask: Tensor,
        masked_image: Tensor,
        batch_size: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Generators,
        do_classifier_free_guidance: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return masks (B, 1, h, w) and the latents of the masked image, twice under guidance."""
        like, f = torch.empty((), dtype=dtype, device=device), self.vae_scale_factor
        m = repeat_to_batch(F.interpolate(mask, size=(height // f, width // f)).to(like), batch_size, "masks")
        masked = self._encode_image(masked_image, batch_size, generator, like, one_each=False)
        return tuple(torch.cat([x, x]) if do_classifier_free_guidance else x for x in (m, masked))
