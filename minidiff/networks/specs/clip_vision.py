"""The Hub configurations of ``CLIPVisionModel`` and of the safety checker -> ``CLIPVisionSpec``."""

from collections.abc import Mapping
from typing import Any

from minidiff.config import Config
from minidiff.errors import ConfigError
from minidiff.networks.specs import CLIPVisionSpec
from minidiff.networks.specs.clip import transformer_config, transformer_spec
from minidiff.networks.specs.fields import check_counts, complete

NAME, CHECKER = "CLIPVisionModel", "StableDiffusionSafetyChecker"

_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # transformers 4 wrote them for every model
_WHOLE = {  # fields of a whole CLIP that say nothing about its picture half
    "architectures": None,
    "dtype": None,
    "initializer_factor": 1.0,
    "logit_scale_init_value": 2.6592,
    "model_type": "clip",
    "text_config": None,
    "text_config_dict": None,
    "torch_dtype": None,
    "transformers_version": None,
    "vision_config_dict": None,
}


def vision_half(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields of the vision encoder in those of a whole CLIP, or of the encoder alone.

    ``vision_config_dict``, of early files, counts instead of ``vision_config``: its absent fields have the defaults.
    """
    return fields.get("vision_config_dict") or fields.get("vision_config", fields)


def vision_config(fields: Mapping[str, Any]) -> Config:
    """Complete the fields of a vision encoder's Hub configuration; refuse what is not implemented."""
    notes = {"projection_dim": 512, **{name: fields[name] for name in _TOKENS if name in fields}}
    config = transformer_config(NAME, fields, _DEFAULTS, notes)
    check_counts(NAME, config, ("projection_dim",))
    if config.patch_size > config.image_size:
        raise ConfigError(
            f"{NAME}: patch_size {config.patch_size} should be at most image_size {config.image_size}, so that there "
            "is a patch"
        )
    return config


def checker_config(fields: Mapping[str, Any]) -> Config:
    """Complete the fields of a safety checker's Hub configuration, those of a whole CLIP: its own are two of them."""
    defaults = {"vision_config": {}, "projection_dim": 512, **_WHOLE}
    config = complete(CHECKER, fields, defaults, {})
    check_counts(CHECKER, config, ("projection_dim",))
    half = vision_half(config)
    if not isinstance(half, Mapping):
        raise ConfigError(f"{CHECKER}: vision_config should have the fields of a vision encoder, found {half!r}")
    return Config({**config, "vision_config": vision_config(half)})


def vision_spec(config: Config) -> CLIPVisionSpec:
    """Turn the Hub's fields into the record that the network and its name table are built from."""
    sizes = {"channels": config.num_channels, "image": config.image_size, "patch": config.patch_size}
    return CLIPVisionSpec(**transformer_spec(config), **sizes)
