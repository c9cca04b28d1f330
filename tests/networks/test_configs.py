"""Configurations and inputs of the networks: the published ones work, what is not implemented is refused by name."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minidiff.checkpoints.model import Model
from minidiff.config import Config
from minidiff.errors import ConfigError
from minidiff.networks.clip import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from minidiff.networks.specs.unet import unet_config
from minidiff.networks.specs.vae import vae_config
from minidiff.networks.unet import UNet2DConditionModel
from minidiff.networks.vae import AutoencoderKL
from tests.theirs import diffusers, transformers

CONFIGS = Path(__file__).parents[1] / "data" / "hub_configs"
SD = [
    "CompVis--stable-diffusion-v1-4",
    "runwayml--stable-diffusion-v1-5",
    "runwayml--stable-diffusion-inpainting",
    "stabilityai--stable-diffusion-2",
    "stabilityai--stable-diffusion-2-1",
    "stabilityai--stable-diffusion-2-1-base",
    "stabilityai--stable-diffusion-2-inpainting",
]
XL_BASE, XL_REFINER = (f"stabilityai--stable-diffusion-xl-{name}-1.0" for name in ("base", "refiner"))
XL = [XL_BASE, XL_REFINER, "stabilityai--sdxl-turbo", "diffusers--stable-diffusion-xl-1.0-inpainting-0.1"]
UNETS = [f"{name}/unet/config.json" for name in (*SD, *XL)]
VAES = [
    *(f"{name}/vae/config.json" for name in SD),
    *(f"{name}/vae/config.json" for name in (XL_BASE, XL_REFINER)),
    "stabilityai--sd-vae-ft-mse/config.json",
]
TEXT_ENCODERS = [
    *(f"{name}/text_encoder/config.json" for name in (*SD, XL_BASE)),
    *(f"{name}/text_encoder_2/config.json" for name in (XL_BASE, XL_REFINER)),
    "openai--clip-vit-large-patch14/text_config.json",
]


def read(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / name).read_text())


def plain(config: Any) -> dict[str, Any]:
    """Return the public fields; a tuple of class defaults and a list from JSON are the same value."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dict(config).items()
        if not name.startswith("_")
    }


def build(cls: type[Model], fields: dict[str, Any]) -> Model:
    with torch.device("meta"):
        return cls.from_config(fields)


# --- What is published -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*UNETS, *VAES])
def test_config_answers_what_the_reference_answers(name: str) -> None:
    fields = read(name)
    cls = UNet2DConditionModel if name in UNETS else AutoencoderKL
    ours = build(cls, fields)
    with torch.device("meta"):
        theirs = getattr(diffusers, cls.__name__).from_config(fields)
    assert plain(ours.config) == plain(theirs.config)  # also the fields that the file leaves out
    for field, value in plain(theirs.config).items():
        answer = getattr(ours.config, field)
        assert answer == value and type(answer) is type(value), field


@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_text_config_answers_what_the_reference_answers(name: str) -> None:
    fields = read(name)
    ours, theirs = build(CLIPTextModel, fields).config, transformers.CLIPTextConfig(**fields)
    for field in inspect.signature(transformers.CLIPTextConfig).parameters:
        if field in fields or hasattr(ours, field):
            assert getattr(ours, field) == getattr(theirs, field), field
    assert fields.items() <= dict(ours).items()


def test_class_defaults_are_the_reference_s() -> None:
    for ours, theirs in (
        (UNet2DConditionModel, diffusers.UNet2DConditionModel),
        (AutoencoderKL, diffusers.AutoencoderKL),
    ):
        with torch.device("meta"):
            assert plain(ours().config) == plain(theirs().config)
    theirs = transformers.CLIPTextConfig()
    for field, value in CLIPTextConfig().items():
        assert value == getattr(theirs, field), field
    unknown = set(theirs.to_diff_dict()) - set(CLIPTextConfig())
    assert unknown == {"model_type", "transformers_version", "initializer_factor", "initializer_range"}


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    transformers.CLIPTextConfig(num_hidden_layers=2, eos_token_id=2).save_pretrained(tmp_path)
    config = CLIPTextConfig(**json.loads((tmp_path / "config.json").read_text()))
    assert config.num_hidden_layers == 2 and config.eos_token_id == 2


