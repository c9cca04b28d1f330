"""Which of the reference's tests are about something outside minidiff's scope, and why."""

import re

EXCLUDED: list[tuple[str, str, str]] = [  # (pattern of the file, pattern of Class::test, the reason)
    ("ddpm", "test_variance$", "the private _get_variance of DDPM, a part of its step"),
    ("ddpm", "test_variance_type", "variance_type='other', which means fixed_small there and is refused here"),
    ("lcm|tcd", "test_betas", "betas of 0.1 to 2, which leave no signal: refused here, infinite numbers there"),
    (
        "deis|dpm_single|unipc",
        "test_inference_steps",
        "steps from a timestep that the run does not visit: refused here, there its last step is taken instead",
    ),
    (
        "edm_dpmsolver",
        "test_add_noise_device|test_scheduler_public_api",
        "scale a sample for timestep 0, which no run visits: refused here, there its last level is taken instead",
    ),
    (
        "schedulers/test_schedulers",
        "SchedulerBaseTests::test_save_load",
        "the wording of a warning about unknown fields; ours is compared in tests/test_configured.py",
    ),
    ("others/test_utils", "test_deprecate_testing_utils_module", "a module for the reference's own tests"),
    ("others/test_utils", "test_mps_suppresses_cpu_generator_info_log", "the wording of a hint in the log"),
    ("models/", "IPAdapter::", "image prompts (IP-Adapter) are not implemented"),
    ("models/", "test_custom_diffusion_save_load", "Custom Diffusion's own format of files"),
    ("models/", "test_from_save_pretrained_variant", "the wording of an error, which asks for a pickle"),
    ("models/", "test_logs_info_when_no_lora_keys_found", "a file that adapts nothing: an error here, a warning there"),
    ("models/", "LoRA::", "make their adapters with add_adapter: matrices for training with peft are not made"),
    (
        "models/unets/",
        "test_asymmetrical_unet",
        "names more transformers than the level has residual blocks: refused here, the rest is ignored there",
    ),
    (
        "models/test_models_auto",
        "_transformers|longformer|_model_index",
        "networks of transformers that are no CLIP, or pickles",
    ),
    (
        "models/test_models_auto",
        "dynamic_module|register_for_auto_class|auto_map_in_saved",
        "code from repositories is not run",
    ),
    ("models/test_models_auto", "dict_diffusers_class|string_path", "counts calls of private functions"),
    ("unet_2d.py", "TestNCSNpp", "NCSN++: skip blocks with FIR filters, and networks without group norm"),
    ("pipelines/", "IPAdapter::|ip_adapter", "image prompts (IP-Adapter) are not implemented"),
    (
        "pipelines/(stable_diffusion_xl|latent_consistency)",
        "test_pipeline_signature",
        "asks for the arguments of IP-Adapter in the signature",
    ),
    (
        "pipelines/",
        "test_encode_prompt_works_in_isolation",
        "reads the names of variables in the source of encode_prompt",
    ),
    ("pipelines/", "test_freeu", "looks for FreeU's factors in the inner blocks; the pictures are compared in tests"),
    ("pipelines/", "incorrect_variants_raises", "the wording of an error, which asks for a pickle"),
    ("pipelines/", "test_save_load_local", "the wording of the log while components load; pictures agree in tests"),
    (
        "pipelines/stable_diffusion",
        "long_prompt",
        "a warning in the log names what is cut off; here the result's field dropped does",
    ),
    ("pipelines/ddim", "StableDiffusionMixin_component", "StableDiffusionMixin is a base of all pipelines here"),
    ("pipelines/ddim", "attention_slicing", "slices of two heads where there is one: refused here, ignored there"),
    ("pipelines/test_pipelines.py", "same_device_id_offload", "asks for a GPU number 5 and a private attribute"),
    ("pipelines/test_pipelines.py", "dtype_is_deprecated|torch_dtype_and_dtype", "the wording of warnings and errors"),
    ("pipelines/test_pipelines.py", "CustomPipelineTests", "code from repositories is not run"),
    (
        "pipelines/test_pipelines.py",
        "optional_components",
        "asks config for the class of a feature_extractor that cannot be saved: here config says what is saved",
    ),
    ("pipelines/test_pipelines.py", "no_internet", "skips itself where the Hub cannot be reached"),
    ("pipelines/test_pipelines_auto", "_pag|test_from_pretrained_inpaint", "perturbed attention guidance (enable_pag)"),
    (
        "xl_img2img|xl_inpaint",
        "test_components_function",
        "a refiner without requires_aesthetics_score: refused when it is made, there when it is called",
    ),
    (
        "pipelines/test_pipelines_auto",
        "consistent_sdxl",
        "requires_aesthetics_score=True with a base UNet: refused when the pipeline is made, there when it is called",
    ),
    ("pipelines/", "multi_vae", "other autoencoders (the consistency decoder)"),
    (
        "pipelines/stable_diffusion_xl",
        "RefinerOnly.*test_components_function",
        "a refiner without requires_aesthetics_score: refused when the pipeline is made, there when it is called",
    ),
    ("pipelines/test_pipeline_utils", "_video", "video pipelines"),
    ("models/", "test_gradient_checkpointing_is_applied", "the names of the reference's inner classes"),
    ("lora/", "test_logs_info_when_no_lora_keys_found", "a file without a LoRA, which is an error here"),
    (
        "lora/",
        "test_(?!simple_inference$|group_offloading)",
        "makes adapters by add_adapter(LoraConfig) and looks for peft's layers; see our tests/adapters/test_lora.py",
    ),
]


def reason(file: str, name: str) -> str | None:
    """Return why a test does not concern minidiff, None if it does."""
    return next((why for files, names, why in EXCLUDED if re.search(files, file) and re.search(names, name)), None)
