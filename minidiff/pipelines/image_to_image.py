"""Image to image: a prompt redraws a picture.

    x = noised(encode(image), t_start);  then the last steps of a run

The more noise, the less is left of the image: its share is the ``strength``, and ``minidiff.pipelines.strength`` has
the number of steps. Latents that come from the middle of another run are taken as they are (``denoising_start``).

Paper: Meng et al. 2022 (SDEdit, https://arxiv.org/abs/2108.01073).
"""

from typing import Any, ClassVar

from torch import Tensor

from minidiff.noise import randn
from minidiff.pipelines.by_hand import ImageByHand
from minidiff.pipelines.request import Request
from minidiff.pipelines.run import LatentGeneration
from minidiff.pipelines.state import Run
from minidiff.pipelines.strength import last_steps, take_over
from minidiff.schedulers.base import Plan


class FromImage(ImageByHand, LatentGeneration):
    """What the tasks that begin with an image share: the last steps alone."""

    least_steps: ClassVar[int] = 0
    _calls: ClassVar[tuple[str, ...]] = ("encode_prompt", "prepare_extra_step_kwargs")

    def _plan(self, request: Any, run: Run) -> Plan:
        plan = super()._plan(request, run)
        if run.denoising_start is not None:
            return take_over(run.core, plan, run.denoising_start)
        return last_steps(run.core, plan, request, self.least_steps)


class ImageToImage(FromImage):
    """The task: begin with an image under noise."""

    def _size(self, request: Request) -> None:
        return None

    def _first_latents(self, request: Any, run: Run, size: None) -> Tensor:
        """Return the latents (B, C, h, w) of the image under the noise of the plan's first level."""
        like, C, count = run.tensors["prompt_embeds"], self.unet.config.in_channels, request.count
        if request.latents is not None:
            if request.latents.ndim != 4 or request.latents.shape[:2] != (count, C):
                raise ValueError(f"latents should be ({count}, {C}, h, w), found {tuple(request.latents.shape)}")
            return request.latents.to(like)
        x0 = self._encode_image(self._read_image(request.image), count, run.generator, like)
        if run.denoising_start is not None:
            return x0
        return run.core.noised(run.plan, x0, randn(x0.shape, run.generator, like.device, like.dtype))
