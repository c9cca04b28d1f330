"""Files outside the scope are named by their family, whoever is asked to load them."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import minidiff
from minidiff.checkpoints.original.families import recognise, stranger
from minidiff.checkpoints.original.prefixes import rows_in_file, usual_prefixes
from minidiff.checkpoints.original.strangers import STRANGERS, outside
from minidiff.cli.main import main
from minidiff.embedded import embedded_checkpoint
from minidiff.errors import CheckpointError
from tests.single_files import TWINS, Twin, sparse_file
from tests.tiny import save_tiny
from tests.vocabulary import load_script

headers = load_script("headers")
UNET = "model.diffusion_model."

# A name in a published file, or of a network of the reference -> what the file is.
NAMES = {
    "lora_controlnet": "a ControlNet-LoRA",
    "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight": "a ControlNet-LLLite",
    "control_model.zero_convs.0.0.weight": "a ControlNet",
    "control_model.time_embed.0.weight": "a ControlNet",
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet",
    "controlnet_down_blocks.0.weight": "a ControlNet",
    "image_proj.proj.weight": "an IP-Adapter",
    "ip_adapter.1.to_k_ip.weight": "an IP-Adapter",
    "body.0.in_conv.weight": "a T2I-Adapter",
    "body.0.block2.weight": "a T2I-Adapter",
    "adapter.body.0.resnets.0.block1.weight": "a T2I-Adapter",
    "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor"
    ".to_q_lora.down.weight": "a motion LoRA",
    "mid_block.motion_modules.0.temporal_transformer.norm.bias": "motion modules (AnimateDiff)",
    "down_blocks.0.temporal_attentions.0.norm.weight": "motion modules (HotshotXL)",
    "model.1.sub.0.RDB1.conv1.0.weight": "an upscaler (ESRGAN)",
    "body.0.rdb1.conv1.weight": "an upscaler (ESRGAN)",
    "RRDB_trunk.0.RDB1.conv1.weight": "an upscaler (ESRGAN)",
    UNET + "input_blocks.1.1.time_stack.0.attn1.to_q.weight": "Stable Video Diffusion",
    "down_blocks.0.resnets.0.temporal_res_block.conv1.weight": "Stable Video Diffusion",
    UNET + "txt_in.individual_token_refiner.blocks.0.norm1.weight": "Hunyuan Video",
    "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias": "Hunyuan Video",
    UNET + "head.modulation": "Wan",
    "condition_embedder.time_embedder.linear_1.weight": "Wan",
    "decoder.middle.0.residual.0.gamma": "the autoencoder of Wan",
    UNET + "patchify_proj.weight": "LTX-Video",
    "blocks.0.attn.qkv_x.weight": "Mochi",
    UNET + "t5_yproj.weight": "Mochi",
    "patch_embed.text_proj.weight": "CogVideoX",
    "net.x_embedder.proj.1.weight": "Cosmos",
    "lora_prior_unet_down_blocks_0_11_attention_attn_to_q.lora_down.weight": "a LoRA for Stable Cascade",
    "lora_unet_single_blocks_0_linear1.lora_down.weight": "a LoRA for Flux or Hunyuan Video",
    "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": "a LoRA for Flux or Hunyuan Video",
    "double_blocks.0.processor.qkv_lora1.down.weight": "a LoRA for Flux",
    "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": "a LoRA for Flux",
    "lora_transformer_single_transformer_blocks_0_attn_to_q.lora_down.weight": "a LoRA for Flux",
    "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": "a LoRA for Stable Diffusion 3",
    "diffusion_model.blocks.0.self_attn.q.lora_A.weight": "a LoRA for Wan",
    "lora_unet_blocks_0_cross_attn_k.lora_down.weight": "a LoRA for Wan",
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": "a LoRA for a diffusion transformer",
    "t5": "a textual inversion for Flux",
    "blk.0.attn_q.weight": "a language model, or T5",
    UNET + "joint_blocks.0.context_block.adaLN_modulation.1.bias": "Stable Diffusion 3",
    UNET + "distilled_guidance_layer.in_proj.bias": "Chroma",
    "double_stream_modulation_img.lin.weight": "Flux 2",
    UNET + "double_blocks.0.img_attn.norm.key_norm.scale": "Flux",
    "single_transformer_blocks.0.attn.to_q.weight": "Flux",
    "double_layers.0.attn.w2q.weight": "AuraFlow",
    "joint_transformer_blocks.0.attn.to_q.weight": "AuraFlow",
    "mlp_t5.0.weight": "HunyuanDiT",
    "time_extra_emb.timestep_embedder.linear_1.weight": "HunyuanDiT",
    "clip_txt_mapper.weight": "Stable Cascade",
    "down_blocks.1.0.channelwise.0.weight": "Stable Cascade",
    UNET + "cap_embedder.0.weight": "Lumina 2 or Z-Image",
    "double_stream_blocks.0.block.adaLN_modulation.1.bias": "HiDream",
    "txt_norm.weight": "Qwen-Image",
    "t_block.1.weight": "PixArt or Sana",
    "adaln_single.emb.timestep_embedder.linear_1.bias": "PixArt or Sana",
    "add_embedding.pool.positional_embedding": "DeepFloyd IF",
    "add_embedding.image_norm.weight": "Kandinsky 2",
    "pos_embed.proj.weight": "Stable Diffusion 3",
    "encoder.block.0.layer.0.SelfAttention.k.weight": "a T5 text encoder",
    "blocks.0.attn.qkv.weight": "a diffusion transformer of an unknown family",
    UNET + "input_blocks.1.1.proj_in.scale_weight": "stored in float8 with scales",
    UNET + "scaled_fp8": "stored in float8 with scales",
}


def test_every_kind_is_told() -> None:
    for name, what in NAMES.items():
        said = outside(["a.weight", name])
        assert said is not None and said.startswith(f"{what}"), (name, said)
        assert said.endswith(f"which minidiff does not implement (it has {name})")
    hit = {next(row for row in STRANGERS if row.names.fullmatch(name)) for name in NAMES}
    assert [row.what for row in STRANGERS if row not in hit] == []  # every row has an example


def names_of_ours(folder: Path) -> Iterator[str]:
    """Yield the names of every file that is in scope: published single files, folders and files of all twins."""
    for path in headers.HERE.glob("*.json"):
        yield from headers.read_list(path)
    for kind in TWINS:
        for component, model in Twin(kind, folder).ours.components.items():
            if isinstance(model, torch.nn.Module):
                for prefix in usual_prefixes(component):
                    for like_hub in (False, True):
                        yield from (name for row in rows_in_file(model.rows(), prefix, like_hub) for name in row.ldm)
    yield from minidiff.UNet2DModel.from_pretrained(embedded_checkpoint("emoji32-ddpm"), subfolder="unet").state_dict()


def test_nothing_in_scope_is_a_stranger(tmp_path: Path) -> None:
    assert outside(dict.fromkeys(names_of_ours(tmp_path))) is None


LORAS = (
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight",
    "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.lora_A.weight",
    "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w1_a",
)


@pytest.mark.parametrize("name", LORAS)
def test_loras_of_the_family_are_no_strangers(name: str) -> None:
    assert outside([name]) is None


LOADED = ["control_model.time_embed.0.weight", UNET + "double_blocks.0.img_attn.norm.key_norm.scale"]
LOADED += [UNET + "scaled_fp8", "ip_adapter.1.to_k_ip.weight", "body.0.rdb1.conv1.weight"]


@pytest.mark.parametrize("name", LOADED)
def test_whoever_loads_it_names_it(name: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({name: torch.ones(2, 2)}, path)
    message = re.escape(f"is {NAMES[name]}")
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(folder)
    for load in (
        minidiff.DiffusionPipeline.from_single_file,
        minidiff.UNet2DConditionModel.from_single_file,
        minidiff.AutoencoderKL.from_single_file,
        pipe.load_lora_weights,
        pipe.unet.load_lora_adapter,
    ):
        options = {"prefix": None} if load == pipe.unet.load_lora_adapter else {}
        with pytest.raises(CheckpointError, match=message):
            load(path, **options)
    save_file({name: torch.ones(2, 2), "a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=message):
        pipe.load_textual_inversion(path)
    folder = save_tiny(tmp_path / "hub")
    save_file({name: torch.ones(2, 2)}, folder / "unet/diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"diffusion_pytorch_model.safetensors in .* {message}"):
        minidiff.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")


@pytest.mark.parametrize("name", [*LOADED, "emb_params"])
def test_inspect_names_it_and_lists_nothing(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sparse_file(tmp_path / "foreign.safetensors", {name: ["F16", [4, 8]], "other": ["F8_E4M3", [2, 3]]})
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines() == [
        str(path),
        f"  kind        {stranger([name])}",
        "  layout      70 B, 2 tensors, 38 parameters",
        "  dtype       float16 (1), float8_e4m3fn (1)",
    ]


def test_the_autoencoders_of_others(tmp_path: Path) -> None:
    """That of Flux and SD 3 has the names of Stable Diffusion's, and 16 channels; a configuration may describe it."""
    names = {"decoder.conv_in.weight": [512, 16, 3, 3], "encoder.down.0.block.0.conv1.weight": [128, 128, 3, 3]}
    path = sparse_file(tmp_path / "ae.safetensors", {name: ["F32", shape] for name, shape in names.items()})
    with pytest.raises(CheckpointError, match=r"is an autoencoder of 16 channels .*Flux.*config="):
        minidiff.AutoencoderKL.from_single_file(path)
    ours = {"decoder.conv_in.weight": (512, 4, 3, 3)}
    assert recognise(ours, None, "x").title == "autoencoder of Stable Diffusion"


def test_a_folder_of_another_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny(tmp_path / "hub")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"unet"', '"transformer"').replace("StableDiffusionP", "FluxP"))
    assert main(["inspect", str(folder)]) == 2
    assert "is for FluxPipeline, a pipeline that minidiff does not implement" in capsys.readouterr().err
