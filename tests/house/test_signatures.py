"""Calls and constructors of every pipeline, and every public method: the reference's names, order and defaults.

Code written for the reference may pass anything that the reference names, by keyword; what minidiff does not implement
is an error that says so (``not_implemented``), never silence.
"""

import inspect
from collections.abc import Set
from dataclasses import fields
from importlib import import_module
from typing import Any

import pytest

import minidiff
from minidiff.compat.paths import PATHS
from minidiff.pipelines.latent import LatentPipeline
from minidiff.pipelines.latent_consistency import ConsistencyImageRequest, ConsistencyRequest
from minidiff.pipelines.request import Request
from minidiff.pipelines.request_image import ImageRequest, InpaintRequest
from minidiff.pipelines.request_xl import XLImageRequest, XLInpaintRequest, XLRequest
from minidiff.pipelines.stable_diffusion_instruct_pix2pix import EditRequest
from minidiff.pipelines.stable_diffusion_xl_instruct_pix2pix import XLEditRequest
from tests.theirs import diffusers, transformers

FAMILIES = ("StableDiffusion", "LatentConsistency")
NAMES = [name for name in minidiff.__all__ if name.startswith(FAMILIES) and name.endswith("Pipeline")]
OURS = {"seed", "seeds", "long_prompt", "not_implemented"}  # beyond the reference
REFUSED = {  # by name
    "ip_adapter_image",
    "ip_adapter_image_embeds",
    "cross_attention_kwargs",  # in some pipelines
    "callback",
    "callback_steps",
    "kwargs",
}
LATER = {"cross_attention_kwargs", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}  # of keyword only


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    found = dict(inspect.signature(inspect.unwrap(function)).parameters)
    return {name: parameter for name, parameter in found.items() if name != "self"}


def plain(default: Any) -> Any:
    """Lists and tuples are one: what the reference writes as a list here is a tuple, which nobody can change."""
    return tuple(default) if isinstance(default, list) else default


@pytest.mark.parametrize("name", NAMES)
def test_calls(name: str) -> None:
    ours = parameters(getattr(minidiff, name).__call__)
    theirs = parameters(getattr(diffusers, name).__call__)
    shared = [argument for argument in theirs if argument in ours]
    assert set(theirs) - set(ours) <= REFUSED
    assert set(ours) - set(theirs) <= OURS | LATER
    assert {argument: plain(ours[argument].default) for argument in shared} == {
        argument: plain(theirs[argument].default) for argument in shared
    }
    positional = [argument for argument in ours if ours[argument].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == [argument for argument in shared if argument in positional]  # in the reference's order


REQUESTS = {
    "LatentConsistencyModelPipeline": ConsistencyRequest,
    "LatentConsistencyModelImg2ImgPipeline": ConsistencyImageRequest,
    "StableDiffusionPipeline": Request,
    "StableDiffusionImg2ImgPipeline": ImageRequest,
    "StableDiffusionInpaintPipeline": InpaintRequest,
    "StableDiffusionInstructPix2PixPipeline": EditRequest,
    "StableDiffusionXLPipeline": XLRequest,
    "StableDiffusionXLImg2ImgPipeline": XLImageRequest,
    "StableDiffusionXLInpaintPipeline": XLInpaintRequest,
    "StableDiffusionXLInstructPix2PixPipeline": XLEditRequest,
}


@pytest.mark.parametrize("name", NAMES)
def test_steps_have_the_defaults_of_calls(name: str) -> None:
    call = parameters(getattr(minidiff, name).__call__)
    asked = {field.name: field.default for field in fields(REQUESTS[name])}
    shared = [argument for argument in call if argument in asked]
    assert {argument: asked[argument] for argument in shared} == {
        argument: call[argument].default for argument in shared
    }
    assert set(call) - set(asked) == set(call) & {
        "output_type",
        "return_dict",
        "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
        "not_implemented",
    }


@pytest.mark.parametrize("name", NAMES)
def test_constructors(name: str) -> None:
    ours, theirs = (parameters(getattr(library, name).__init__) for library in (minidiff, diffusers))
    assert list(ours) == list(theirs)
    for argument, parameter in theirs.items():
        if parameter.default is not inspect.Parameter.empty:
            assert ours[argument].default == parameter.default, argument


@pytest.mark.parametrize("name", NAMES)
def test_what_callbacks_may_ask_for(name: str) -> None:
    """All that the reference hands out, but for the negative embeddings of SDXL, which are joined to the others."""
    ours, theirs = getattr(minidiff, name), getattr(diffusers, name)
    assert issubclass(ours, LatentPipeline)
    expected = set(getattr(theirs, "_callback_tensor_inputs", []))
    if "XL" in name:
        expected -= {"negative_prompt_embeds", "negative_pooled_prompt_embeds", "negative_add_time_ids"}
    assert expected <= set(ours._callback_tensor_inputs)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "UNet2DModel", "AutoencoderKL", "AutoencoderTiny"])
