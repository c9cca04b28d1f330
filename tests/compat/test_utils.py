"""What programs import from ``diffusers.utils``: the same answers, messages and errors."""

import logging
import sys
import warnings
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

import minidiff
from tests.theirs import diffusers

LIBRARIES = ("minidiff", "diffusers")


def outcome(call: Any, *arguments: Any) -> tuple[Any, ...]:
    """Return what a call gives or raises, and what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call(*arguments)
        except (TypeError, ValueError) as error:
            result = (type(error), str(error))
    return result, [(one.category, str(one.message), one.filename) for one in caught]


class Holder:
    old, older = 5, 7


DEPRECATIONS = {
    "an argument": lambda deprecate: deprecate("old", "1.0.0", "Do.", take_from={"old": 4}),
    "a tuple": lambda deprecate: deprecate(("old", "1.0.0", "Do."), take_from={"old": 4}),
    "two": lambda deprecate: deprecate(
        ("old", "1.0.0", "Do."), ("older", "9", ""), take_from={"old": 4, "older": None}
    ),
    "absent": lambda deprecate: deprecate("old", "1.0.0", "Do.", take_from={}),
    "a foreign argument": lambda deprecate: deprecate("old", "1.0.0", "Do.", take_from={"odd": 4}),
    "attributes": lambda deprecate: deprecate(
        ("old", "1.0", "Do."), ("older", "1.0", ""), ("no", "1.0", ""), take_from=Holder()
    ),
    "nothing": lambda deprecate: deprecate("old", "1.0.0", "Do."),
    "in own words": lambda deprecate: deprecate("old", "1.0.0", "Do.", standard_warn=False),
    "elsewhere": lambda deprecate: deprecate("old", "1.0.0", "Do.", stacklevel=3),
    "too late": lambda deprecate: deprecate("old", "0.0.1", "Do."),
}


@pytest.mark.parametrize("name", DEPRECATIONS)
def test_deprecate(name: str) -> None:
    ours, theirs = (outcome(DEPRECATIONS[name], import_module(f"{library}.utils").deprecate) for library in LIBRARIES)
    assert ours == theirs


def test_replace_example_docstring() -> None:
    for library in LIBRARIES:
        replace = import_module(f"{library}.utils").replace_example_docstring

        @replace("like this")
        def documented() -> None:
            """Do it.

            Examples:
            """

        assert documented.__doc__.split()[-2:] == ["like", "this"] and "Examples" not in documented.__doc__
        with pytest.raises(ValueError, match="Examples:"):
            replace("like this")(undocumented)


def undocumented() -> None:
    """Say nothing."""


def test_small_tools() -> None:
    ours, theirs = (import_module(f"{library}.utils") for library in LIBRARIES)
    assert ours.PIL_INTERPOLATION == theirs.PIL_INTERPOLATION
    for name in ("accelerate", "wandb", "xformers", "torch_xla", "transformers"):
        assert getattr(ours, f"is_{name}_available")() == getattr(theirs, f"is_{name}_available")()
    for library in (ours, theirs):
        library.check_min_version("0.30.0")
        with pytest.raises(ImportError, match=r"9\.0\.0"):
            library.check_min_version("9.0.0")
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    for one, other in zip(ours.pt_to_pil(x), theirs.pt_to_pil(x), strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    draws = []
    for library in LIBRARIES:
        torch_utils = import_module(f"{library}.utils.torch_utils")
        draws.append(torch_utils.randn_tensor((2, 3), generator=torch.Generator().manual_seed(1), device="cpu"))
        assert torch_utils.is_compiled_module(torch.compile(torch.nn.Linear(1, 1)))
        assert not torch_utils.is_compiled_module(torch.nn.Linear(1, 1))
    assert torch.equal(*draws)


def test_what_is_absent_says_so_when_it_is_used() -> None:
    from minidiff.loaders import IPAdapterMixin
    from minidiff.models import ImageProjection
    from minidiff.utils import scale_lora_layers

    assert not isinstance(1, ImageProjection)
    with pytest.raises(NotImplementedError, match="minidiff does not implement ImageProjection"):
        ImageProjection(3)
    with pytest.raises(NotImplementedError, match="IP-Adapter"):
        IPAdapterMixin().load_ip_adapter("a")
    scale_lora_layers(None, 1.0)
    with pytest.raises(NotImplementedError, match="lora_scale=0.5 to encode_prompt"):
        scale_lora_layers(None, 0.5)


@pytest.fixture
def untouched() -> Any:
    """Leave minidiff's logger as it was."""
    logger = logging.getLogger("minidiff")
    before = logger.level, list(logger.handlers), logger.propagate
    yield logger
    logger.level, logger.handlers, logger.propagate = before
    logger.manager._clear_cache()


def test_logging(untouched: logging.Logger, capsys: Any, monkeypatch: Any) -> None:
    ours = minidiff.utils.logging
    assert {name for name in dir(diffusers.utils.logging) if "verbosity" in name} <= set(
        vars(import_module("minidiff.compat.logging"))
    )
    for name in ("debug", "info", "warning", "error"):
        getattr(ours, f"set_verbosity_{name}")()
        assert ours.get_verbosity() == getattr(logging, name.upper()) == getattr(ours, name.upper())
    assert ours.get_logger() is untouched and ours.get_logger("minidiff.sub").parent is untouched
    ours.disable_propagation()
    assert untouched.propagate is False
    ours.enable_propagation()
    assert untouched.propagate is True
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as outside of pytest
    ours.set_verbosity_info()
    assert len(untouched.handlers) == 1
    ours.set_verbosity_info()
    assert len(untouched.handlers) == 1


def test_progress_bars_of_downloads(monkeypatch: Any) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled

    ours = minidiff.utils.logging
    before = are_progress_bars_disabled()
    hub = sys.modules["huggingface_hub.utils.tqdm"]
    monkeypatch.setattr(hub, "HF_HUB_DISABLE_PROGRESS_BARS", None)  # of the environment, which has priority
    ours.disable_progress_bar()
    assert are_progress_bars_disabled()
    ours.enable_progress_bar()
    assert not are_progress_bars_disabled()
    if before:
        ours.disable_progress_bar()
