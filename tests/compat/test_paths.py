"""Programs import from the reference's dotted paths; each leads to what minidiff has under that name."""

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import minidiff
from minidiff.compat.paths import NAMES, PATHS
from minidiff.registry import RENAMED
from tests.theirs import diffusers

MODULES = [path for path in PATHS if path != "logging"]  # which is an attribute of the package there


@pytest.mark.parametrize("path", MODULES)
def test_every_published_path_is_one_of_the_reference_and_imports(path):
    import_module(f"diffusers.{path}")  # raises if it is not
    import_module(f"minidiff.{path}")


@pytest.mark.parametrize("path", MODULES)
def test_every_public_name_is_at_each_path_where_the_reference_has_it(path):
    theirs, ours = import_module(f"diffusers.{path}"), import_module(f"minidiff.{path}")
    names = [name for name in minidiff.__all__ if not name.startswith(("CLIP", "Auto", "__")) and name in dir(theirs)]
    assert all(getattr(ours, name) is getattr(minidiff, name) for name in names if defined_below(theirs, name))


def defined_below(module, name):
    """Say whether the reference's own path of a name lies below the module, rather than being imported into it."""
    home = inspect.getmodule(getattr(module, name)).__name__
    return home == module.__name__ or home.startswith(f"{module.__name__}.")


@pytest.mark.parametrize("name", NAMES)
def test_names_of_ours_that_differ_are_names_of_the_reference(name):
    home, ours = NAMES[name]
    assert hasattr(import_module(f"minidiff.{home}"), ours)
    assert any(hasattr(import_module(f"diffusers.{path}"), name) for path in MODULES)


IMPORTS = [
    "from minidiff.pipelines.stable_diffusion import StableDiffusionPipelineOutput",
    "from minidiff.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline",
    "from minidiff.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline",
    "from minidiff.pipelines.stable_diffusion import StableDiffusionImg2ImgPipeline",
    "from minidiff.pipelines import DiffusionPipeline, ImagePipelineOutput",
    "from minidiff.pipelines.pipeline_utils import DiffusionPipeline",
    "from minidiff.schedulers import DDIMScheduler",
    "from minidiff.schedulers.scheduling_ddim import DDIMScheduler",
    "from minidiff.schedulers.scheduling_ddpm import DDPMScheduler",
    "from minidiff.utils import load_image, make_image_grid, BaseOutput",
    "from minidiff.image_processor import VaeImageProcessor",
    "from minidiff.loaders import StableDiffusionLoraLoaderMixin",
    "from minidiff.pipelines.stable_diffusion import StableDiffusionSafetyChecker",
    "from minidiff import StableDiffusionMixin, ImagePipelineOutput, logging; logging.set_verbosity_error()",
    "from minidiff.models import UNet2DConditionModel, AutoencoderKL",
    "from minidiff.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin",
    "from minidiff.loaders.single_file import FromSingleFileMixin",
    "from minidiff.loaders.single_file_model import FromOriginalModelMixin",
    "from minidiff.loaders.textual_inversion import TextualInversionLoaderMixin",
    "from minidiff.hooks.layerwise_casting import apply_layerwise_casting",
    "from minidiff.quantizers.quantization_config import GGUFQuantizationConfig",
    "from minidiff.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution",
    "from minidiff.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance",
    "from minidiff.pipelines.latent_consistency_models import LatentConsistencyModelPipeline",
    "import minidiff; minidiff.schedulers.scheduling_ddim.DDIMScheduler; minidiff.utils.BaseOutput",
]


def test_what_programs_write_runs_whatever_was_imported_before(tmp_path):
    program = (
        "import sys\n"
        "for line in sys.argv[1:]:\n"
        "    for name in [name for name in sys.modules if name.startswith('minidiff')]: del sys.modules[name]\n"
        "    exec(line)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, *IMPORTS], capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("line", IMPORTS)
def test_the_reference_has_what_these_programs_write(line):
    exec(line.replace("minidiff", "diffusers"))


def test_what_is_not_there_is_said():
    with pytest.raises(ImportError, match="cannot import name 'FluxTransformer2DModel' from 'minidiff.models'"):
        exec("from minidiff.models import FluxTransformer2DModel")
    with pytest.raises(AttributeError, match="minidiff.models has no 'FluxTransformer2DModel'; minidiff has .*UNet2D"):
        _ = minidiff.models.FluxTransformer2DModel
    with pytest.raises(ModuleNotFoundError, match="minidiff.models.controlnets"):
        import_module("minidiff.models.controlnets.controlnet")
    assert hasattr(diffusers, "FluxTransformer2DModel")


HEADERS = [
    f"pipelines/{family}/pipeline_{family}{task}.py"
    for family in ("stable_diffusion", "stable_diffusion_xl")
    for task in ("", "_img2img", "_inpaint", "_instruct_pix2pix")
]
MISSING = {"get_module_execution_device", "empty_device_cache"}  # of devices that need more than torch


@pytest.mark.parametrize("file", HEADERS)
def test_the_import_block_of_a_pipeline_of_the_reference_runs(file):
    """Whoever writes a pipeline begins with a copy of one, and its first lines are imports."""
    package = f"diffusers/{file}".split("/")[:-1]
    tree = ast.parse((Path(diffusers.__file__).parent / file).read_text(encoding="utf-8"))
    found = 0
    for node in [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]:
        home = ".".join(
            ["minidiff", *package[1 : len(package) - node.level + 1], *([node.module] if node.module else [])]
        )
        for name in [alias.name for alias in node.names if alias.name not in MISSING]:
            exec(f"from {home} import {name}")
            found += 1
    assert found > 10


@pytest.mark.parametrize("name", RENAMED)
def test_names_of_transformers_that_mean_a_class_of_ours(name):
    """Those of older versions too, which programs still import."""
    assert getattr(minidiff, name) is getattr(minidiff, RENAMED[name])