def test_constructors_of_networks_show_their_fields(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(library, name)).parameters for library in (minidiff, diffusers))
    assert {p.name: p.default for p in ours.values()} == {p.name: p.default for p in theirs.values()}
    assert {p.kind for p in ours.values()} == {inspect.Parameter.KEYWORD_ONLY}  # so that their order says nothing
    assert getattr(minidiff, name).config_name == getattr(diffusers, name).config_name


# --- Every public method of every public class -------------------------------------------------------------------

CLASSES = [name for name in minidiff.__all__ if isinstance(getattr(minidiff, name), type)]
CLASSES = sorted({*CLASSES, "VaeImageProcessor"})
CLASSES = [name for name in CLASSES if not name.startswith("CLIPTextConfig")]  # a record there, fields alone here
SCHEDULERS = [name for name in CLASSES if name.endswith("Scheduler")]
DIFFERENT = {  # method: arguments whose default or place differs, with the reason
    "add_adapter": {"adapter_name"},  # of CLIP: transformers says None and means "default"
    "forward": {"output_hidden_states", "return_dict"},  # of CLIP: read from **kwargs there
    "decode": {"clean_up_tokenization_spaces"},  # of the tokenizer: read from **kwargs there
    "fuse_lora": {"components"},  # None is "those that have adapters", there a list
    "unfuse_lora": {"components"},
    "from_pretrained": {"pretrained_model_or_path", "revision"},  # another name of the path; None is "main"
    # "10GB" said, None or "50GB" there; of CLIP: transformers has two arguments of its own among those of diffusers
    "save_pretrained": {"max_shard_size", "state_dict", "push_to_hub"},
    "from_config": {"config"},  # of networks: called ``fields``
    "load_config": {"return_commit_hash"},  # what follows is by keyword alone
}
LACKING = {  # what schedulers of the reference have and ours do not: the reason
    "convert_model_output": "a part of its step; ours is minidiff.schedulers.prediction",
    "extract_init_dict": "a part of its from_config",
    "get_config_dict": "deprecated there in favour of load_config",
    "get_lms_coefficient": "a part of its step; minidiff.schedulers.lms.lms_weights",
    "get_order_list": "a part of its set_timesteps",
    "push_to_hub": "uploading is huggingface_hub's",
    "register_for_auto_class": "for code that is loaded from the Hub",
    "state_in_first_order": "where its step is; plan.coefficients[i].corrects and .finishes",
    "stretch_shift_to_terminal": "a part of its set_timesteps",
    "time_shift": "a part of its set_timesteps",
    **dict.fromkeys(
        "deis_first_order_update multistep_deis_second_order_update multistep_deis_third_order_update "
        "dpm_solver_first_order_update multistep_dpm_solver_second_order_update multistep_uni_c_bh_update "
        "multistep_dpm_solver_third_order_update singlestep_dpm_solver_second_order_update multistep_uni_p_bh_update "
        "singlestep_dpm_solver_third_order_update singlestep_dpm_solver_update".split(),
        "a part of its step; ours are advance() and the coefficients in plan.coefficients",
    ),
}


def classes(name: str) -> tuple[type, type]:
    if name == "VaeImageProcessor":
        return import_module("minidiff.image_processor").VaeImageProcessor, diffusers.image_processor.VaeImageProcessor
    if name == "StableDiffusionSafetyChecker":
        return minidiff.StableDiffusionSafetyChecker, diffusers.pipelines.stable_diffusion.StableDiffusionSafetyChecker
    return getattr(minidiff, name), getattr(transformers if name.startswith("CLIP") else diffusers, name)


def methods(cls: type) -> list[str]:
    """The constructor, the call and the public methods that are written in Python: those of dict have no signature."""
    public = {name: getattr(cls, name) for name in dir(cls) if name[0] != "_" or name == "__call__"}
    written = [name for name, method in public.items() if inspect.isfunction(method) or inspect.ismethod(method)]
    return ["__init__", *written]


def arguments(function: Any) -> dict[str, inspect.Parameter]:
    """The arguments with a name, without the object or class itself."""
    found = parameters(function).values()
    named = [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in ("cls", "self")]
    return {p.name: p for p in named}


