"""Files of families that minidiff does not implement, told by the names of their tensors.

One row for each: a pattern that some name in the file has to match as a whole, what such a file is, and where the name
is known from. The first row with such a name decides, so what is peculiar stands before what is common. Sources:

``diffusers``  loaders/single_file_utils.py (``CHECKPOINT_KEY_NAMES``), loaders/lora_conversion_utils.py; the classes
``comfy``      ComfyUI: comfy/model_detection.py, comfy/controlnet.py, comfy/lora.py, comfy/sd.py, comfy/ops.py
``spandrel``   chaiNNer-org/spandrel: architectures/ESRGAN/__init__.py
``animatediff``  Kosinkadink/ComfyUI-AnimateDiff-Evolved: animatediff/motion_lora.py, motion_module_ad.py
``city96``     city96/ComfyUI-GGUF: loader.py
``kohya``      kohya-ss/sd-scripts: networks/lora_flux.py, lora_sd3.py, control_net_lllite.py
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

_P = r"((model\.)?diffusion_model\.|model\.|transformer\.|net\.)?"  # what may stand before the names of a model
_L = r"((base_model\.model\.)?(transformer|diffusion_model)\.|lora_(unet|transformer)_)"  # before those of a LoRA
_LORA = r"[._].*(lora|lokr|hada|dora|alpha).*"

# Pattern, what it is, source; separated by two spaces or more.
_TABLE = rf"""
lora_controlnet  a ControlNet-LoRA (Control-LoRA)  comfy
lllite_.*  a ControlNet-LLLite  kohya
(control_model\.)?(zero_convs|input_hint_block)\..*  a ControlNet  comfy
control_model\..*|controlnet_.*  a ControlNet  diffusers, comfy
image_proj\..*|ip_adapter\..*  an IP-Adapter  diffusers (loaders/ip_adapter.py)
(adapter\.)?body\.\d+\.(in_conv|block[12]|resnets\.\d+\.block[12])\..*  a T2I-Adapter  comfy, diffusers
.*motion_modules\..*lora.*  a motion LoRA (AnimateDiff)  animatediff
.*motion_modules\..*  motion modules (AnimateDiff)  diffusers, animatediff
.*\.temporal_attentions\..*  motion modules (HotshotXL)  animatediff
(model\.\d+\.sub|body|RRDB_trunk)\.\d+\.(RDB|rdb)\d\..*  an upscaler (ESRGAN)  spandrel

.*\.(time_stack|time_mix_blocks|time_mixer)\..*  Stable Video Diffusion  comfy
.*\.(temporal_transformer_blocks|temporal_res_block)\..*  Stable Video Diffusion  diffusers
{_P}(txt_in\.individual_token_refiner|context_embedder\.token_refiner)\..*  Hunyuan Video  comfy, diffusers
{_P}(head\.modulation|vace_blocks\..*|condition_embedder\.(time|image)_embedder\..*)  Wan  comfy, diffusers
decoder\.middle\.0\.residual\.0\.gamma  the autoencoder of Wan  diffusers
{_P}patchify_proj\..*|vae\.per_channel_statistics\..*  LTX-Video  diffusers
{_P}(t5_yproj\..*|blocks\.\d+\.attn\.qkv_x\..*)  Mochi  comfy, diffusers
{_P}patch_embed\.text_proj\..*  CogVideoX  comfy, diffusers (models/embeddings.py)
{_P}(blocks\.(block)?0\.blocks\.0\.block\.attn\..*|x_embedder\.proj\.1\.weight)  Cosmos  diffusers, comfy

lora_prior_unet_.*  a LoRA for Stable Cascade  comfy
{_L}(single|double)_blocks{_LORA}  a LoRA for Flux or Hunyuan Video  diffusers, kohya
({_L})?(double|single)_blocks\.\d+\.processor\..*lora.*  a LoRA for Flux  diffusers
{_L}single_transformer_blocks{_LORA}  a LoRA for Flux  diffusers
{_L}joint_blocks{_LORA}  a LoRA for Stable Diffusion 3  kohya, comfy
{_L}blocks[._]\d+[._](self_attn|cross_attn){_LORA}  a LoRA for Wan  diffusers
{_L}transformer_blocks{_LORA}  a LoRA for a diffusion transformer (Stable Diffusion 3, LTX-Video...)  diffusers
t5(xxl)?  a textual inversion for Flux or Stable Diffusion 3  diffusers (examples/advanced_diffusion_training)
(blk|enc\.blk|token_embd|mm)\..*  a language model, or T5, in the names of llama.cpp  city96

{_P}joint_blocks\..*  Stable Diffusion 3  diffusers, comfy
{_P}distilled_guidance_layer\..*  Chroma  diffusers, comfy
{_P}(double_stream_modulation_img|single_stream_modulation)\..*  Flux 2  comfy, diffusers
{_P}((double|single)_blocks|single_transformer_blocks)\..*  Flux  diffusers, comfy
{_P}(double_layers|joint_transformer_blocks)\..*  AuraFlow  comfy, diffusers
{_P}(mlp_t5|time_extra_emb)\..*  HunyuanDiT  comfy, diffusers
{_P}(clf|clip_txt_mapper|clip_mapper|down_blocks\.\d+\.\d+\.channelwise)\..*  Stable Cascade  comfy, diffusers
{_P}cap_embedder\..*  Lumina 2 or Z-Image  comfy, diffusers
{_P}(caption_projection\.0\.linear|double_stream_blocks)\..*  HiDream  comfy, diffusers
{_P}txt_norm\..*  Qwen-Image  diffusers (transformer_qwenimage.py)
{_P}(t_block\.1|adaln_single)\..*  PixArt or Sana  comfy, diffusers
add_embedding\.pool\..*  DeepFloyd IF  diffusers (TextTimeEmbedding in models/embeddings.py)
add_embedding\.image_norm\..*  Kandinsky 2  diffusers (ImageTimeEmbedding in models/embeddings.py)
{_P}(pos_embed\.proj\..*|transformer_blocks\.\d+\.attn\.add_.*)  Stable Diffusion 3  diffusers
(.*\.)?encoder\.block\.\d+\.layer\.\d+\.(SelfAttention|DenseReluDense)\..*  a T5 text encoder  comfy
{_P}(transformer_)?blocks\.\d+\..*  a diffusion transformer of an unknown family  diffusers, comfy
(.*\.)?(scaled_fp8|scale_(weight|input)|(weight|input)_scale|comfy_quant)  stored in float8 with scales  comfy
"""


class Stranger(NamedTuple):
    """One kind of file: what names give it away, what it is, and the source of the names."""

    names: re.Pattern[str]
    what: str
    source: str


def _rows() -> Iterable[Stranger]:
    for line in filter(None, _TABLE.splitlines()):
        names, what, source = re.split(" {2,}", line)
        yield Stranger(re.compile(names), what, source)


STRANGERS = tuple(_rows())


def outside(names: Iterable[str]) -> str | None:
    """Say what a file with tensors of these names is if it is outside the scope of minidiff, else None."""
    names = [name.removeprefix("unet.") for name in names]
    for row in STRANGERS:
        if found := next((name for name in names if row.names.fullmatch(name)), None):
            return f"{row.what}, which minidiff does not implement (it has {found})"
    return None
