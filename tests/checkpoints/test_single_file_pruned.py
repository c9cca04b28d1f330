"""Checkpoints of pruned and upscaling UNets at full size: recognised in a file and in a folder, by what is left.

Files hold no data (``tests.single_files.sparse_file``). Their names follow from our table; that the reference reads
them is shown on small ones, in ``tests/pipelines/test_pruned_unets.py`` and ``tests/networks/test_classes.py``.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import minidiff
from minidiff import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from minidiff.checkpoints.load import OnMeta, expected_shapes
from minidiff.checkpoints.original.configs import PackagedConfigs
from minidiff.checkpoints.original.families import FAMILIES, family_of, recognise
from minidiff.checkpoints.original.prefixes import EMA, UNET, ema_name
from minidiff.checkpoints.tools.checkpoint import open_checkpoint
from minidiff.checkpoints.tools.inspect import report
from minidiff.cli.main import main
from minidiff.errors import CheckpointError, ConfigError
from tests.single_files import sparse_file
from tests.vocabulary import load_script

headers = load_script("headers")
PRUNED = {f.configs["epsilon"]: f for f in FAMILIES if f.left is not None}
UPSCALER = "stable-diffusion-x4-upscaler"
# Bytes of published files: SSD-1B-A1111.safetensors and segmind-vega.safetensors in float16, as programs that check
# them say. https://arxiv.org/abs/2312.04005, table 1: KOALA has 782 M and 1,161 M. https://arxiv.org/abs/2305.15798,
# table 2: BK-SDM has 0.58 B (base, as small-sd) and 0.33 B (tiny).
BYTES = {"SSD-1B": 4_465_671_322, "Segmind-Vega": 3_293_395_670}
LOADED = ("SSD-1B", "tiny-sd")  # the others are as these, and it takes seconds
MILLIONS = {"koala-700m": 783, "koala-1b": 1161, "small-sd": 579, "tiny-sd": 323}


@cache
def tensors_of(name: str) -> dict[str, list[Any]]:
    return headers.derive(headers.Published("", name, "F16"))


def renamed(tensors: dict[str, list[Any]], old: str, new: str) -> dict[str, list[Any]]:
    return {new + name[len(old) :]: entry for name, entry in tensors.items() if name.startswith(old)}


@pytest.mark.parametrize("name", PRUNED)
def test_files_at_full_size(name: str, tmp_path: Path) -> None:
    path = sparse_file(tmp_path / "file.safetensors", tensors_of(name))
    checkpoint = open_checkpoint(path).check()
    assert checkpoint.title == PRUNED[name].title and not checkpoint.dropped
    counts = {p.name: sum(torch.Size(t.shape).numel() for t in p.found.values()) for p in checkpoint.parts}
    if name in BYTES:  # all there is but the header, of about 150 bytes a tensor
        assert 0 < BYTES[name] - 2 * sum(counts.values()) < 300_000
    if name in MILLIONS:
        assert round(counts["unet"] / 1e6) == MILLIONS[name]
    if name not in LOADED:
        return
    pipe = DiffusionPipeline.from_single_file(path, torch_dtype="float16")
    assert type(pipe) is (StableDiffusionXLPipeline if "text_encoder_2" in counts else StableDiffusionPipeline)
    assert pipe.unet.num_parameters() == counts["unet"]


@pytest.mark.parametrize("name", PRUNED)
def test_moving_averages_and_networks_alone(name: str) -> None:
    unet = {key: entry for key, entry in tensors_of(name).items() if key.startswith(UNET)}
    averages = {ema_name(key.removeprefix(UNET)): entry for key, entry in unet.items()}
    for prefix, tensors in ((UNET, unet | averages), (UNET, averages), ("", renamed(unet, UNET, ""))):
        shapes = {key: tuple(shape) for key, (_, shape) in tensors.items()}
        assert recognise(shapes, prefix, "file") is PRUNED[name]
    assert all(key.startswith(EMA) for key in averages)


def test_a_pruned_file_with_a_part_missing(tmp_path: Path) -> None:
    """Its count is of no family: it is measured against a whole network, and everything that this has is named."""
    gone = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    tensors = {key: entry for key, entry in tensors_of("tiny-sd").items() if key != UNET + gone}
    path = sparse_file(tmp_path / "file.safetensors", tensors)
    assert open_checkpoint(path).title == "Stable Diffusion 1.x"
    with pytest.raises(CheckpointError, match=rf"455 missing:\n  {UNET}{gone}"):
        StableDiffusionPipeline.from_single_file(path)


def save_hub(model: UNet2DConditionModel, folder: Path) -> Path:
    """Write a network that is on the meta device in Hub layout, without data."""
    model.save_config(folder)
    shapes = expected_shapes(model, model.rows(), "hub")
    sparse_file(
        folder / "diffusion_pytorch_model.safetensors", {key: ["F16", list(shape)] for key, shape in shapes.items()}
    )
    return folder


@pytest.mark.parametrize("name", [*PRUNED, UPSCALER, "stable-diffusion-v1-5"])
def test_folders_at_full_size(name: str, tmp_path: Path) -> None:
    fields = PackagedConfigs(name).read("unet/config.json")
    if name == "stable-diffusion-v1-5":
        fields["time_cond_proj_dim"] = 256
    with OnMeta():
        model = UNet2DConditionModel.from_config(fields)
    folder = save_hub(model, tmp_path / "unet")
    checkpoint = open_checkpoint(folder).check()
    other = {UPSCALER: "Stable Diffusion x4 upscaler"}.get(name, "Stable Diffusion 1.x, told the guidance scale (LCM)")
    assert checkpoint.title == (PRUNED[name].title if name in PRUNED else other)
    if name in (*LOADED, UPSCALER):
        loaded = UNet2DConditionModel.from_pretrained(folder, torch_dtype="float16")
        assert loaded.num_parameters() == model.num_parameters()


@pytest.mark.parametrize("pruned", [{}, {"layers_per_block": 1, "mid_block_type": None}])
def test_as_many_blocks_are_not_enough(pruned: dict[str, Any]) -> None:
    """BK-SDM-v2 Tiny has SDXS-512-0.9's blocks, and Small as many layers; both look at the pixels everywhere."""
    fields = PackagedConfigs("sdxs-512-0.9").read("unet/config.json") | {"only_cross_attention": False}
    if pruned:
        fields = PackagedConfigs("stable-diffusion-2-1-base").read("unet/config.json") | pruned
    with OnMeta():
        model = UNet2DConditionModel.from_config(fields)
    family = family_of(1024, 4, expected_shapes(model, model.rows(), "ldm"))
    assert family is not None and family.title == "Stable Diffusion 2.x"


