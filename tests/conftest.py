"""What every test shares: a quiet, offline, reproducible process."""

import os
import random
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # last: minidiff is the installed one


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--network", action="store_true", help="also run the tests that download published checkpoints")


def pytest_configure(config: pytest.Config) -> None:
    """Make the result independent of the caller's Hugging Face settings, before any library has read them."""
    if not config.getoption("--network"):
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_"))]:
            del os.environ[name]
        os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the Hub by mistake fails at once
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["DIFFUSERS_VERBOSITY"] = os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    torch.set_num_threads(1)  # the models are tiny, and one process per core runs tests


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect (and so count) what needs the network, unless --network asks for it."""
    if config.getoption("--network"):
        return
    needs_network = [item for item in items if item.get_closest_marker("network")]
    config.hook.pytest_deselected(items=needs_network)
    items[:] = [item for item in items if item not in needs_network]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Have the global random state of torch, NumPy and Python begin at ``seed``, and put back what it was."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0]), np.random.set_state(before[1]), random.setstate(before[2])


# What a test draws depends on nothing that ran before it: neither do fixtures that several tests share, which are made
# before the fixture of the single test, nor what a file draws while it is imported.


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    with _seeded(2):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
    if fixturedef.scope == "function":
        return (yield)
    with _seeded(1):
        return (yield)


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Give each test the same global random state, and put back the default dtype it may have changed."""
    dtype = torch.get_default_dtype()
    with _seeded(0):
        yield
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion checkpoint that the reference made, to read."""
    from tests.tiny import save_tiny  # imports the reference, which takes seconds

    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def rng() -> torch.Generator:
    """A CPU generator with a fixed seed."""
    return torch.Generator().manual_seed(0)
