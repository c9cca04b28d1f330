"""The public names and where each is defined, for everything that finds a class by its name.

Configurations, ``model_index.json`` and the command line name classes. They are looked up here and imported when they
are asked for, so nothing of minidiff imports the package that exports it.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

HOME = {  # public name -> module that defines it
    "AutoModel": "minidiff.checkpoints.auto",
    "AutoPipelineForImage2Image": "minidiff.pipelines.auto",
    "AutoPipelineForInpainting": "minidiff.pipelines.auto",
    "AutoPipelineForText2Image": "minidiff.pipelines.auto",
    "AutoencoderKL": "minidiff.networks.vae",
    "AutoencoderTiny": "minidiff.networks.vae_tiny",
    "CLIPImageProcessor": "minidiff.images.clip_processor",
    "CLIPTextConfig": "minidiff.networks.clip",
    "CLIPTextModel": "minidiff.networks.clip",
    "CLIPTextModelWithProjection": "minidiff.networks.clip",
    "CLIPTokenizer": "minidiff.text.tokenizer",
    "CLIPVisionConfig": "minidiff.networks.clip_vision",
    "CLIPVisionModel": "minidiff.networks.clip_vision",
    "CLIPVisionModelWithProjection": "minidiff.networks.clip_vision",
    "ConfigMixin": "minidiff.configured",
    "DDIMPipeline": "minidiff.pipelines.ddpm",
    "DDIMScheduler": "minidiff.schedulers.ddim",
    "DDPMPipeline": "minidiff.pipelines.ddpm",
    "DDPMScheduler": "minidiff.schedulers.ddpm",
    "DEISMultistepScheduler": "minidiff.schedulers.deis",
    "DPMSolverMultistepScheduler": "minidiff.schedulers.dpm_solver_multistep",
    "DPMSolverSinglestepScheduler": "minidiff.schedulers.dpm_solver_singlestep",
    "DiffusionPipeline": "minidiff.pipelines.base",
    "EDMDPMSolverMultistepScheduler": "minidiff.schedulers.edm_dpm_solver_multistep",
    "EDMEulerScheduler": "minidiff.schedulers.edm_euler",
    "EulerAncestralDiscreteScheduler": "minidiff.schedulers.euler_ancestral",
    "EulerDiscreteScheduler": "minidiff.schedulers.euler",
    "HeunDiscreteScheduler": "minidiff.schedulers.heun",
    "KDPM2AncestralDiscreteScheduler": "minidiff.schedulers.k_dpm_2",
    "KDPM2DiscreteScheduler": "minidiff.schedulers.k_dpm_2",
    "LCMScheduler": "minidiff.schedulers.lcm",
    "LMSDiscreteScheduler": "minidiff.schedulers.lms",
    "LatentConsistencyModelImg2ImgPipeline": "minidiff.pipelines.latent_consistency",
    "LatentConsistencyModelPipeline": "minidiff.pipelines.latent_consistency",
    "ModelMixin": "minidiff.networks.own_model",
    "PNDMScheduler": "minidiff.schedulers.pndm",
    "SchedulerMixin": "minidiff.schedulers.mixin",
    "StableDiffusionImg2ImgPipeline": "minidiff.pipelines.stable_diffusion_img2img",
    "StableDiffusionInpaintPipeline": "minidiff.pipelines.stable_diffusion_inpaint",
    "StableDiffusionInstructPix2PixPipeline": "minidiff.pipelines.stable_diffusion_instruct_pix2pix",
    "StableDiffusionPipeline": "minidiff.pipelines.stable_diffusion",
    "StableDiffusionSafetyChecker": "minidiff.networks.safety_checker",
    "StableDiffusionXLImg2ImgPipeline": "minidiff.pipelines.stable_diffusion_xl_img2img",
    "StableDiffusionXLInpaintPipeline": "minidiff.pipelines.stable_diffusion_xl_inpaint",
    "StableDiffusionXLInstructPix2PixPipeline": "minidiff.pipelines.stable_diffusion_xl_instruct_pix2pix",
    "StableDiffusionXLPipeline": "minidiff.pipelines.stable_diffusion_xl",
    "TCDScheduler": "minidiff.schedulers.tcd",
    "UNet2DConditionModel": "minidiff.networks.unet",
    "UNet2DModel": "minidiff.networks.unet_unconditional",
    "UniPCMultistepScheduler": "minidiff.schedulers.unipc",
    "VaeImageProcessor": "minidiff.images.processor",
    "load_image": "minidiff.images.tensors",
    "make_image_grid": "minidiff.images.tensors",
}

RENAMED = {  # classes of transformers, in programs and in model_index.json -> ours, which reads the same files
    "AutoFeatureExtractor": "CLIPImageProcessor",
    "AutoImageProcessor": "CLIPImageProcessor",
    "AutoTokenizer": "CLIPTokenizer",
    "CLIPFeatureExtractor": "CLIPImageProcessor",
    "CLIPImageProcessorFast": "CLIPImageProcessor",
    "CLIPImageProcessorPil": "CLIPImageProcessor",
    "CLIPTokenizerFast": "CLIPTokenizer",
}


def public(name: object) -> Any:
    """Return what is public under this name, None if nothing is."""
    return getattr(import_module(HOME[name]), name) if isinstance(name, str) and name in HOME else None


def published(kind: type) -> type | None:
    """Return the network, scheduler, ... of this library that a class is, or is derived from; None if it is of none."""
    ours = (base for base in kind.__mro__ if HOME.get(base.__name__) == base.__module__)
    return next((base for base in ours if not base.__name__.endswith("Mixin")), None)
