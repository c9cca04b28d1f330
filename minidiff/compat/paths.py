"""The reference's dotted paths, for programs that write them: ``from minidiff.schedulers.scheduling_ddim import ...``.

minidiff's files lie where a reader looks for them, and are named for what they hold. ``PATHS`` says for each published
path in which of our modules its names are; ``NAMES`` says what is called otherwise here. A path that is no file of
minidiff becomes a module when it is first imported, empty but for its ``__getattr__``: nothing is loaded that is not
asked for. Where a file of ours has the name of a published path (``minidiff.schedulers``), its last line is that same
``__getattr__``, and a ``__path__`` if it is no folder but the published path is.
"""

import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from minidiff.registry import HOME, public

_TASKS = ("", "_img2img", "_inpaint", "_instruct_pix2pix")


def _scheduling(name: str) -> str:
    """Return the path of a scheduler: ``EulerDiscreteScheduler`` is in ``schedulers.scheduling_euler_discrete``."""
    words = name.removesuffix("Scheduler").replace("KDPM2", "K_DPM_2").replace("EDM", "EDM_")
    return "schedulers.scheduling_" + re.sub("(Multistep|Singlestep|Ancestral|Discrete)", r"_\1", words).lower()


# Published path -> where its names are, both below minidiff. A folder stands for the public names that lie in it.
PATHS: dict[str, Sequence[str]] = {
    "callbacks": ["callbacks"],
    "configuration_utils": ["configured", "compat.utils"],
    "hooks": ["checkpoints.casting"],
    "hooks.layerwise_casting": ["checkpoints.casting"],
    "image_processor": ["images.processor", "compat.utils"],
    "loaders": ["adapters", "compat.utils"],
    "loaders.lora_pipeline": ["adapters"],
    "loaders.peft": ["adapters.network"],
    "loaders.single_file": ["pipelines.single_file"],
    "loaders.single_file_model": ["checkpoints.original.single_file"],
    "loaders.textual_inversion": ["adapters.textual_inversion"],
    "logging": ["compat.logging"],  # there an attribute of the package
    "models": [
        "networks.unet",
        "networks.unet_unconditional",
        "networks.vae",
        "networks.vae_tiny",
        "networks.own_model",
        "checkpoints",
        "compat.utils",
    ],
    "models.attention_processor": ["compat.attention"],
    "models.auto_model": ["checkpoints.auto"],
    "models.autoencoders": ["networks.vae", "networks.vae_tiny"],
    "models.autoencoders.autoencoder_kl": ["networks.vae"],
    "models.autoencoders.autoencoder_tiny": ["networks.vae_tiny"],
    "models.autoencoders.vae": ["networks.vae"],
    "models.lora": ["compat.utils"],
    "models.modeling_outputs": ["networks.vae"],
    "models.modeling_utils": ["networks.own_model"],
    "models.unets": ["networks.unet", "networks.unet_unconditional"],
    "models.unets.unet_2d": ["networks.unet_unconditional"],
    "models.unets.unet_2d_condition": ["networks.unet"],
    "pipelines": ["pipelines", "pipelines.ddpm"],
    "pipelines.auto_pipeline": ["pipelines.auto"],
    "pipelines.latent_consistency_models": ["pipelines.latent_consistency"],
    "pipelines.pipeline_utils": ["pipelines.base", "pipelines.ddpm"],
    "pipelines.stable_diffusion": ["pipelines", "networks.safety_checker", "compat.utils"],
    "pipelines.stable_diffusion.pipeline_output": ["pipelines.stable_diffusion"],
    "pipelines.stable_diffusion.safety_checker": ["networks.safety_checker"],
    "pipelines.stable_diffusion_xl": ["pipelines"],
    "pipelines.stable_diffusion_xl.pipeline_output": ["pipelines.stable_diffusion_xl"],
    "pipelines.stable_diffusion_xl.watermark": ["compat.utils"],
    "quantizers": ["checkpoints.arguments"],
    "quantizers.quantization_config": ["checkpoints.arguments"],
    "schedulers": ["schedulers", "schedulers.mixin"],
    "schedulers.scheduling_utils": ["schedulers.mixin"],
    "utils": ["images.tensors", "outputs", "compat.utils", "compat.logging"],
    "utils.deprecation_utils": ["compat.utils"],
    "utils.doc_utils": ["compat.utils"],
    "utils.import_utils": ["compat.utils"],
    "utils.loading_utils": ["images.tensors"],
    "utils.logging": ["compat.logging"],
    "utils.outputs": ["outputs"],
    "utils.pil_utils": ["images.tensors"],
    "utils.torch_utils": ["noise", "compat.utils"],
    **{
        f"pipelines.{family}.pipeline_{family}{task}": [f"pipelines.{family}{task}", "pipelines.by_hand"]
        for family in ("stable_diffusion", "stable_diffusion_xl")
        for task in _TASKS
    },
    **{
        f"pipelines.latent_consistency_models.pipeline_latent_consistency_{task}": ["pipelines.latent_consistency"]
        for task in ("text2img", "img2img")
    },
    **{_scheduling(name): [HOME[name].removeprefix("minidiff.")] for name in HOME if name.endswith("Scheduler")},
}