def test_saved_text_config_is_what_transformers_saves(tmp_path: Path) -> None:
    fields = read("runwayml--stable-diffusion-v1-5/text_encoder/config.json")
    build(CLIPTextModel, fields).to(torch.float16).save_config(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["torch_dtype"] == "float16" and saved["architectures"] == ["CLIPTextModel"]
    theirs = transformers.CLIPTextConfig.from_pretrained(tmp_path)
    assert theirs.dtype == torch.float16
    provenance = {"dtype": None, "_name_or_path": None}
    assert theirs.to_dict() | provenance == transformers.CLIPTextConfig(**fields).to_dict() | provenance
    assert dict(build(CLIPTextModel, saved).config) == saved


def test_text_half_of_a_whole_clip(tmp_path: Path) -> None:
    text = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    transformers.CLIPConfig(text_config=text).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    model = build(CLIPTextModel, fields)
    assert len(model.layers) == 2 and model.config.hidden_size == 64
    with torch.device("meta"):
        assert len(CLIPTextModel.from_config(fields, num_hidden_layers=1).layers) == 1


# What transformers 4 wrote into the text half of openai/clip-vit-large-patch14 besides the fields of the network.
GENERATION_SETTINGS = {
    "_name_or_path": "",
    "add_cross_attention": False,
    "architectures": None,
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "id2label": {"0": "LABEL_0"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "length_penalty": 1.0,
    "max_length": 20,
    "num_beams": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "problem_type": None,
    "projection_dim": 768,
    "pruned_heads": {},
    "repetition_penalty": 1.0,
    "return_dict": True,
    "temperature": 1.0,
    "tie_word_embeddings": True,
    "top_k": 50,
    "torch_dtype": None,
    "torchscript": False,
    "typical_p": 1.0,
    "use_bfloat16": False,
}


def test_generation_settings_of_transformers_4_are_accepted() -> None:
    config = CLIPTextConfig(**GENERATION_SETTINGS)
    assert config.projection_dim == 768
    for field, value in (("output_hidden_states", True), ("pruned_heads", {"0": [1]}), ("is_decoder", True)):
        with pytest.raises(ConfigError, match=field):
            CLIPTextConfig(**GENERATION_SETTINGS | {field: value})


def test_annotations_are_kept() -> None:
    config = vae_config({"_name_or_path": "somewhere", "_diffusers_version": "0.8.0", "decay": 0.9999})
    assert config._name_or_path == "somewhere" and config.decay == 0.9999


def test_configuration_is_frozen() -> None:
    config = vae_config({})
    assert isinstance(config, Config) and config["sample_size"] == config.sample_size == 32
    with pytest.raises(AttributeError, match="frozen"):
        config.sample_size = 64
    with pytest.raises(AttributeError, match="no field 'sample_sise'"):
        _ = config.sample_sise


# --- What is not implemented -----------------------------------------------------------------------------------------

# Every field that the reference's constructor has and that minidiff accepts with its harmless value alone.
NOT_IMPLEMENTED: dict[type[Model], dict[str, Any]] = {
    UNet2DConditionModel: {
        "mid_block_scale_factor": 2,
        "act_fn": "gelu",
        "encoder_hid_dim": 64,
        "encoder_hid_dim_type": "text_proj",
        "num_attention_heads": 8,
        "dual_cross_attention": True,
        "class_embed_type": "sometimes",
        "addition_embed_type": "text",
        "resnet_time_scale_shift": "scale_shift",
        "resnet_skip_time_act": True,
        "resnet_out_scale_factor": 2.0,
        "time_embedding_type": "fourier",
        "time_embedding_dim": 64,
        "time_embedding_act_fn": "silu",
        "timestep_post_act": "silu",
        "attention_type": "gated",
        "mid_block_only_cross_attention": "sometimes",
        "cross_attention_norm": "layer_norm",
        "addition_embed_type_num_heads": 32,
        "upcast_attention": "sometimes",
    },
    AutoencoderKL: {"act_fn": "gelu", "shift_factor": 0.1},
    CLIPTextModel: {"attention_dropout": 0.1, "dropout": 0.1},
}


def test_what_asks_for_nothing_is_accepted() -> None:
    assert unet_config({"dropout": 0.1}).dropout == 0.1
    for value in (-0.1, 1.5):
        with pytest.raises(ConfigError, match=rf"dropout should be from 0 to 1, found {value}"):
            unet_config({"dropout": value})


@pytest.mark.parametrize(
    ("cls", "field", "value"),
    [
        pytest.param(cls, field, value, id=f"{cls.__name__}-{field}")
        for cls, fields in NOT_IMPLEMENTED.items()
        for field, value in fields.items()
    ],
)
def test_value_that_is_not_implemented(cls: type[Model], field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        build(cls, {field: value})
    message = str(error.value)
    assert cls.__name__ in message and f"{field} = {json.dumps(value)}" in message and "implemented: " in message


# Fields that are honoured, each with a parity case or, where they concern the pipeline only, a test of their value.
HONOURED = {
    UNet2DConditionModel: """
        sample_size in_channels out_channels center_input_sample flip_sin_to_cos freq_shift down_block_types
        up_block_types block_out_channels layers_per_block downsample_padding norm_num_groups norm_eps
        cross_attention_dim transformer_layers_per_block attention_head_dim use_linear_projection
        addition_time_embed_dim projection_class_embeddings_input_dim time_cond_proj_dim dropout
        mid_block_type reverse_transformer_layers_per_block only_cross_attention num_class_embeds
        class_embeddings_concat conv_in_kernel conv_out_kernel
    """.split(),
    AutoencoderKL: """
        in_channels out_channels down_block_types up_block_types block_out_channels layers_per_block latent_channels
        norm_num_groups sample_size scaling_factor force_upcast use_quant_conv use_post_quant_conv
        mid_block_add_attention latents_mean latents_std
    """.split(),
}


@pytest.mark.parametrize("cls", HONOURED, ids=lambda cls: cls.__name__)
def test_every_field_of_the_reference_is_honoured_or_refused(cls: type[Model]) -> None:
    signature = inspect.signature(getattr(diffusers, cls.__name__).__init__)
    fields = set(signature.parameters) - {"self"}
    assert fields == set(HONOURED[cls]) | set(NOT_IMPLEMENTED[cls])


@pytest.mark.parametrize("cls", NOT_IMPLEMENTED, ids=lambda cls: cls.__name__)
def test_unknown_field(cls: type[Model]) -> None:
    with pytest.raises(ConfigError, match=r'sample_sise = 64 \(unknown field\).*colour = "red" \(unknown field\)'):
        build(cls, {"sample_sise": 64, "colour": "red"})


FOUR = ["DownBlock2D"] * 4
WRONG_UNETS = [
    (
        {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
        "mid_block_type should be one of null, UNetMid.*Simple",
    ),
    ({"mid_block_type": 3}, "mid_block_type should be one of .*found 3"),
    ({"mid_block_type": ["UNetMidBlock2D"]}, r"mid_block_type should be one of .*found \["),
    ({"transformer_layers_per_block": [1, [1, 1], 1, 1]}, "give reverse_transformer_layers_per_block too"),
    ({"transformer_layers_per_block": [1, 1, 1]}, "transformer_layers_per_block has 3 entries for 4 levels"),
    (
        {"transformer_layers_per_block": [1, [1], 1, 1], "reverse_transformer_layers_per_block": [1] * 4},
        r"transformer_layers_per_block should hold 2 integers of at least 0 for a level, found \[1\]",
    ),
    ({"reverse_transformer_layers_per_block": [1, [1, 1], 1, 1]}, "reverse_transf.* should hold 3 integers .*found"),
    ({"reverse_transformer_layers_per_block": [1, -1, 1, 1]}, r"should hold 3 integers of at least 0 .*\[-1, -1, -1\]"),
    ({"reverse_transformer_layers_per_block": 2}, "reverse_transformer_layers_per_block should be a list, .*found 2"),
    ({"reverse_transformer_layers_per_block": [1, 1, 0, 1]}, "transformer_layers_per_block is 0 where a block has"),
    ({"down_block_types": ["DownBlock2D"]}, "down_block_types should be 4 of"),
    ({"up_block_types": ["UpBlock2D"] * 5}, "up_block_types should be 4 of"),
    ({"down_block_types": [*FOUR[:3], "AttnDownBlock2D"]}, "down_block_types.*AttnDownBlock2D"),
    ({"up_block_types": FOUR}, "up_block_types.*DownBlock2D"),
    ({"attention_head_dim": [5, 10, 20]}, "attention_head_dim has 3 entries, but block_out_channels has 4"),
    ({"layers_per_block": [2]}, "layers_per_block has 1 entries"),
    ({"transformer_layers_per_block": [1, 1]}, "transformer_layers_per_block has 2 entries"),
    ({"cross_attention_dim": [768] * 5}, "cross_attention_dim has 5 entries"),
    ({"transformer_layers_per_block": [1.0, 1, 1, 1]}, "transformer_layers_per_block should hold 2 integers"),
    ({"transformer_layers_per_block": 0}, "transformer_layers_per_block is 0 where a block has cross-attention"),
    ({"transformer_layers_per_block": [1, 0, 1, 1]}, "transformer_layers_per_block is 0 where"),
    ({"transformer_layers_per_block": [1, 1, 1, 0]}, "transformer_layers_per_block is 0 where"),
    ({"layers_per_block": 0}, "layers_per_block should hold integers of at least 1, found 0"),
    ({"attention_head_dim": None}, "attention_head_dim = null"),
    ({"attention_head_dim": [8, 8, None, 8]}, "attention_head_dim should hold integers"),
    ({"attention_head_dim": 7}, "320 channels should be divisible by the number of heads 7"),
    ({"cross_attention_dim": [768, 768, 1024, 768]}, "cross_attention_dim should be the same.*1024 and 768"),
    ({"cross_attention_dim": None}, "cross_attention_dim = null"),
    ({"norm_num_groups": 33}, "divisible by norm_num_groups 33"),
    ({"norm_num_groups": None}, r"norm_num_groups = null \(expected an integer\)"),
    ({"norm_num_groups": 0}, "divisible by norm_num_groups 0"),
    ({"downsample_padding": 2}, "downsample_padding should be 0 or 1, found 2"),
    (
        {"addition_embed_type": "text_time"},
        "embed_dim = None belongs to .* which needs it; found 'text_time'",
    ),
    (
        {"addition_embed_type": "text_time", "addition_time_embed_dim": 256},
        "projection_class_embeddings_input_dim = None belongs to .* which need it; found 'text_time'",
    ),
    (
        {"addition_embed_type": "text_time", "addition_time_embed_dim": 0},
        "addition_time_embed_dim should be a positive integer or null, found 0",
    ),
    ({"projection_class_embeddings_input_dim": 2816}, "projection_class_embeddings_input_dim = 2816 belongs to"),
    ({"addition_time_embed_dim": 256}, "addition_time_embed_dim = 256 belongs to addition_embed_type 'text_time'"),
    ({"class_embed_type": "projection"}, "input_dim = None belongs to .* which need it; found None and 'projection'"),
    ({"num_class_embeds": 0}, "num_class_embeds should be a positive integer or null, found 0"),
    ({"class_embeddings_concat": True}, "class_embeddings_concat puts a class beside the time: it needs num_class"),
    (
        {
            "class_embeddings_concat": True,
            "num_class_embeds": 3,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 52,
        },
        "it needs num_class_embeds or class_embed_type, and no addition_embed_type",
    ),
    ({"only_cross_attention": [True] * 3}, r"only_cross_attention should be 4 of true or false, or one, found \[True"),
    ({"only_cross_attention": [True, False, 1, True]}, "only_cross_attention should be 4 of true or false"),
    ({"only_cross_attention": None}, r"only_cross_attention = null \(expected true or false\)"),
    ({"conv_in_kernel": 2}, "conv_in_kernel should be odd and at least 1, found 2"),
    ({"conv_out_kernel": -1}, "conv_out_kernel should be odd and at least 1, found -1"),
    ({"conv_in_kernel": [3, 3]}, r"conv_in_kernel = \[3, 3\] \(expected an integer\)"),
    ({"in_channels": "4"}, r'in_channels = "4" \(expected an integer\)'),
    ({"in_channels": [4]}, r"in_channels = \[4\] \(expected an integer\)"),
    ({"use_linear_projection": 1}, r"use_linear_projection = 1 \(expected true or false\)"),
    ({"norm_eps": "1e-5"}, r'norm_eps = "1e-5" \(expected a number\)'),
    ({"block_out_channels": 320}, r"block_out_channels = 320 \(expected a list\)"),
    ({"block_out_channels": []}, r"block_out_channels = \[\] \(expected a list\)"),
    ({"block_out_channels": [320, 640.0, 1280, 1280]}, "block_out_channels = "),
]
WRONG_VAES = [
    ({"down_block_types": ["DownEncoderBlock2D"] * 2}, "down_block_types should be 1 x 'DownEncoderBlock2D'"),
    ({"up_block_types": ["AttnUpDecoderBlock2D"]}, "up_block_types.*AttnUpDecoderBlock2D"),
    ({"block_out_channels": [64, 64]}, "down_block_types should be 2 x"),
    ({"norm_num_groups": 24}, r"block_out_channels \[64\] should be divisible by norm_num_groups 24"),
    ({"latent_channels": None}, "latent_channels = null"),
    ({"latent_channels": -1}, "latent_channels should be a positive integer"),
    ({"layers_per_block": 0}, "layers_per_block should be a positive integer"),
    ({"in_channels": 0}, "in_channels should be a positive integer"),
    (
        {"block_out_channels": [-32]},
        r"block_out_channels \[-32\] should be divisible by norm_num_groups 32, and positive",
    ),
    ({"layers_per_block": [2]}, r"layers_per_block = \[2\] \(expected an integer\)"),
    ({"scaling_factor": None}, "scaling_factor = null"),
    ({"sample_size": "large"}, "sample_size = "),
]
WRONG_TEXT_ENCODERS = [
    ({"hidden_act": "relu"}, "hidden_act should be one of quick_gelu, gelu, found 'relu'"),
    ({"hidden_size": 500}, "hidden_size 500 should be divisible by num_attention_heads 8"),
    ({"eos_token_id": [2, 3]}, r"eos_token_id = \[2, 3\] \(expected an integer\)"),
    ({"eos_token_id": None}, "eos_token_id = null"),
    ({"num_hidden_layers": "12"}, "num_hidden_layers = "),
    ({"num_attention_heads": 0}, "num_attention_heads should be a positive integer"),
    ({"vocab_size": -1}, "vocab_size should be a positive integer"),
]


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        *((UNet2DConditionModel, *case) for case in WRONG_UNETS),
        *((AutoencoderKL, *case) for case in WRONG_VAES),
        *((CLIPTextModel, *case) for case in WRONG_TEXT_ENCODERS),
    ],
)
def test_configuration_that_describes_no_network(cls: type[Model], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        build(cls, fields)
    assert cls.__name__ in str(error.value)


def test_heads_need_not_divide_a_level_that_does_not_attend() -> None:
    fields = {"down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3]}
    fields |= {"up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"], "attention_head_dim": [7, 8, 8, 8]}
    assert unet_config(fields).attention_head_dim[0] == 7
    build(UNet2DConditionModel, fields)


# --- Wrong inputs ----------------------------------------------------------------------------------------------------

TINY_UNET = {
    "block_out_channels": [8],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 6,
}


@pytest.mark.parametrize(
    ("x", "t", "ctx", "message"),
    [
        ((2, 9, 8, 8), 1, (2, 5, 6), r"sample should be \(B, 4, H, W\), found \(2, 9, 8, 8\)"),
        ((4, 8, 8), 1, (2, 5, 6), r"sample should be \(B, 4, H, W\), found \(4, 8, 8\)"),
        ((2, 4, 8, 8), 1, (2, 5, 7), r"should be \(2, L, 6\), a text .*, found \(2, 5, 7\).*another model"),
        ((2, 4, 8, 8), 1, (1, 5, 6), r"should be \(2, L, 6\), a text for each sample, found \(1, 5, 6\)"),
        ((2, 4, 8, 8), 1, (2, 6), r"should be \(2, L, 6\), a text for each sample, found \(2, 6\)"),
        ((2, 4, 8, 8), [1, 2, 3], (2, 5, 6), r"timestep should be one time or one per sample: found shape \(3,\)"),
        ((2, 4, 8, 8), [[1], [2]], (2, 5, 6), r"timestep should be .* found shape \(2, 1\)"),
        ((2, 4, 8, 8), [], (2, 5, 6), r"timestep should be .* found shape \(0,\)"),
    ],
)
def test_unet_input_of_a_wrong_shape(x: tuple[int, ...], t: Any, ctx: tuple[int, ...], message: str) -> None:
    model = UNet2DConditionModel(**TINY_UNET)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(x), torch.tensor(t), torch.zeros(ctx))


XL_UNET = TINY_UNET | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 52,
}


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (None, "added_cond_kwargs should hold text_embeds .* and time_ids .*, found nothing"),
        ({"text_embeds": (2, 4)}, "found text_embeds"),
        ({"text_embeds": (2, 4), "time_ids": (2, 6), "image_embeds": (2, 4)}, "image_embeds"),
        (
            {"text_embeds": (2, 4), "time_ids": (2, 5)},
            r"P \+ 8 n = 52, found \(2, 4\) and \(2, 5\); SDXL base takes n = 6",
        ),
        ({"text_embeds": (1, 4), "time_ids": (2, 6)}, r"text_embeds should be \(2, P\).*found \(1, 4\)"),
        ({"text_embeds": (2, 4), "time_ids": (1, 6)}, r"time_ids \(2, n\).*found \(2, 4\) and \(1, 6\)"),
        ({"text_embeds": (2, 1, 4), "time_ids": (2, 6)}, r"found \(2, 1, 4\)"),
    ],
)
def test_added_conditions_that_do_not_fit(added: dict[str, tuple[int, ...]] | None, message: str) -> None:
    model = UNet2DConditionModel(**XL_UNET)
    tensors = None if added is None else {name: torch.zeros(shape) for name, shape in added.items()}
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, 5, 6), added_cond_kwargs=tensors)


