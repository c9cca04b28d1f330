"""Image to image with Stable Diffusion 1.x and 2.x: a prompt redraws a picture.

    x = noised(encode(image), t_start);  then the last steps of a run

The more noise, the less is left of the image: its share is the ``strength``, and ``minidiff.pipelines.strength`` has
the number of steps.

Paper: Meng et al. 2022 (SDEdit, https://arxiv.org/abs/2108.01073). Checked against
``diffusers.StableDiffusionImg2ImgPipeline``, seed for seed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from minidiff.noise import Generators
from minidiff.pipelines.callbacks import Callback
from minidiff.pipelines.image_to_image import ImageToImage
from minidiff.pipelines.request import Prompt
from minidiff.pipelines.request_image import ImageRequest
from minidiff.pipelines.stable_diffusion import StableDiffusion, StableDiffusionPipelineOutput


class StableDiffusionImg2ImgPipeline(ImageToImage, StableDiffusion):
    """Image to image with Stable Diffusion 1.x and 2.x.

    It is made of the same components as text to image: ``StableDiffusionImg2ImgPipeline(**pipe.components)``. Args and
    errors: as of ``StableDiffusion``.
    """

    request = ImageRequest

    def __call__(
        self,
        prompt: Prompt = None,
        image: Any = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: Prompt = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
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
    ) -> StableDiffusionPipelineOutput | tuple[Any, None]:
        """Generate pictures from pictures.

        Args: the fields of ``ImageRequest`` describe the generation; the rest is as for ``StableDiffusionPipeline``.

        Raises:
            TypeError, ValueError: naming the argument, what was found and what was expected.
        """
        return self._respond(locals())
