"""What tests draw from the global generators is the same whatever ran before them, see ``tests/conftest.py``."""

import random

import numpy as np
import pytest
import torch


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), np.random.rand(), random.random()


def drawn_from(seed: int) -> tuple[float, float, float]:
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
    return draw()


AT_IMPORT = draw()


@pytest.fixture(scope="module")
def shared() -> tuple[float, float, float]:
    return draw()


@pytest.mark.parametrize("time", range(2))
def test_every_draw_is_seeded(time: int, shared: tuple[float, float, float]) -> None:
    here = draw()  # leaves another state behind, the second time
    assert (here, shared, AT_IMPORT) == (drawn_from(0), drawn_from(1), drawn_from(2))