def positional(arguments: dict[str, inspect.Parameter]) -> list[str]:
    return [name for name, p in arguments.items() if p.kind is p.POSITIONAL_OR_KEYWORD]


def differences(one: Any, other: Any, excused: Set[str]) -> list[str]:
    """Say where a call of ours means something else: another argument in a place, or another default."""
    ours, theirs = arguments(one), arguments(other)
    pairs = [pair for pair in zip(positional(ours), positional(theirs), strict=False) if not excused & set(pair)]
    wrong = [f"{here} stands in the place of {there}" for here, there in pairs if here != there]
    for argument in [name for name in theirs if name in ours and name not in excused]:
        mine, default = ours[argument].default, theirs[argument].default
        if inspect.Parameter.empty not in (mine, default) and mine not in (default, plain(default)):
            wrong.append(f"{argument}={mine!r}, there {default!r}")
    return wrong


def differences_of_methods(one: type, other: type, excused: Set[str] = frozenset()) -> list[str]:
    shared = [name for name in methods(other) if hasattr(one, name) and not isinstance(getattr(other, name), type)]
    shared = [name for name in shared if name != "__call__" or one.__name__ not in NAMES]  # see ``test_calls``
    return [
        f"{name}: {difference}"
        for name in shared
        for difference in differences(getattr(one, name), getattr(other, name), DIFFERENT.get(name, set()) | excused)
    ]


@pytest.mark.parametrize("name", CLASSES)
def test_methods(name: str) -> None:
    """A call means the same: arguments by position in the reference's order, and its defaults.

    What ours does not take is an error that says so, and what ours takes beyond stands behind.
    """
    assert differences_of_methods(*classes(name)) == []


# --- What else the reference's dotted paths lead to: functions, mixins, callbacks, outputs ------------------------

CALLBACKS = {"tensors", "callback_kwargs", "timestep", "timesteps"}  # pipelines hand them over by position
OTHERS = {  # name -> arguments that differ
    "MultiPipelineCallbacks": CALLBACKS,
    "PipelineCallback": CALLBACKS,
    "SDCFGCutoffCallback": CALLBACKS,
    "SDXLCFGCutoffCallback": CALLBACKS,
    "Decoder": {"spec", "in_channels", "z", "sample"},  # parts of our networks
    "Encoder": {"spec", "in_channels", "x", "sample"},
    "DiagonalGaussianDistribution": {"moments", "parameters", "deterministic"},  # one that is no distribution
    "adjust_lora_scale_text_encoder": {"model", "weight", "text_encoder", "lora_scale"},  # is scale_lora_layers here
    "pt_to_pil": {"x", "images"},
}


def others() -> dict[str, tuple[Any, Any]]:
    """Whatever a dotted path has under one name here and there, but for the classes above."""
    found = {}
    for path in [path for path in PATHS if path != "logging"] + ["optimization", "training_utils"]:
        one, other = import_module(f"minidiff.{path}"), import_module(f"diffusers.{path}")
        for name in [name for name in dir(other) if name[0] != "_" and name not in CLASSES]:
            value = getattr(other, name)
            written_there = callable(value) and str(getattr(value, "__module__", "")).startswith("diffusers.")
            if written_there and hasattr(one, name):
                found[name] = getattr(one, name), value
    return found


@pytest.mark.parametrize("name", others())
def test_others(name: str) -> None:
    (one, other), excused = others()[name], OTHERS.get(name, set())
    if isinstance(other, type):
        assert differences_of_methods(one, other, excused) == []
    else:
        assert differences(one, other, excused) == []


@pytest.mark.parametrize("name", SCHEDULERS)
def test_all_of_a_scheduler_is_there(name: str) -> None:
    """Every public method and argument, but for those in ``LACKING``."""
    one, other = classes(name)
    absent = {method for method in dir(other) if method[0] != "_" and not hasattr(one, method)}
    assert absent <= set(LACKING)
    for method in set(methods(other)) - absent - {"load_config", "from_pretrained", "from_config"}:
        ours, theirs = arguments(getattr(one, method)), arguments(getattr(other, method))
        assert list(theirs) == list(ours)[: len(theirs)], method


def test_no_excuse_is_idle() -> None:
    assert set(LACKING) <= {method for name in SCHEDULERS for method in set(dir(classes(name)[1]))}
    assert not any(hasattr(classes(name)[0], method) for name in SCHEDULERS for method in LACKING)