UNUSED_ARGUMENTS = """
    timestep_cond attention_mask cross_attention_kwargs added_cond_kwargs down_block_additional_residuals
    mid_block_additional_residual down_intrablock_additional_residuals
""".split()


@pytest.mark.parametrize("argument", UNUSED_ARGUMENTS)
def test_unet_argument_that_is_not_implemented(argument: str) -> None:
    model = UNet2DConditionModel(**TINY_UNET)
    with pytest.raises(ValueError, match=f"does not implement the argument.*{argument}"):
        model(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 5, 6), **{argument: torch.ones(1)})


def test_networks_have_the_reference_s_arguments() -> None:
    for ours, theirs, methods in (
        (UNet2DConditionModel, diffusers.UNet2DConditionModel, ["forward"]),
        (AutoencoderKL, diffusers.AutoencoderKL, ["forward", "encode", "decode"]),
    ):
        for method in methods:
            a, b = (inspect.signature(getattr(cls, method)).parameters for cls in (ours, theirs))
            assert [(p.name, p.default) for p in a.values()] == [(p.name, p.default) for p in b.values()], method


def test_unknown_argument() -> None:
    with pytest.raises(TypeError, match="strength"):
        UNet2DConditionModel(**TINY_UNET)(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 5, 6), strength=1)


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (3, 16, 16), (1, 3, 1, 16), (1, 3, 16, 0)])
def test_picture_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    model = AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, **blocks)
    with pytest.raises(ValueError, match=r"pictures to encode should be \(B, 3, H, W\) with H and W at least 2, found"):
        model.encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (4, 4, 4), (1, 8, 4, 4)])
