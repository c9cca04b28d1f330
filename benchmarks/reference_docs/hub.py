"""A Hub cache that holds, under the ids that the documentation names, small checkpoints with random weights."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.reference_tests.fake_hub import place

IDS = {
    "sd": (
        "stable-diffusion-v1-5/stable-diffusion-v1-5 CompVis/stable-diffusion-v1-4 Lykon/dreamshaper-7 "
        "SimianLuo/LCM_Dreamshaper_v7 emilianJR/CyberRealistic_V3 nitrosocke/elden-ring-diffusion "
        "ogkalu/Comic-Diffusion kohbanye/pixel-art-style sd-dreambooth-library/herge-style prompthero/openjourney "
        "path_to_saved_model path-to-save-model path/to/saved_model your-username/your-model"
    ),
    "v": "stabilityai/stable-diffusion-2-1 ptx0/pseudo-journey-v2 stabilityai/stable-diffusion-2",
    "2": "stabilityai/stable-diffusion-2-base stabilityai/stable-diffusion-2-1-base",
    "inpaint": "stable-diffusion-v1-5/stable-diffusion-inpainting stabilityai/stable-diffusion-2-inpainting "
    "runwayml/stable-diffusion-inpainting",
    "pix2pix": "timbrooks/instruct-pix2pix your_cool_model",
    "xl": (
        "stabilityai/stable-diffusion-xl-base-1.0 stabilityai/sdxl-turbo segmind/SSD-1B SG161222/RealVisXL_V4.0 "
        "RunDiffusion/Juggernaut-XL-v9 Lykon/dreamshaper-xl-1-0 username/fused-ikea-feng"
    ),
    "refiner": "stabilityai/stable-diffusion-xl-refiner-1.0",
    "xl inpaint": "diffusers/stable-diffusion-xl-1.0-inpainting-0.1 OzzyGT/RealVisXL_V4.0_inpainting",
    "xl pix2pix": "diffusers/sdxl-instructpix2pix-768",
    "ddpm": (
        "google/ddpm-cifar10-32 google/ddpm-cat-256 anton-l/ddpm-butterflies-128 google/ddpm-celebahq-256 "
        "google/ddpm-church-256 google/ddpm-ema-church-256"
    ),
    "vae": "stabilityai/sd-vae-ft-mse madebyollin/sdxl-vae-fp16-fix",
    "tiny vae": "madebyollin/taesd madebyollin/taesdxl",
    "xl unet": "latent-consistency/lcm-sdxl username/sdxl-unet-sharded mhdang/dpo-sdxl-text2image-v1",
}
LORAS = {  # repository -> family, file, spelling
    "latent-consistency/lcm-lora-sdv1-5": ("sd", "pytorch_lora_weights.safetensors", "kohya"),
    "latent-consistency/lcm-lora-sdxl": ("xl", "pytorch_lora_weights.safetensors", "kohya"),
    "TheLastBen/Papercut_SDXL": ("xl", "papercut.safetensors", "kohya"),
    "ostris/super-cereal-sdxl-lora": ("xl", "cereal_box_sdxl_v1.safetensors", "kohya"),
    "ostris/ikea-instructions-lora-sdxl": ("xl", "ikea_instructions_xl_v1_5.safetensors", "kohya"),
    "lordjia/by-feng-zikai": ("xl", "fengzikai_v1.0_XL.safetensors", "kohya"),
    "jbilcke-hf/sdxl-cinematic-1": ("xl", "pytorch_lora_weights.safetensors", "peft"),
    "nerijs/pixel-art-xl": ("xl", "pixel-art-xl.safetensors", "kohya"),
    "CiroN2022/toy-face": ("xl", "toy_face_sdxl.safetensors", "kohya"),
    "hf-internal-testing/sdxl-1.0-lora": ("xl", "pytorch_lora_weights.safetensors", "peft"),
    "path/to/lora/model": ("sd", "pytorch_lora_weights.safetensors", "peft"),
}
WORDS = {  # repository -> file, token
    "sd-concepts-library/gta5-artwork": ("learned_embeds.safetensors", "<gta5-artwork>"),
    "sd-concepts-library/cat-toy": ("learned_embeds.safetensors", "<cat-toy>"),
    "EvilEngine/easynegative": ("easynegative.safetensors", "easynegative"),
}


def make(cache: Path) -> None:
    """Fill ``cache``, the folder that HF_HUB_CACHE names. Every weight is there in float32 and as the variant fp16."""
    from tests import tiny, tiny_ddpm, tiny_xl  # bring the Hub's client, which reads the environment once

    made = cache / "made"
    v = {"prediction_type": "v_prediction"}
    folders = {
        "sd": tiny.save_tiny(made / "sd"),
        "2": tiny.save_tiny(made / "2", unet={"use_linear_projection": True}),
        "v": tiny.save_tiny(made / "v", unet={"use_linear_projection": True}, scheduler=v),
        "inpaint": tiny.save_tiny(made / "inpaint", unet={"in_channels": 9}),
        "pix2pix": tiny.save_tiny(made / "pix2pix", unet={"in_channels": 8}),
        "xl": tiny_xl.save_base(made / "xl"),
        "refiner": tiny_xl.save_refiner(made / "refiner"),
        "xl inpaint": tiny_xl.save_base(made / "xl_inpaint", unet={"in_channels": 9}),
        "xl pix2pix": tiny_xl.save_base(made / "xl_pix2pix", unet={"in_channels": 8}),
        "ddpm": tiny_ddpm.save_tiny(made / "ddpm"),
    }
    folders |= {"vae": folders["xl"] / "vae", "xl unet": folders["xl"] / "unet"}
    folders["tiny vae"] = _save_tiny_vae(made / "tiny_vae")
    _name_classes(folders)
    for family, ids in IDS.items():
        for repo in ids.split():
            place(cache, repo, folders[family])
    place(cache, "hf-internal-testing/tiny-random-clip", folders["sd"] / "tokenizer")
    for repo, (family, file, spelling) in LORAS.items():
        _write_lora(made / repo, folders[family], file, spelling)
        place(cache, repo, made / repo)
    for repo, (file, token) in WORDS.items():
        (made / repo).mkdir(parents=True)
        save_file({token if file.startswith("learned") else "emb_params": torch.randn(1, 24)}, made / repo / file)
        place(cache, repo, made / repo)


def _save_tiny_vae(folder: Path) -> Path:
    import diffusers

    levels = {f"{half}_block_out_channels": [8] * 3 for half in ("encoder", "decoder")}
    diffusers.AutoencoderTiny(**levels, num_encoder_blocks=[1] * 3, num_decoder_blocks=[1] * 3).save_pretrained(folder)
    return folder


def _name_classes(folders: dict[str, Path]) -> None:
    """Let model_index.json name the class that the published repository names, and write the variants."""
    import diffusers

    names = {"inpaint": "StableDiffusionInpaintPipeline", "pix2pix": "StableDiffusionInstructPix2PixPipeline"}
    names |= {f"xl {task}": name.replace("Diffusion", "DiffusionXL") for task, name in names.items()}
    for family, folder in folders.items():
        if family in names:
            index = folder / "model_index.json"
            found = index.read_text().partition('"_class_name": "')[2].partition('"')[0]
            index.write_text(index.read_text().replace(f'"{found}"', f'"{names[family]}"'))
        if (folder / "model_index.json").exists():
            diffusers.DiffusionPipeline.from_pretrained(folder).save_pretrained(folder, variant="fp16")


def _write_lora(folder: Path, base: Path, file: str, spelling: str) -> None:
    import diffusers
    from diffusers.utils import convert_state_dict_to_kohya
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet: Any = diffusers.UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=targets))
    state = {f"unet.{name}": tensor.contiguous() for name, tensor in get_peft_model_state_dict(unet).items()}
    folder.mkdir(parents=True)
    save_file(convert_state_dict_to_kohya(state) if spelling == "kohya" else state, folder / file)
