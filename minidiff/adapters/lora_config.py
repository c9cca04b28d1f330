"""What PEFT says of the LoRA layers in a file: alpha, and the variants of LoRA that it asks for.

diffusers writes the fields of ``peft.LoraConfig`` as JSON under ``lora_adapter_metadata``, each with its component in
front: ``{"unet.r": 8, "unet.lora_alpha": 16, "unet.alpha_pattern": {"attn1.to_q": 4}}``. A pattern is a regular
expression for the end of a layer's name. PEFT itself writes them, for one network, into ``adapter_config.json`` beside
the file.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from minidiff.errors import CheckpointError, check_number

KEY = "lora_adapter_metadata"
CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"  # in a folder of PEFT
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")

_CLASSES = {"CLIPTextModel": "text_encoder", "CLIPTextModelWithProjection": "text_encoder_2"}  # all else is a UNet
_KINDS = ("LORA", "LOHA", "LOKR")
_USED = ("r", "alpha", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
_IGNORED = frozenset(  # they concern training, or say which layers were chosen: the file shows that by its tensors
    """
    peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode runtime_config
    target_modules exclude_modules layers_to_transform layers_pattern lora_dropout loftq_config megatron_config
    megatron_core qalora_group_size ensure_weight_tying lora_bias
    rank_dropout module_dropout rank_dropout_scale init_weights use_effective_conv2d decompose_both decompose_factor
    """.split()
)
_HARMLESS = {  # field -> values that ask for nothing; all others need None, False or an empty value
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others change the network's weights
}


def layer_configs(metadata: Mapping[str, str], components: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the fields that the header has for each component, without the component in front.

    Raises:
        CheckpointError: if the header is no JSON object, or a field asks for what is not implemented.
    """
    key = CONFIG_NAME if CONFIG_NAME in metadata else KEY
    if key not in metadata:
        return {}
    try:
        fields = json.loads(metadata[key])
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{key} in the file's header is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{key} in the file's header should be an object, found {type(fields).__name__}")
    configs: dict[str, dict[str, Any]] = {}
    for name, value in fields.items():
        component, _, field = name.partition(".")
        if component not in components:
            raise CheckpointError(f"{key} has {name!r}, but this pipeline has only {', '.join(components)}")
        configs.setdefault(component, {})[field] = value
        if field.endswith("_pattern"):
            _check_patterns(f"{key}: {name}", value)
        harmless = value in _HARMLESS[field] if field in _HARMLESS else not value
        if field not in _USED and field not in _IGNORED and not harmless:
            raise CheckpointError(f"{key} asks for {name} = {value!r}, which minidiff does not implement")
    return configs


def _check_patterns(name: str, value: Any) -> None:
    """Raise ``CheckpointError`` unless these are numbers by regular expressions."""
    if not isinstance(value, Mapping | None):
        raise CheckpointError(f"{name} should be an object, a number for each pattern, found {value!r}")
    for pattern in value or ():
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(f"{name}: {pattern!r} is no regular expression: {error}") from error


def scale_of(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return what the change of a layer is multiplied with: alpha / r, or alpha / sqrt(r).

    The second is rank-stabilised LoRA, Kalajdzievski 2023 (https://arxiv.org/abs/2312.03732). A LoKr whose tensors have
    no rank (0) has that of the header, 1 without one.

    Raises:
        CheckpointError: if the header speaks of another rank than the tensors have.
        TypeError, ValueError: if its alpha is no finite number.
    """
    r = _of_layer(config, "rank_pattern", layer, config.get("r", rank))
    if rank and r != rank:
        raise CheckpointError(f"{layer} has rank {rank}, but the file's header says r = {r!r}")
    rank = rank or r or 1
    alpha = _of_layer(config, "alpha_pattern", layer, config.get("lora_alpha", config.get("alpha", rank)))
    check_number(f"{layer}: lora_alpha in the file's header", alpha)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_layer(config: Mapping[str, Any], field: str, layer: str, default: Any) -> Any:
    for pattern, value in (config.get(field) or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            return value
    return default


def component_of(config: Mapping[str, Any]) -> str:
    """Return the component that an ``adapter_config.json`` is for, by the class of the network that PEFT has noted.

    Raises:
        CheckpointError: if it is of another kind of adapter than LoRA, LoHa and LoKr.
    """
    if (kind := config.get("peft_type", "LORA")) not in _KINDS:
        known = ", ".join(_KINDS)
        raise CheckpointError(f"{CONFIG_NAME} has peft_type = {kind!r}: of PEFT's adapters minidiff reads only {known}")
    mapping = config.get("auto_mapping")
    return _CLASSES.get(mapping.get("base_model_class", ""), "unet") if isinstance(mapping, Mapping) else "unet"
