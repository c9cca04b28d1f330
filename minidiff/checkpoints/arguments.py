"""Arguments of the reference's loaders and savers that choose how it works, and what to do instead of each."""

from collections.abc import Mapping
from typing import Any

import torch

_NO_YAML = "give config= a folder or Hub id in diffusers layout: the YAML files of CompVis are not read"
# name -> (the values that ask for nothing that minidiff would have to do, what to do instead of others)
HARMLESS: dict[str, tuple[tuple[Any, ...], str]] = {
    "low_cpu_mem_usage": ((True, False, None), "leave it out: memory use is always low"),
    "offload_state_dict": ((True, False, None), "leave it out: files are mapped, not read"),
    "resume_download": ((True, False, None), "leave it out: downloads are always resumed"),
    "weights_only": ((True, False, None), "leave it out: nothing but weights is read"),
    "device_map": ((None,), "load on the CPU, then call .to(device)"),
    "max_memory": ((None,), "a network lies on one device; pipelines have enable_model_cpu_offload()"),
    "offload_folder": ((None,), "a network lies on one device; pipelines have enable_model_cpu_offload()"),
    "ignore_mismatched_sizes": (
        (False, None),
        "a network has the shapes of its configuration: give the fields of the file, then exchange the layers",
    ),
    "output_loading_info": ((False, None), "networks have it; a tensor that is missing or unexpected is an error"),
    "trust_remote_code": ((False, None), "no code from repositories is run; import the class in your program"),
    "custom_revision": ((None,), "no code from repositories is run; import the class in your program"),
    "custom_pipeline": ((None,), "no code from repositories is run; write a class with a __call__ of its own"),
    "use_onnx": ((None, False), "there are no ONNX pipelines; optimize() is faster on the CPU"),
    "sess_options": ((None,), "there are no ONNX pipelines"),
    "provider_options": ((None,), "there are no ONNX pipelines"),
    "load_connected_pipeline": ((False, None), "load each pipeline by itself"),
    "proxies": ((None, {}), "set the environment variable HTTPS_PROXY"),
    "mirror": ((None, ""), "set the environment variable HF_ENDPOINT"),
    "use_auth_token": ((None, False), "it is called token= now"),
    "push_to_hub": (
        (False, None),
        "save to a folder, then call huggingface_hub.upload_folder(repo_id=, folder_path=)",
    ),
    "quantization_config": (
        (None,),
        "GGUF files are unpacked in torch_dtype, and enable_layerwise_casting() halves bfloat16",
    ),
    "from_flax": ((False, None), "Flax weights are not read; look for a revision with safetensors"),
    "disable_mmap": ((False, None), "files are always memory-mapped where nothing is converted; leave it out"),
    "use_flashpack": ((False, None), "only safetensors are read and written"),
    "parallel_config": ((None,), "a network lies on one device"),
    "attn_implementation": ((None, "sdpa"), "attention is always torch's scaled_dot_product_attention"),
    "provider": ((None,), "it belongs to ONNX models, which minidiff does not run"),
    "original_config": ((None, False), _NO_YAML),
    "original_config_file": ((None, False), _NO_YAML),
    "load_safety_checker": (
        (None, False),
        "pass safety_checker=StableDiffusionSafetyChecker.from_pretrained(...) and feature_extractor=",
    ),
    "scheduler_type": (
        (None, False),
        "give scheduler= an object, for instance DDIMScheduler.from_config(pipe.scheduler.config)",
    ),
    "image_size": ((None, False), "give height= and width= to the call, or config= a folder or Hub id"),
    "num_in_channels": ((None, False), "it is read from the file; leave the argument out"),
}


class GGUFQuantizationConfig:
    """What programs pass as ``quantization_config`` with a GGUF file, whose blocks are unpacked when it is loaded.

    Args:
        compute_dtype: has to be the ``torch_dtype`` of the call; default: float32.
    """

    def __init__(self, compute_dtype: torch.dtype | None = None) -> None:
        self.compute_dtype = torch.float32 if compute_dtype is None else compute_dtype


def take_gguf(arguments: dict[str, Any], dtype: torch.dtype, of_gguf: bool) -> dict[str, Any]:
    """Return ``arguments`` without a ``GGUFQuantizationConfig``; raise ``TypeError`` if it asks for another dtype."""
    config = arguments.get("quantization_config")
    if not isinstance(config, GGUFQuantizationConfig):
        return arguments
    if not of_gguf:
        raise TypeError("quantization_config=GGUFQuantizationConfig(...) is for .gguf files; leave it out")
    if config.compute_dtype != dtype:
        raise TypeError(
            f"compute_dtype={config.compute_dtype} and torch_dtype={dtype} differ: a GGUF file is unpacked into one "
            f"dtype, which computes too; pass torch_dtype={config.compute_dtype}"
        )
    return {name: value for name, value in arguments.items() if name != "quantization_config"}


_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")  # over several devices, if there are


def refuse_unless_harmless(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``arguments`` without the reference's loading options; raise ``TypeError`` if one asks for something."""
    for name, (values, instead) in HARMLESS.items():
        if name in arguments and arguments[name] not in values:
            raise TypeError(f"{name}={arguments[name]!r} is not implemented; {instead}")
    return {name: value for name, value in arguments.items() if name not in HARMLESS}


def device_of(device_map: Any) -> torch.device | None:
    """Return the one device that a ``device_map`` means: a device, ``{"": device}``, or "auto" where there is but one.

    Raises:
        TypeError: if it spreads a network over several devices or the disk.
        ValueError: if it names no device.
    """
    if device_map is None:
        return None
    if isinstance(device_map, Mapping):
        devices = {str(device): device for device in device_map.values()}
        if len(devices) != 1 or "disk" in devices:
            raise TypeError(
                f"device_map={device_map!r} is not implemented; a network lies on one device, such as 'cuda'"
            )
        (device_map,) = devices.values()
    if device_map in _SPREAD:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if accelerator is None:
            return torch.device("cpu")
        if (count := torch.accelerator.device_count()) > 1:
            raise TypeError(
                f"device_map={device_map!r} is not implemented where there are {count} devices; a network lies on one "
                f"of them: device_map='{accelerator.type}:0'"
            )
        return accelerator
    if isinstance(device_map, int) and not isinstance(device_map, bool) and device_map >= 0:
        device_map = f"cuda:{device_map}"
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        expected = "a device such as 'cuda', 'cuda:1' or 'cpu', 'auto', or {'': device}"
        raise ValueError(f"device_map={device_map!r} is not {expected}") from error
