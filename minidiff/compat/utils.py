"""``minidiff.utils``: small tools of the reference that programs import and minidiff itself has no use for."""

import inspect
import re
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

from minidiff.config import REFERENCE_VERSION

USE_PEFT_BACKEND = True  # whether LoRA adapters have names and weights, as in the reference with peft
PipelineImageInput = Any  # an annotation: see ``minidiff.images.processor`` for what images may be


def deprecate(*args: Any, take_from: Any = None, standard_warn: bool = True, stacklevel: int = 2) -> Any:
    """Warn that something will go, and return the value that it was given.

    Args:
        args: ``name, version, message``, or a tuple of them for each of several.
        take_from: a dict of keyword arguments, which they are taken out of, or an object that has them.
        standard_warn: whether the message begins with what goes and when.

    Raises:
        TypeError: if ``take_from`` is a dict and holds anything else: nobody expects such an argument.
        ValueError: if the version, one of the reference, has come.
    """
    values = []
    for name, version, message in args if isinstance(args[0], tuple) else [args]:
        if _numbers(REFERENCE_VERSION) >= _numbers(version):
            raise ValueError(
                f"The deprecation tuple {(name, version, message)} should be removed since diffusers' version "
                f"{REFERENCE_VERSION} is >= {version}"
            )
        if isinstance(take_from, dict) and name in take_from:
            values.append(take_from.pop(name))
            subject = f"The `{name}` argument"
        elif hasattr(take_from, name):
            values.append(getattr(take_from, name))
            subject = f"The `{name}` attribute"
        elif take_from is None:
            subject = f"`{name}`"
        else:
            continue
        start = f"{subject} is deprecated and will be removed in version {version}. " if standard_warn else ""
        warnings.warn(start + message, FutureWarning, stacklevel=stacklevel)
    if isinstance(take_from, dict) and take_from:
        caller = inspect.stack()[1]
        place = f"{caller.function} in {caller.filename} line {caller.lineno - 1}"
        raise TypeError(f"{place} got an unexpected keyword argument `{next(iter(take_from))}`")
    return values[0] if len(values) == 1 else tuple(values) or None


def replace_example_docstring(example_docstring: str) -> Callable[[Any], Any]:
    """Return a decorator that puts the text in the place of the line ``Examples:`` of a docstring."""

    def decorate(function: Any) -> Any:
        line = r"^[ \t]*Examples?:[ \t]*$"
        doc, found = re.subn(line, lambda _: example_docstring, function.__doc__, count=1, flags=re.M)
        if not found:
            raise ValueError(f"the docstring of {function} should have a line 'Examples:', found:\n{function.__doc__}")
        function.__doc__ = doc
        return function

    return decorate


def check_min_version(min_version: str) -> None:
    """Raise ``ImportError`` if a program needs a newer reference than the one that minidiff follows."""
    if _numbers(REFERENCE_VERSION) < _numbers(min_version):
        raise ImportError(f"this program needs version {min_version}; minidiff follows {REFERENCE_VERSION}")


def is_compiled_module(module: Any) -> bool:
    """Say whether this is what ``torch.compile`` returned."""
    return hasattr(module, "_orig_mod")


def scale_lora_layers(model: Any, weight: float | None = None) -> None:
    """Do nothing for a weight of 1; refuse others, which have their place in a call."""
    if weight not in (None, 1):
        raise NotImplementedError(
            f"scale_lora_layers(model, {weight}): pass lora_scale={weight} to encode_prompt and "
            f"cross_attention_kwargs={{'scale': {weight}}} to the pipeline, or call pipe.set_adapters"
        )


unscale_lora_layers = adjust_lora_scale_text_encoder = scale_lora_layers


def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


_PACKAGES = (
    "accelerate bitsandbytes ftfy invisible_watermark peft scipy tensorboard torch_npu torch_xla transformers wandb "
    "xformers"
).split()
globals().update({f"is_{package}_available": partial(_is_installed, package) for package in _PACKAGES})


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def absent(name: str) -> type:
    """Return a class under the name of one that minidiff does not implement, for annotations and ``isinstance``."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"minidiff does not implement {name}")

    return type(name, (), {"__init__": refuse, "__doc__": f"Not implemented: {name}."})


ABSENT = "AsymmetricAutoencoderKL ImageProjection StableDiffusionXLWatermarker".split()
globals().update({name: absent(name) for name in ABSENT})


class IPAdapterMixin:
    """A base class of pipelines in the reference; IP-Adapter is not implemented."""

    def load_ip_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Say so."""
        raise NotImplementedError("minidiff does not implement IP-Adapter")
