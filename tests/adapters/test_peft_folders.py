"""Folders that PEFT's ``save_pretrained`` writes, against peft itself, in float64."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import minidiff
from minidiff.adapters.source import read_adapter
from minidiff.errors import CheckpointError, CheckpointNotFoundError
from tests.hub_server import HubServer, Repository, run_with
from tests.loras import Pipes, assert_same, outputs
from tests.pictures import seeded
from tests.theirs import peft, relative_error
from tests.tiny import save_tiny

TARGETS = ("to_q", "to_v", "to_out.0", "q_proj", "v_proj", "fc1")
SETTINGS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 6},
    "stabilised": {"lora_alpha": 6, "use_rslora": True},
    "DoRA": {"lora_alpha": 6, "use_dora": True},
    "biases of the matrices": {"lora_alpha": 6, "lora_bias": True, "only": ("to_out.0", "q_proj", "fc1")},
    "LoHa": {"kind": "LoHaConfig", "alpha": 6, "alpha_pattern": {"to_v": 7}, "rank_pattern": {"to_q": 2}},
    "LoKr": {"kind": "LoKrConfig", "alpha": 6, "decompose_factor": 2, "alpha_pattern": {"to_v": 7}},
    "LoKr without a rank": {"kind": "LoKrConfig", "alpha": 6, "decompose_factor": 6, "alpha_pattern": {"to_v": 7}},
    "patterns": {
        "rank_pattern": {"attn1.to_q": 3, r".*layers\.0.*q_proj": 2},
        "alpha_pattern": {"to_v": 7, "mid_block.*to_q": 1, "v_proj": 5, "^encoder.layers.1.mlp.fc1": 9},
    },
}


def parts_of(pipe: Any) -> list[str]:
    return [name for name in ("unet", "text_encoder", "text_encoder_2") if hasattr(pipe, name)]


def train(
    theirs: Any, folder: Path, only: tuple[str, ...] = TARGETS, kind: str = "LoraConfig", **settings: Any
) -> list[Tensor]:
    """Do as PEFT's examples/lora_dreambooth/train_dreambooth.py: save each network to its folder. Return outputs."""
    wrapped, g = copy.copy(theirs), seeded(1)
    for part in parts_of(theirs):
        targets = [name for name in only if any(n.endswith(name) for n, _ in getattr(theirs, part).named_modules())]
        config = getattr(peft, kind)(r=4, target_modules=targets, **settings)
        model = peft.get_peft_model(copy.deepcopy(getattr(theirs, part)), config).to(torch.float64)
        for name, parameter in model.named_parameters():
            if any(start in name for start in ("lora_", "hada_", "lokr_")):
                parameter.data = torch.randn(parameter.shape, generator=g, dtype=torch.float64) / 4
        model.save_pretrained(folder / part)
        setattr(wrapped, part, model.base_model.model)
    return outputs(wrapped)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a pattern for the text encoder matches nothing in the UNet
def test_a_folder_for_each_network(pipes: Pipes, tmp_path: Path, settings: str) -> None:
    """The whole pipeline, and each network by itself, compute what peft's wrapped networks do."""
    ours, theirs = pipes
    plain, expected = outputs(ours), train(theirs, tmp_path, **SETTINGS[settings])
    ours.load_lora_weights(tmp_path)
    assert_same(outputs(ours), expected)  # measured: at most 1.6e-15
    assert relative_error(expected[0], plain[0]) > 1e-3 and relative_error(expected[1], plain[1]) > 1e-3
    ours.unload_lora_weights()
    assert all(map(torch.equal, outputs(ours), plain))
    for k, part in enumerate(parts_of(ours)):  # without a name: pipeline and network share their adapters
        folder = tmp_path / part
        source = (folder, str(folder / "adapter_model.safetensors"), folder)[k]
        getattr(ours, part).load_lora_adapter(source, prefix=(None, "base_model.model", "unet")[k])
    assert_same(outputs(ours), expected)


def test_one_folder_says_whose_it_is(xl: Pipes, tmp_path: Path) -> None:
    """PEFT notes the class of the network: each folder alone is given to the pipeline, and adapts that network."""
    ours, theirs = xl
    expected = train(theirs, tmp_path)
    for part in parts_of(ours):
        found = ours.load_lora_weights(tmp_path, subfolder=part, adapter_name=part)
        assert list(found.layers) == [part]
    assert ours.get_list_adapters() == {part: [part] for part in parts_of(ours)}
    assert_same(outputs(ours), expected)


