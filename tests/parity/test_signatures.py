"""Calls and constructors of every pipeline: the reference's names, order and defaults; nothing of it passes silently.

Code written for the reference may pass anything that the reference names, by keyword; what minidiff does not implement
is an error that says so (``not_implemented``), never silence.
"""

import inspect
from dataclasses import fields
from typing import Any

import pytest
from theirs import diffusers

import minidiff
from minidiff.pipelines.latent import LatentPipeline
from minidiff.pipelines.request import Request
from minidiff.pipelines.request_image import ImageRequest, InpaintRequest
from minidiff.pipelines.request_xl import XLImageRequest, XLInpaintRequest, XLRequest
from minidiff.pipelines.stable_diffusion_instruct_pix2pix import EditRequest
from minidiff.pipelines.stable_diffusion_xl_instruct_pix2pix import XLEditRequest

NAMES = [name for name in minidiff.__all__ if name.startswith("StableDiffusion")]
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
