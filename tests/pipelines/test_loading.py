"""Arguments with which published programs load and save pipelines."""

from pathlib import Path
from typing import Any

import pytest
import torch

import minidiff
from minidiff import AutoPipelineForImage2Image, DiffusionPipeline, StableDiffusionPipeline
from tests.theirs import diffusers


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), "meta", "balanced", {"": "cpu"}])
def test_a_device_map_that_is_one_device(folder: Path, device_map: Any) -> None:
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16, device_map=device_map)
    expected = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    where = expected if device_map == "balanced" else torch.device("meta" if device_map == "meta" else "cpu")
    assert {network.device.type for network in (pipe.unet, pipe.vae, pipe.text_encoder)} == {where.type}
    assert pipe.dtype == torch.bfloat16
    assert pipe.hf_device_map == {"unet": where, "vae": where, "text_encoder": where}
    if where.type != "meta":
        pipe.reset_device_map()
        assert pipe.hf_device_map is None
        assert pipe.device.type == "cpu"


def test_without_a_device_map_there_is_none(folder: Path) -> None:
    assert DiffusionPipeline.from_pretrained(folder, device_map=None).hf_device_map is None


DTYPES = {
    "some": {"unet": torch.float16, "default": torch.bfloat16},
    "no default": {"unet": torch.float16},
    "texts": {"vae": "float16", "default": "bfloat16"},
}


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("argument", ["torch_dtype", "dtype"])
def test_a_dtype_for_each_component(folder: Path, argument: str, name: str) -> None:
    ours = DiffusionPipeline.from_pretrained(folder, **{argument: DTYPES[name]})
    found = [ours.unet.dtype, ours.vae.dtype, ours.text_encoder.dtype]
    expected = {k: getattr(torch, v) if isinstance(v, str) else v for k, v in DTYPES[name].items()}
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=expected)
    assert found == [theirs.unet.dtype, theirs.vae.dtype, theirs.text_encoder.dtype]


def test_a_dtype_for_a_component_that_there_is_not(folder: Path) -> None:
    with pytest.raises(ValueError, match="torch_dtype names unett.*unet"):
        DiffusionPipeline.from_pretrained(folder, torch_dtype={"unett": torch.float16})


HARMLESS = {
    "proxies": None,
    "resume_download": True,
    "low_cpu_mem_usage": True,
    "use_auth_token": None,
    "max_memory": None,
    "offload_folder": None,
    "offload_state_dict": None,
    "use_onnx": None,
    "custom_pipeline": None,
    "custom_revision": None,
    "provider": None,
    "mirror": None,
    "from_flax": False,
    "output_loading_info": False,
    "quantization_config": None,
    "trust_remote_code": None,
}


@pytest.mark.parametrize("kind", [DiffusionPipeline, StableDiffusionPipeline, AutoPipelineForImage2Image])
def test_arguments_that_ask_for_nothing(folder: Path, kind: Any) -> None:
    assert kind.from_pretrained(folder, **HARMLESS).unet is not None


ASKING = {
    "custom_pipeline": ("lpw_stable_diffusion", "no code"),
    "use_onnx": (True, "ONNX"),
    "provider": ("CUDAExecutionProvider", "ONNX"),
    "max_memory": ({0: "1GB"}, "enable_model_cpu_offload"),
    "output_loading_info": (True, "networks have it"),
}


@pytest.mark.parametrize("name", ASKING)
def test_arguments_that_ask_for_something(folder: Path, name: str) -> None:
    value, advice = ASKING[name]
    with pytest.raises(TypeError, match=f"{name}.*{advice}"):
        DiffusionPipeline.from_pretrained(folder, **{name: value})


def test_where_it_came_from(folder: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert pipe.name_or_path == str(folder)
    assert StableDiffusionPipeline(**pipe.components).name_or_path is None


def test_download(folder: Path) -> None:
    assert DiffusionPipeline.download(folder) == str(folder)


def test_save_arguments_that_ask_for_nothing(folder: Path, tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path, push_to_hub=False, max_shard_size=None)
    assert minidiff.DiffusionPipeline.from_pretrained(tmp_path).unet is not None
    with pytest.raises(TypeError, match="push_to_hub.*upload_folder"):
        pipe.save_pretrained(tmp_path, push_to_hub=True)


def test_to_with_the_names_of_the_reference(folder: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert pipe.to(torch_device="cpu", torch_dtype=torch.float16, silence_dtype_warnings=True).dtype == torch.float16


class Extractor:
    """Any object that knows how to be saved."""

    def save_pretrained(self, folder: Path) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "preprocessor_config.json").write_text("{}")


def test_a_feature_extractor_is_kept(folder: Path) -> None:
    parts = DiffusionPipeline.from_pretrained(folder).components
    pipe = StableDiffusionPipeline(**{**parts, "feature_extractor": (given := Extractor())})
    assert pipe.feature_extractor is given
    assert pipe.components["feature_extractor"] is given
    assert minidiff.StableDiffusionImg2ImgPipeline(**pipe.components).feature_extractor is given
    assert AutoPipelineForImage2Image.from_pipe(pipe).feature_extractor is given


def test_a_compiled_network_is_saved_as_what_it_is(folder: Path, tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.unet.parameters(), pipe.unet.parameters(), strict=True))