def test_folders_on_the_hub(sd: Pipes, tmp_path: Path) -> None:
    """Of one network, and of several; what is downloaded is weights and configurations."""
    train(sd[1], tmp_path / "repo")
    code = (
        "from minidiff.adapters.source import read_adapter\n"
        "name = 'pytorch_lora_weights.safetensors'\n"
        "one, all = read_adapter('a/b', name, subfolder='unet'), read_adapter('a/b', name)\n"
        "print(len(one.tensors), len(all.tensors), sorted({key.split('.')[0] for key in all.tensors}))"
    )
    with HubServer({"a/b": Repository({"main": tmp_path / "repo"})}) as hub:
        one, several = (len(read_adapter(tmp_path / "repo" / sub, "x").tensors) for sub in ("unet", ""))
        assert run_with(hub, tmp_path / "cache", code) == f"{one} {several} ['text_encoder', 'unet']"
        files = {name.split("/", 3)[3] for name in hub.downloaded()}
        kinds = ("config.json", "model.safetensors")
        assert files == {f"{part}/adapter_{kind}" for part in ("text_encoder", "unet") for kind in kinds}


# --- bad input -------------------------------------------------------------------------------------------------------


def write(folder: Path, **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    layer = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file(
        {f"{layer}.lora_A.weight": torch.ones(2, 16), f"{layer}.lora_B.weight": torch.ones(16, 2)},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": "none"} | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


ASKED = {
    "DoRA": ({"use_dora": True}, "to_q is DoRA, but it has no lora_magnitude_vector"),
    "biases": ({"bias": "lora_only"}, "adapter_config.json asks for unet.bias = 'lora_only'"),
    "whole layers": ({"modules_to_save": ["conv_in"]}, r"asks for unet.modules_to_save = \['conv_in'\]"),
    "another adapter": (
        {"peft_type": "IA3"},
        "peft_type = 'IA3': of PEFT's adapters minidiff reads only LORA",
    ),
    "another rank": ({"r": 3}, "has rank 2, but the file's header says r = 3"),
    "a pattern": ({"alpha_pattern": {"to_q(": 4}}, r"unet.alpha_pattern: 'to_q\(' is no regular expression: missing"),
    "no patterns": ({"rank_pattern": ["to_q"]}, r"unet.rank_pattern should be an object.*found \['to_q'\]"),
    "another network": (
        {"auto_mapping": {"base_model_class": "CLIPTextModel"}},
        "text_encoder.base_model.*for a layer 'text_model.down_blocks.*which text_encoder does not have",
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_a_configuration_may_not_ask_for(sd: Pipes, tmp_path: Path, name: str) -> None:
    fields, message = ASKED[name]
    with pytest.raises(CheckpointError, match=message):
        sd[0].load_lora_weights(write(tmp_path, **fields))
    assert sd[0].get_list_adapters() == {}


def test_folders_that_lack_something(sd: Pipes, tmp_path: Path) -> None:
    ours = sd[0]
    write(tmp_path / "bare")
    (tmp_path / "bare" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointNotFoundError, match="bare has no adapter_config.json; it holds adapter_model.safet"):
        ours.load_lora_weights(tmp_path / "bare")
    for folder in ("pickle", "of_all/unet"):
        write(tmp_path / folder)
        (tmp_path / folder / "adapter_model.safetensors").rename(tmp_path / folder / "adapter_model.bin")
    for folder in ("pickle", "of_all"):
        with pytest.raises(
            CheckpointNotFoundError, match="adapter_model.bin: minidiff reads only safetensors.*convert"
        ):
            ours.load_lora_weights(tmp_path / folder)
    write(tmp_path / "of_all" / "text_encoder")  # the UNet's half is still a pickle: nothing is loaded
    with pytest.raises(CheckpointNotFoundError, match="of_all/unet has no adapter_model.safetensors.*only safetensors"):
        ours.load_lora_weights(tmp_path / "of_all")
    assert ours.get_list_adapters() == {}


def test_peft_is_told_what_to_call_instead(tmp_path: Path) -> None:
    """It fills its layers by the names of modules, which are ours: they would keep their first, random values."""
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(save_tiny(tmp_path), safety_checker=None)
    for network in (pipe.unet, pipe.text_encoder):
        with pytest.raises(NotImplementedError, match=r"call load_lora_adapter\(folder\), or load_lora_weights"):
            peft.get_peft_model(network, peft.LoraConfig(target_modules=["to_q", "q_proj"]))
