"""The plan of the house: nesting, lengths, imports, a budget per room; ``python -m benchmarks.house`` shows them."""

from pathlib import Path

import pytest

from benchmarks.house import Function, Module, circles, read, room

ROOT = Path(__file__).parents[2]
MODULES = read(ROOT)
FUNCTIONS = {function.name: function for module in MODULES.values() for function in module.functions}

# From the bottom up. A module imports from its own row and from those above it here, in functions too; what is in none,
# ``minidiff/__init__.py``, is the top. ``compat/paths.py`` is at the bottom: it names modules and imports none.
ROWS = """
errors registry config outputs noise threads embedded sniff locks atomic compat
networks.specs
checkpoints.remap checkpoints.original.prefixes
compat.published compat.attention compat.network
checkpoints.arguments checkpoints.hub checkpoints.config_file
configured compat.utils text
checkpoints
adapters
networks
images
schedulers
fast
pipelines
callbacks previews prompts training_utils optimization
cli
"""
RANKS = {f"minidiff.{name}": rank for rank, row in enumerate(ROWS.strip().splitlines()) for name in row.split()}
TOP = len(RANKS)

# Lines of code of a room, signatures and all, docstrings not. Raise one only in a commit that says why.
BUDGET = {
    "adapters": 1456,
    "checkpoints": 2720,
    "cli": 260,
    "compat": 802,
    "fast": 560,
    "images": 605,
    "networks": 2085,
    "pipelines": 3295,
    "schedulers": 2570,
    "text": 657,
    "top": 1220,
}


def rank(name: str) -> int:
    """The row of the longest name in ``ROWS`` that the module's begins with."""
    while name not in RANKS:
        if "." not in name:
            return TOP
        name = name.rpartition(".")[0]
    return RANKS[name]


def test_nesting() -> None:
    assert [name for name, function in FUNCTIONS.items() if function.nesting > 3] == []


def test_length_of_functions() -> None:
    """Without signature and docstring."""
    assert [name for name, function in FUNCTIONS.items() if function.lines > 50] == []


def test_length_of_files() -> None:
    assert [name for name, module in MODULES.items() if module.raw > 400] == []


def test_no_circles_of_imports() -> None:
    """Late imports and those for type checkers count too."""
    everything = {name: module._replace(imports=module.imports | module.late) for name, module in MODULES.items()}
    assert circles(everything) == []


def test_rooms_import_downwards() -> None:
    edges = {(one, other) for one, module in MODULES.items() for other in module.imports | module.late}
    assert [f"{one} -> {other}" for one, other in edges if rank(other) > rank(one)] == []


def test_nothing_reads_the_package_itself() -> None:
    """``minidiff/__init__.py`` is for users; whatever looks a class up by its name asks ``minidiff/registry.py``."""
    assert [name for name, module in MODULES.items() if "minidiff" in module.imports | module.late] == []


@pytest.mark.parametrize("name", BUDGET)
def test_budget(name: str) -> None:
    assert sum(module.code for module in MODULES.values() if room(module.name) == name) <= BUDGET[name]


def test_every_module_has_a_row_and_a_budget() -> None:
    assert [name for name in MODULES if rank(name) == TOP] == ["minidiff"]
    assert {room(name) for name in MODULES} == set(BUDGET)
    assert [name for name in RANKS if not any(f"{module}.".startswith(f"{name}.") for module in MODULES)] == []


# --- The measure itself ------------------------------------------------------------------------------------------

SAMPLE = '''"""Two
lines."""

import minidiff.errors  # a comment
from minidiff import config, nothing
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minidiff.a import late

# alone


class Named:
    """One."""

    def deep(
        self,
    ) -> None:
        """Two
        lines."""
        for _ in ():
            try:
                pass
            except ValueError:
                with open(""):
                    while True:
                        pass

        def inner():
            from minidiff.b import later
            if 1:
                pass
            elif 2:
                if 3:
                    pass
            else:
                pass

    def short(self): return """text
    is code"""
'''


@pytest.fixture
def sample(tmp_path: Path) -> dict[str, Module]:
    (tmp_path / "minidiff").mkdir()
    for name, text in {"__init__": "", "config": "", "a": "import minidiff.b", "b": "import minidiff.a"}.items():
        (tmp_path / f"minidiff/{name}.py").write_text(text)
    (tmp_path / "minidiff/sample.py").write_text(SAMPLE)
    return read(tmp_path)


def test_the_measure_counts(sample: dict[str, Module]) -> None:
    module = sample["minidiff.sample"]
    assert (module.raw, module.docstring, module.signature) == (41, 5, 5)
    assert module.code == 41 - 5 - 1 - 8  # docstrings, the comment alone, and empty lines
    assert module.functions == (
        Function("minidiff.sample.Named.deep", 17, 4),
        Function("minidiff.sample.Named.deep.inner", 8, 2),
        Function("minidiff.sample.Named.short", 2, 0),
    )


def test_the_measure_tells_imports_apart(sample: dict[str, Module]) -> None:
    module = sample["minidiff.sample"]
    assert module.imports == {"minidiff", "minidiff.errors", "minidiff.config"}  # the first for ``nothing``
    assert module.late == {"minidiff.a", "minidiff.b"}
    assert circles(sample) == [{"minidiff.a", "minidiff.b"}]


def test_the_tests_are_laid_out_like_the_source() -> None:
    """A room has a folder of tests of its name, and a folder of tests is a room or one of these."""
    tests = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert tests - {"benchmarks", "docs", "house", "weights"} == set(BUDGET) - {"top"}
    alone = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert alone <= {name.rpartition(".")[2] for name in MODULES if room(name) == "top"}
