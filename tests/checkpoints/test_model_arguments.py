"""Loaders' arguments, own models, ``AutoModel``: what asks for nothing is accepted, the rest is told what to do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from minidiff.configuration_utils import ConfigMixin, register_to_config
from minidiff.models import ModelMixin
from torch import nn

import minidiff
from minidiff.checkpoints.arguments import HARMLESS, device_of
from minidiff.errors import ConfigError
from tests.theirs import diffusers

VAE = {"block_out_channels": [8], "norm_num_groups": 4}
TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("vae")
    minidiff.AutoencoderKL(**VAE).save_pretrained(where)
    return where


@pytest.mark.parametrize("name", sorted(HARMLESS.keys() - {"device_map", "output_loading_info"}))
def test_what_asks_for_nothing_is_accepted_and_the_rest_has_advice(folder: Path, name: str) -> None:
    values, advice = HARMLESS[name]
    for value in values:
        minidiff.AutoencoderKL.from_pretrained(folder, **{name: value})
    if False in values and True not in values:
        with pytest.raises(TypeError) as error:
            minidiff.AutoencoderKL.from_pretrained(folder, **{name: True})
        assert f"{name}=True is not implemented; {advice}" == str(error.value)


@pytest.mark.parametrize("device_map", ["cpu", torch.device("cpu"), {"": "cpu"}, {"": torch.device("cpu")}, None])
def test_device_map_is_a_device(folder: Path, device_map: Any) -> None:
    vae = minidiff.AutoencoderKL.from_pretrained(folder, device_map=device_map, low_cpu_mem_usage=True)
    assert vae.device == torch.device("cpu")


def test_device_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of("cuda:1") == device_of(1) == device_of({"": 1}) == torch.device("cuda:1")
    assert device_of("mps") == torch.device("mps") and device_of({"a": 0, "b": 0}) == torch.device("cuda:0")
    for available, count, expected in ((False, 0, "cpu"), (True, 1, "cuda")):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda available=available: available)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda count=count: count)
        assert device_of("auto") == device_of("balanced") == torch.device(expected)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for wrong, kind, text in (
        ("auto", TypeError, "where there are 2 devices"),
        ({"encoder": 0, "decoder": 1}, TypeError, "lies on one device"),
        ({"": "disk"}, TypeError, "lies on one device"),
        ("gpu", ValueError, "device_map='gpu' is not a device such as 'cuda'"),
        (-1, ValueError, "device_map=-1 is not a device"),
        (True, ValueError, "device_map=True is not a device"),
    ):
        with pytest.raises(kind, match=text):
            device_of(wrong)


def test_loading_info_and_the_place_it_came_from(folder: Path) -> None:
    vae, info = minidiff.AutoencoderKL.from_pretrained(folder, output_loading_info=True)
    _, theirs = diffusers.AutoencoderKL.from_pretrained(folder, output_loading_info=True)
    assert info == theirs
    assert vae.name_or_path == vae.config._name_or_path == str(folder)
    assert minidiff.AutoencoderKL(**VAE).name_or_path == ""


def test_configurations_are_read_changed_and_written(folder: Path, tmp_path: Path) -> None:
    fields = minidiff.AutoencoderKL.load_config(folder.parent, subfolder=folder.name)
    assert fields == diffusers.AutoencoderKL.load_config(folder)
    vae = minidiff.AutoencoderKL.from_config(fields, latent_channels=8)
    vae.register_to_config(scaling_factor=0.5)
    assert (vae.config.latent_channels, vae.config["scaling_factor"]) == (8, 0.5)
    vae.save_config(tmp_path, push_to_hub=False)
    assert diffusers.AutoencoderKL.load_config(tmp_path)["scaling_factor"] == 0.5
    with pytest.warns(FutureWarning, match="load_config"):
        again = minidiff.AutoencoderKL.from_config(folder.parent, subfolder=folder.name)
    assert again.config.latent_channels == 4
    for call in (vae.save_config, vae.save_pretrained):
        with pytest.raises(TypeError, match="push_to_hub=True is not implemented; save to a folder"):
            call(tmp_path, push_to_hub=True)
    with pytest.raises(TypeError, match="save_pretrained has no argument colour"):
        vae.save_pretrained(tmp_path, colour=1)


def test_a_process_that_is_not_the_main_one_writes_no_weights(tmp_path: Path) -> None:
    minidiff.AutoencoderKL(**VAE).save_pretrained(tmp_path, is_main_process=False)
    diffusers.AutoencoderKL(**VAE).save_pretrained(tmp_path / "theirs", is_main_process=False)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == []


def test_memory_footprint_and_compilation() -> None:
    vae, theirs = minidiff.AutoencoderKL(**VAE), diffusers.AutoencoderKL(**VAE)
    assert vae.get_memory_footprint() == theirs.get_memory_footprint() == 4 * vae.num_parameters()
    with pytest.raises(ValueError, match="no blocks that repeat"):
        vae.compile_repeated_blocks()
    fields = {"block_out_channels": [8, 8], "cross_attention_dim": 4, "attention_head_dim": 2, "norm_num_groups": 4}
    types = {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "layers_per_block": 1}
    unet = minidiff.UNet2DConditionModel(**fields, **types, up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"])
    x, ctx = torch.randn(1, 4, 4, 4), torch.randn(1, 3, 4)
    before = unet(x, 1, ctx).sample
    unet.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert sum(module._compiled_call_impl is not None for module in unet.modules()) == 4
    assert torch.allclose(unet(x, 1, ctx).sample, before, atol=1e-6)


def test_auto_model(folder: Path, tmp_path: Path) -> None:
    text = minidiff.CLIPTextModelWithProjection(minidiff.CLIPTextConfig(**TEXT, projection_dim=4))
    text.save_pretrained(tmp_path / "text_encoder_2")
    found = minidiff.AutoModel.from_pretrained(tmp_path, subfolder="text_encoder_2", torch_dtype=torch.float16)
    assert type(found) is minidiff.CLIPTextModelWithProjection and found.dtype == torch.float16
    assert type(minidiff.AutoModel.from_pretrained(folder)) is minidiff.AutoencoderKL
    assert type(minidiff.AutoModel.from_config({"_class_name": "AutoencoderKL", **VAE})) is minidiff.AutoencoderKL
    assert type(minidiff.AutoModel.from_config(folder.parent, subfolder=folder.name)) is minidiff.AutoencoderKL
    for config in ({"_class_name": "FluxTransformer2DModel"}, {}, {"_class_name": "DDIMScheduler"}):
        with pytest.raises(ConfigError, match="minidiff has AutoencoderKL, the encoders of CLIP, UNet2D"):
            minidiff.AutoModel.from_config(config)
    with pytest.raises(ValueError, match="found None"):
        minidiff.AutoModel.from_config(None)
    with pytest.raises(OSError, match="from_pretrained or from_config"):
        minidiff.AutoModel()


TINY = {f"{half}_block_out_channels": [8] for half in ("encoder", "decoder")}
TINY |= {"num_encoder_blocks": [1], "num_decoder_blocks": [1]}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [(minidiff.AutoencoderKL, VAE), (minidiff.AutoencoderTiny, TINY), (minidiff.CLIPTextModel, None)],
)
def test_derived_networks_load_and_save_as_what_they_are_derived_from(kind: type, fields: Any, tmp_path: Path) -> None:
    """As in the reference, where a pipeline's index names the class, and no class looks at the name in its file."""
    network = kind(**fields) if fields else kind(minidiff.CLIPTextConfig(**TEXT))
    network.save_pretrained(tmp_path / "ours")
    derived = type("Derived", (kind,), {}).from_pretrained(tmp_path / "ours")
    assert type(derived).__name__ == "Derived"
    derived.save_pretrained(tmp_path / "derived")
    assert type(kind.from_pretrained(tmp_path / "derived")) is kind
    configs = [(tmp_path / name / "config.json").read_text() for name in ("ours", "derived")]
    assert configs[0] == configs[1]
    assert type(minidiff.AutoModel.from_pretrained(tmp_path / "derived")) is kind