def test_latent_of_a_wrong_shape(shape: tuple[int, ...]) -> None:
    model = AutoencoderKL(block_out_channels=[8], norm_num_groups=4)
    with pytest.raises(ValueError, match=r"latents should be \(B, 4, H, W\), found"):
        model.decode(torch.zeros(shape))


def test_generators_of_a_wrong_number() -> None:
    model = AutoencoderKL(block_out_channels=[8], norm_num_groups=4)
    posterior = model.encode(torch.zeros(3, 3, 4, 4)).latent_dist
    with pytest.raises(ValueError, match="a list of 2 generators for a batch of 3"):
        posterior.sample([torch.Generator(), torch.Generator()])


TINY_CLIP = {
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(
    ("ids", "arguments", "message"),
    [
        (torch.zeros(1, 78, dtype=torch.int64), {}, r"\(B, L\) with L at most 77, found \(1, 78\).*truncation=True"),
        (torch.zeros(5, dtype=torch.int64), {}, r"input_ids should be \(B, L\).*found \(5,\)"),
        (torch.zeros(1, 5), {}, "input_ids should be integers, found torch.float32"),
        (
            torch.zeros(2, 5, dtype=torch.int64),
            {"attention_mask": torch.ones(1, 5)},
            r"attention_mask should have the shape of input_ids, \(2, 5\), found \(1, 5\)",
        ),
        (
            torch.zeros(2, 5, dtype=torch.int64),
            {"position_ids": torch.arange(4)[None]},
            r"position_ids should be \(2, 5\) or \(1, 5\), found \(1, 4\)",
        ),
    ],
)
def test_token_ids_of_a_wrong_kind(ids: torch.Tensor, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CLIPTextModel(TINY_CLIP)(ids, **arguments)


@pytest.mark.parametrize("width", [0, None, 7.5])
def test_width_of_the_projection_that_is_none(width: Any) -> None:
    with pytest.raises(ConfigError, match=f"projection_dim should be a positive integer, found {width}"):
        build(CLIPTextModelWithProjection, TINY_CLIP | {"projection_dim": width})


def test_text_encoder_argument_that_is_not_implemented() -> None:
    with pytest.raises(TypeError, match="output_attentions"):
        CLIPTextModel(TINY_CLIP)(torch.zeros(1, 5, dtype=torch.int64), output_attentions=True)
