"""What a picture is going to be, while it is made: quick looks at the clean latents x0 that each step predicts.

    rgb = x0 · weight + bias        a colour for each latent, without a network

    preview = previewer(pipe)
    for step in pipe.steps("red apple", seed=7):
        preview(step.denoised)[0].show()

    film = FilmStrip(preview)
    pipe("red apple", seeds=[1, 2], callback_on_step_end=film)
    film.image().save("film.png")

The colours of the published autoencoders are those of ComfyUI (GitHub, comfyanonymous/ComfyUI, comfy/latent_formats.py,
applied as in latent_preview.py). Those of any other are fitted to what it decodes.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from minidiff.images.tensors import make_image_grid, to_pil
from minidiff.networks.vae_tiny import AutoencoderTiny
from minidiff.noise import randn
from minidiff.pipelines.callbacks import RUNS
from minidiff.pipelines.foreign import first
from minidiff.pipelines.latent import LatentPipeline

Preview = Callable[[Tensor], list[Image.Image]]  # latents of the process (B, C, h, w) -> B pictures
LEVELS = [128, 256, 512, 512]  # of the published autoencoders


class LatentRGB(NamedTuple):
    """A colour in [-1, 1] for each latent: rgb = x0 · weight + bias."""

    weight: Tensor  # (C, 3)
    bias: Tensor  # (3,)

    def __call__(self, latents: Tensor) -> list[Image.Image]:
        """Return B pictures of h x w pixels of latents of the process, (B, C, h, w).

        Raises:
            ValueError: if they have another number of channels, or hold NaN or infinity.
        """
        return to_pil(self.pixels(latents))

    def pixels(self, latents: Tensor) -> Tensor:
        """Return the colours, (B, 3, h, w), about in [-1, 1]."""
        if latents.ndim != 4 or latents.shape[1] != len(self.weight):
            raise ValueError(f"latents should be (B, {len(self.weight)}, h, w), found {tuple(latents.shape)}")
        x = latents.to(torch.promote_types(latents.dtype, torch.float32))
        return torch.einsum("bchw,cr->brhw", x, self.weight.to(x)) + self.bias.to(x)[:, None, None]

    @classmethod
    def fit(cls, latents: Tensor, pixels: Tensor) -> "LatentRGB":
        """Return the colours with the least squared error: the mean of the pixels that each latent stands for.

        Args:
            latents: (B, C, h, w), as the process has them.
            pixels: what they are decoded to, (B, 3, f h, f w) in [-1, 1].
        """
        x, y = latents.cpu().double(), F.adaptive_avg_pool2d(pixels.cpu().double(), latents.shape[2:])
        x, y = (t.movedim(1, -1).flatten(0, -2) for t in (x, y))  # (B h w, C) and (B h w, 3)
        solution = torch.linalg.lstsq(F.pad(x, (0, 1), value=1.0), y).solution
        return cls(solution[:-1].float(), solution[-1].float())


PUBLISHED = {  # scaling_factor of the autoencoder -> its colours; see the head of this file
    0.18215: LatentRGB(  # Stable Diffusion 1.x and 2.x
        torch.tensor(
            [[0.3512, 0.2297, 0.3227], [0.3250, 0.4974, 0.2350], [-0.2829, 0.1762, 0.2721], [-0.2120, -0.2616, -0.7177]]
        ),
        torch.zeros(3),
    ),
    0.13025: LatentRGB(  # Stable Diffusion XL
        torch.tensor(
            [
                [0.3651, 0.4232, 0.4341],
                [-0.2533, -0.0042, 0.1068],
                [0.1076, 0.1111, -0.0362],
                [-0.3165, -0.2492, -0.2188],
            ]
        ),
        torch.tensor([0.1084, -0.0175, -0.0011]),
    ),
}


def previewer(pipe: LatentPipeline, vae: Any = None) -> Preview:
    """Return what makes pictures of the clean latents of a step: ``previewer(pipe)(step.denoised)``.

    Args:
        pipe: any pipeline of Stable Diffusion.
        vae: an autoencoder of its latents, such as a tiny one, to decode them with. By default the pipeline's own if
            that is a tiny one; else the linear colours of its autoencoder: published ones, or fitted to what it decodes
            of smooth noise. The fit is made now, and takes as long as to decode a picture.

    Raises:
        ValueError: if the pipeline has no autoencoder, or ``vae`` has another number of latent channels.
    """
    vae = pipe.vae if vae is None and isinstance(pipe.vae, AutoencoderTiny) else vae
    channels = pipe.unet.config.out_channels
    if vae is not None:
        if vae.config.latent_channels != channels:
            found = vae.config.latent_channels
            raise ValueError(f"vae should decode latents of {channels} channels as the UNet makes them, found {found}")
        return partial(_decoded, pipe, vae)
    config = {} if pipe.vae is None else pipe.vae.config
    published = PUBLISHED.get(config.get("scaling_factor"))
    if published is not None and config.get("block_out_channels") == LEVELS and config.latent_channels == 4:
        return published
    noise = randn((16, channels, 4, 4), torch.Generator().manual_seed(0), device=pipe.device, dtype=torch.float32)
    latents = F.interpolate(noise, scale_factor=4, mode="bilinear").to(pipe.unet.dtype)
    with torch.no_grad():
        return LatentRGB.fit(latents, pipe._decoded(latents).clamp(-1, 1))


@torch.no_grad()
def _decoded(pipe: LatentPipeline, vae: Any, latents: Tensor) -> list[Image.Image]:
    if vae is pipe.vae:  # it may be offloaded, and XL's decodes in another dtype than its own
        return to_pil(pipe._decoded(latents.to(pipe.device)))
    return to_pil(first(vae.decode(pipe._unscaled(latents.to(vae.device, vae.dtype), vae)), "sample"))


class FilmStrip:
    """A callback that keeps what each step predicts: ``pipe(..., callback_on_step_end=film)``, then ``film.image()``.

    During the run latents are kept and nothing is computed of them, so it is as fast as without.

    Args:
        preview: what makes pictures of latents, see ``previewer``.
        height: of a picture of the strip, in pixels.
    """

    tensor_inputs: ClassVar[Sequence[str]] = ()

    def __init__(self, preview: Preview, height: int = 96) -> None:
        self.preview, self.height = preview, height
        self.calls: list[list[Tensor]] = []  # of each call the x0 of each step, (B, C, h, w)
        self._mine = threading.local()  # the call of this thread: threads may share a film

    def __call__(
        self, pipeline: LatentPipeline, step_index: int, timestep: Tensor, tensors: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Keep the clean latents of a step; of solvers that ask the UNet several times, those of the last."""
        run, mine = RUNS.get(pipeline), self._mine
        if getattr(mine, "run", None) is not run:
            mine.run, mine.steps = run, []
            self.calls.append(mine.steps)
        if run.step in pipeline._counted(run):
            mine.steps.append(run.core.denoised(run.plan, run.step, run.x, run.out))
        return tensors

    def image(self) -> Image.Image:
        """Return the strip: a column for each step, a row for each picture of each call, one below the other.

        Raises:
            ValueError: if there was no step.
        """
        rows = [row for steps in self.calls for row in zip(*map(self.preview, steps), strict=True)]
        if not rows:
            raise ValueError("a film strip needs a call: pipe(..., callback_on_step_end=film)")
        columns = max(map(len, rows))
        width, height = rows[0][0].size
        size = (max(round(width * self.height / height), 1), self.height)
        rows = [[*row, *[Image.new("RGB", size, "white")] * (columns - len(row))] for row in rows]
        cells = [ImageOps.pad(picture, size, color="white") for row in rows for picture in row]
        return make_image_grid(cells, len(rows), columns)
