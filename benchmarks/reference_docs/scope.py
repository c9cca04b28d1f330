"""Which blocks of the documentation are about something outside minidiff's scope, and why."""

import re

OUTSIDE = (  # pattern of the page, pattern of the code, the reason
    (r"api/modular|modular_diffusers|modular_pipelines|guiders", r"", "modular pipelines and guiders"),
    (r"quantiz|quanto|bitsandbytes|gguf|torchao|sdnq|nunchaku|autoround|modelopt", r"", "quantization"),
    (
        r"onnx|open_vino|neuron|habana|coreml|tgate|para_attn|pruna|cache_dit|optimization/cache|tensorrt",
        r"",
        "runtimes",
    ),
    (r"research_projects|community|model_search|kandinsky|deprecated|transformers/", r"", "other models and projects"),
    (
        r"",
        r"[Cc]ontrol_?[Nn]et|control_image|T2IAdapter|ip_adapter|IPAdapter|IP-Adapter",
        "ControlNet, T2I-Adapter, image prompts",
    ),
    (r"", r"Flux|FLUX|SD3|StableDiffusion3|stable-diffusion-3|Sana|PixArt|Kolors", "other families"),
    (r"", r"Qwen|Z-?Image|Hunyuan|Lumina|Chroma", "other families"),
    (r"", r"Wan|LTX|CogV|CogView|AnimateDiff|Cosmos|Mochi|Allegro|Latte|[Vv]ideo|export_to_gif|SkyReels", "video"),
    (r"", r"Kandinsky|DeepFloyd|UnCLIP|unclip|Cascade|ShapE|shap-e|Audio|Marigold|Amused", "other families"),
    (r"", r"StableDiffusionUpscale|LatentUpscale|Depth2Img|PAG|_pag|Gligen", "other pipelines"),
    (r"", r"AsymmetricAutoencoderKL", "other autoencoders"),
    (r"", r"push_to_hub\(|create_repo|upload_folder|snapshot_download", "writing to the Hub"),
    (r"", r"trust_remote_code|custom_pipeline|register_for_auto_class", "code from the Hub"),
    (r"", r"group_offload|ContextParallel|TensorParallel|enable_parallelism", "hooks"),
    (r"", r"\bflax\b|Flax|\bjax\b|onnxruntime|Onnx", "other frameworks"),
    (r"", r"get_peft_model|\bpeft_config|add_weighted_adapter", "models of peft, made of a network's layers"),
    (r"", r"compile_regions", "accelerate's copy of a network, which calls its layers by published names"),
    (r"adapt_a_model", r"stable-diffusion-inpainting", "an inpainting UNet in a text-to-image pipeline: refused"),
    (r"", r"ignore_mismatched_sizes=True", "refused; docs/migrating.md says what to write"),
    (
        r"loaders/",
        r"adapter_names=\"cinematic\"",
        "a slip: adapter_names for adapter_name, which the reference ignores",
    ),
    (r"", r"pipeline\(prompt, negative_prompt\)", "a slip: a text as the height, which is an error here"),
)


def outside(name: str, block: str) -> str | None:
    """Return why a block of a page does not concern minidiff, None if it does."""
    return next((why for pages, code, why in OUTSIDE if re.search(pages, name) and re.search(code, block)), None)
