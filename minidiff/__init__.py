"""minidiff: the core of diffusers in plain PyTorch, checked against it number for number.

The public names below are imported on first use, so ``import minidiff`` costs next to nothing: networks, schedulers
and the Hub client are loaded only by the code that asks for them.
"""

from importlib import import_module
from typing import Any

from minidiff.compat.paths import NAMES, PATHS

__version__ = "0.1.0"

_HOME = {  # public name -> module that defines it
    "AutoModel": "minidiff.checkpoints.auto",
    "AutoPipelineForImage2Image": "minidiff.pipelines.auto",
    "AutoPipelineForInpainting": "minidiff.pipelines.auto",
    "AutoPipelineForText2Image": "minidiff.pipelines.auto",
    "AutoencoderKL": "minidiff.vae",
    "CLIPTextConfig": "minidiff.clip",
    "CLIPTextModel": "minidiff.clip",
    "CLIPTextModelWithProjection": "minidiff.clip",
    "CLIPTokenizer": "minidiff.tokenizer",
    "ConfigMixin": "minidiff.configured",
    "DDIMPipeline": "minidiff.pipelines.ddpm",
    "DDIMScheduler": "minidiff.schedulers.ddim",
    "DDPMPipeline": "minidiff.pipelines.ddpm",
    "DDPMScheduler": "minidiff.schedulers.ddpm",
    "DEISMultistepScheduler": "minidiff.schedulers.deis",
    "DPMSolverMultistepScheduler": "minidiff.schedulers.dpm_solver_multistep",
    "DPMSolverSinglestepScheduler": "minidiff.schedulers.dpm_solver_singlestep",
    "DiffusionPipeline": "minidiff.pipelines.base",
    "EulerAncestralDiscreteScheduler": "minidiff.schedulers.euler_ancestral",
    "EulerDiscreteScheduler": "minidiff.schedulers.euler",
    "HeunDiscreteScheduler": "minidiff.schedulers.heun",
    "KDPM2AncestralDiscreteScheduler": "minidiff.schedulers.k_dpm_2",
    "KDPM2DiscreteScheduler": "minidiff.schedulers.k_dpm_2",
    "LCMScheduler": "minidiff.schedulers.lcm",
    "LMSDiscreteScheduler": "minidiff.schedulers.lms",
    "ModelMixin": "minidiff.checkpoints.own_model",
    "PNDMScheduler": "minidiff.schedulers.pndm",
    "SchedulerMixin": "minidiff.schedulers.mixin",
    "StableDiffusionImg2ImgPipeline": "minidiff.pipelines.stable_diffusion_img2img",
    "StableDiffusionInpaintPipeline": "minidiff.pipelines.stable_diffusion_inpaint",
    "StableDiffusionInstructPix2PixPipeline": "minidiff.pipelines.stable_diffusion_instruct_pix2pix",
    "StableDiffusionPipeline": "minidiff.pipelines.stable_diffusion",
    "StableDiffusionXLImg2ImgPipeline": "minidiff.pipelines.stable_diffusion_xl_img2img",
    "StableDiffusionXLInpaintPipeline": "minidiff.pipelines.stable_diffusion_xl_inpaint",
    "StableDiffusionXLInstructPix2PixPipeline": "minidiff.pipelines.stable_diffusion_xl_instruct_pix2pix",
    "StableDiffusionXLPipeline": "minidiff.pipelines.stable_diffusion_xl",
    "TCDScheduler": "minidiff.schedulers.tcd",
    "UNet2DConditionModel": "minidiff.unet",
    "UNet2DModel": "minidiff.unet_unconditional",
    "UniPCMultistepScheduler": "minidiff.schedulers.unipc",
    "VaeImageProcessor": "minidiff.pipelines.image_inputs",
    "load_image": "minidiff.images",
    "make_image_grid": "minidiff.images",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif name in PATHS:
        value = import_module(f"minidiff.{name}")
    elif name in NAMES:
        home, ours = NAMES[name]
        value = getattr(import_module(f"minidiff.{home}"), ours)
    else:
        raise AttributeError(f"minidiff has no {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
