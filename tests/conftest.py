"""What every test shares: a quiet, offline, reproducible process."""

import os
from collections.abc import Iterator

import pytest
import torch


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


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Give each test the same global random state, and put back the default dtype it may have changed."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture
def rng() -> torch.Generator:
    """A CPU generator with a fixed seed."""
    return torch.Generator().manual_seed(0)