NAMES: dict[str, tuple[str, str]] = {  # published name -> the module below minidiff and the name it has there
    "BaseOutput": ("outputs", "Output"),
    "DiagonalGaussianDistribution": ("networks.vae", "DiagonalGaussian"),
    "FromOriginalModelMixin": ("checkpoints.original.single_file", "SingleFileModel"),
    "FromSingleFileMixin": ("pipelines.single_file", "SingleFilePipeline"),
    "FrozenDict": ("config", "Config"),
    "GGUFQuantizationConfig": ("checkpoints.arguments", "GGUFQuantizationConfig"),
    "ImagePipelineOutput": ("pipelines.ddpm", "ImagePipelineOutput"),
    "LoraLoaderMixin": ("adapters.lora_loader", "LoraLoader"),
    "StableDiffusionLoraLoaderMixin": ("adapters.lora_loader", "LoraLoader"),
    "PeftAdapterMixin": ("adapters.network", "AdaptedNetwork"),
    "PIL_INTERPOLATION": ("images.processor", "RESAMPLING"),
    "StableDiffusionMixin": ("pipelines.memory", "MemorySavers"),
    "StableDiffusionXLLoraLoaderMixin": ("adapters.lora_loader", "LoraLoader"),
    "TextualInversionLoaderMixin": ("adapters.textual_inversion", "TextualInversionLoader"),
    "numpy_to_pil": ("images.tensors", "as_pictures"),
    "pt_to_pil": ("images.tensors", "to_pil"),
    "randn_tensor": ("noise", "randn"),
}


def names_at(path: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a published path, given in full (``__name__``)."""
    below = path.partition(".")[2]
    homes = PATHS[below]

    def get(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if f"{below}.{name}" in PATHS:
            return import_module(f"{path}.{name}")
        for home, ours in [NAMES[name]] if name in NAMES else [(home, name) for home in homes]:
            module = f"minidiff.{home}"
            if HOME.get(name, "").startswith(f"{module}."):
                return public(name)
            if ours in (found := vars(import_module(module))):
                return found[ours]
        raise AttributeError(f"{path} has no {name!r}; minidiff has {', '.join(HOME)}")

    return get


class PublishedPaths:
    """Python's protocol for finding and making the modules of ``PATHS``; the last to be asked, after the files."""

    @staticmethod
    def find_spec(fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return what is needed to make a module of ``PATHS``, None for other names."""
        package, _, below = fullname.partition(".")
        if package != "minidiff" or below not in PATHS:
            return None
        return ModuleSpec(fullname, PublishedPaths, is_package=any(other.startswith(f"{below}.") for other in PATHS))

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        """Leave it to Python to make the empty module."""

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        """Give the empty module its names."""
        module.__getattr__ = names_at(module.__name__)


sys.meta_path.append(PublishedPaths)
