"""Benchmarks compare with the same stand-in networks, grids of options and exact solutions as the tests."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).parents[1] / "tests"


def from_tests(name: str) -> ModuleType:
    """Import a module of ``tests/``, such as ``scheduler_runs`` or ``schedulers.mixture``."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    return importlib.import_module(name)