def test_the_upscaler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = tensors_of(UPSCALER)
    last = {key.replace(".22.", ".23."): e for key, e in tensors.items() if "cond_stage_model" in key and ".22." in key}
    noise = "betas alphas_cumprod_prev sqrt_recipm1_alphas_cumprod sqrt_alphas_cumprod".split()
    noise = {f"low_scale_model.{name}": ["F32", [1000]] for name in noise}
    path = sparse_file(tmp_path / "x4-upscaler-ema.safetensors", tensors | last | noise)
    checkpoint = open_checkpoint(path).check()
    assert {part.name for part in checkpoint.parts} == {"unet", "vae", "text_encoder"}
    assert len(checkpoint.dropped) == len(last) + len(noise) == 12 + 4
    assert main(["inspect", str(path)]) == 0
    page = capsys.readouterr().out
    assert page.strip() == report(checkpoint) and "Stable Diffusion x4 upscaler" in page and "v_prediction" in page
    unet = UNet2DConditionModel.from_single_file(path, torch_dtype="float16")
    assert unet.num_parameters() == 473_398_020 and unet.config.num_class_embeds == 1000
    assert minidiff.AutoencoderKL.from_single_file(path, torch_dtype="float16").config.scaling_factor == 0.08333
    for kind in (DiffusionPipeline, StableDiffusionPipeline):
        with pytest.raises(ConfigError, match="StableDiffusionUpscalePipeline"):
            kind.from_single_file(path)
