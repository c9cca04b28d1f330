"""The Hub configuration of ``CLIPTextModel`` -> ``CLIPSpec``, and what it shares with that of the picture half."""

from collections.abc import Mapping
from typing import Any

from minidiff.config import Config
from minidiff.errors import ConfigError
from minidiff.networks.specs import CLIPSpec
from minidiff.networks.specs.fields import check_counts, check_known, check_types, complete

NAME = "CLIPTextModel"
ACTIVATIONS = ("quick_gelu", "gelu")
LEGACY_EOS = 2  # published configs say eos_token_id 2, which never was the id of the end-of-text token (49407)

# Fields that transformers writes into config.json and that do not describe this network: provenance, initialisation,
# and the settings of text generation that transformers 4 wrote for every model, this one included.
# `torch_dtype` is provenance too: a load is float32 unless asked otherwise.
_ANNOTATIONS = frozenset(
    """
    architectures model_type torch_dtype dtype transformers_version initializer_factor initializer_range
    finetuning_task id2label label2id problem_type task_specific_params tokenizer_class prefix sep_token_id
    is_encoder_decoder cross_attention_hidden_size decoder_start_token_id tie_encoder_decoder tie_word_embeddings
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p use_cache
    """.split()
)

# Settings that transformers 4 wrote for every model, with the values that ask for nothing.
_UNUSED: dict[str, Any] = {"dropout": 0.0, "chunk_size_feed_forward": 0, "pruned_heads": {}, "return_dict": True}
_UNUSED |= dict.fromkeys(
    "add_cross_attention is_decoder output_attentions output_hidden_states torchscript use_bfloat16".split(), False
)
_UNUSED["tf_legacy_loss"] = False

_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}


def text_half(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields of the text encoder; the file of a whole CLIP keeps them under ``text_config``."""
    return fields.get("text_config", fields)


def clip_config(fields: Mapping[str, Any]) -> Config:
    """Complete the fields of a text encoder's Hub configuration; refuse what is not implemented."""
    notes = {"bos_token_id": 49406, "pad_token_id": 1, "projection_dim": 512}  # not of the transformer itself
    return transformer_config(NAME, text_half(fields), _DEFAULTS, notes)


def transformer_config(
    network: str, fields: Mapping[str, Any], defaults: Mapping[str, Any], notes: Mapping[str, Any]
) -> Config:
    """Complete the fields of either half of CLIP.

    Args:
        network: class name for the messages.
        fields: those of its Hub configuration.
        defaults: every field that describes the network, with the reference's default.
        notes: further fields that may have any value, with their defaults.

    Raises:
        ConfigError: naming every field that is unknown or has a value that is not implemented.
    """
    notes = {**notes, **{name: fields[name] for name in (*notes, *_ANNOTATIONS) if name in fields}}
    described = {name: value for name, value in fields.items() if name not in notes}
    only = {"attention_dropout": (0.0,), **{name: (value,) for name, value in _UNUSED.items() if name in fields}}
    config = complete(network, described, defaults, only)
    check_types(network, config, defaults)
    counts = [name for name, default in defaults.items() if type(default) is int and name != "eos_token_id"]
    check_counts(network, config, counts)
    check_known(network, "hidden_act", config.hidden_act, ACTIVATIONS)
    if config.hidden_size % config.num_attention_heads:
        raise ConfigError(
            f"{network}: hidden_size {config.hidden_size} should be divisible by num_attention_heads "
            f"{config.num_attention_heads}"
        )
    return Config({**config, **notes})


def clip_spec(config: Config) -> CLIPSpec:
    """Turn the Hub's fields into the record that the network and its name table are built from."""
    sizes = {"vocabulary": config.vocab_size, "positions": config.max_position_embeddings}
    return CLIPSpec(**transformer_spec(config), **sizes)


def transformer_spec(config: Config) -> dict[str, Any]:
    """Return what the records of both halves have."""
    return {
        "D": config.hidden_size,
        "mlp": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "activation": config.hidden_act,
        "eps": config.layer_norm_eps,
    }