def own(base: type, mixin: type, register: Any) -> type:
    class Denoiser(base, mixin):
        @register
        def __init__(self, width: int = 4, sizes: tuple[int, ...] = (1, 2)) -> None:
            super().__init__()
            self.layer = nn.Linear(width, width)
            self.norm = nn.BatchNorm1d(width)  # has an integer among its weights
            self.register_buffer("ramp", torch.arange(width), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.layer(x)) + self.ramp

    return Denoiser


def test_own_models_are_saved_and_loaded_as_in_the_reference(tmp_path: Path) -> None:
    Ours = own(ModelMixin, ConfigMixin, register_to_config)
    Theirs = own(diffusers.ModelMixin, diffusers.ConfigMixin, diffusers.configuration_utils.register_to_config)
    ours = Ours(width=6).eval()
    ours.save_pretrained(tmp_path)
    again, theirs = Ours.from_pretrained(tmp_path), Theirs.from_pretrained(tmp_path)
    x = torch.randn(3, 6)
    assert torch.equal(again(x), ours(x)) and torch.equal(theirs(x), ours(x))
    assert again.config.width == 6 and again.name_or_path == str(tmp_path) and not again.training
    theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {
        k: v for k, v in json.loads((tmp_path / "theirs" / "config.json").read_text()).items() if k[0] != "_"
    } | {k: v for k, v in config.items() if k[0] == "_"}
    assert torch.equal(
        Ours.from_pretrained(tmp_path / "theirs", torch_dtype=torch.float64).layer.weight, ours.layer.weight.double()
    )
    assert [name for name, _ in ours.named_modules()] == ["", "layer", "norm"]
    assert list(ours.state_dict())[:2] == ["layer.weight", "layer.bias"]
    with pytest.warns(FutureWarning, match=r"config\.width"):
        assert ours.width == 6

    class Silent(ModelMixin, ConfigMixin):  # whose constructor is not recorded
        pass

    Silent().save_config(tmp_path / "silent")
    assert Silent().config == {}
    with pytest.raises(AttributeError, match="nothing"):
        ours.nothing  # noqa: B018
