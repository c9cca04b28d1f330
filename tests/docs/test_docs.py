"""The documentation speaks of the code as it is: links, names and excerpts are looked up."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [(page.relative_to(ROOT), page.read_text(encoding="utf-8")) for page in PAGES]


def found(pattern: str) -> list[tuple[str, ...]]:
    """Return (page, groups...) for every match on every page."""
    return [
        (str(page), *(part or "" for part in match.groups()))
        for page, text in TEXTS
        for match in re.finditer(pattern, text, re.M | re.S)
    ]


LINKS = found(r"\]\((?!https?://|#)([^)#\s]+)[^)]*\)")
NAMES = found(r"`((?:minidiff|tests|weights|benchmarks|docs)/[\w./-]*|\.ci/run)(?:::([\w.]+))?`")
COMMANDS = found(r"python -m ((?:benchmarks|docs|weights)[\w.]*)")
EXCERPTS = found(r"^```python\n# ((?:minidiff|tests|weights)/[\w/]+\.py)\n(.*?)^```")


def test_there_is_something_to_check():
    assert len(LINKS) > 2 and len(NAMES) > 70 and len(COMMANDS) > 20 and len(EXCERPTS) > 4


@pytest.mark.parametrize("page, target", LINKS)
def test_links_lead_somewhere(page, target):
    assert ((ROOT / page).parent / target).exists()


def definitions(tree: ast.Module) -> set[str]:
    """Return the names a module defines: functions, classes, their methods, and constants."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            if isinstance(node, ast.ClassDef):
                names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("page, path, name", NAMES)
def test_named_code_exists(page, path, name):
    assert (ROOT / path).exists()
    if name:
        assert name in definitions(ast.parse((ROOT / path).read_text(encoding="utf-8")))


@pytest.mark.parametrize("page, module", sorted(set(COMMANDS)))
def test_commands_exist(page, module):
    path = ROOT / module.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


OURS = {"minidiff", "benchmarks", "tests", "weights"}
SCRIPTS = sorted(path for folder in ("benchmarks", "docs", "weights") for path in (ROOT / folder).rglob("*.py"))


def test_scripts_import_what_there_is():
    """Of minidiff and of each other: no test runs all of what draws figures.

    In a process of its own: ``benchmarks.reference_tests.stand_in`` puts minidiff in the reference's place for all that
    is imported after it.
    """
    code = (
        "import ast, sys\n"
        "from importlib import import_module\n"
        "from pathlib import Path\n"
        "for path in sys.argv[1:]:\n"
        "    for node in ast.walk(ast.parse(Path(path).read_text(encoding='utf-8'))):\n"
        "        if isinstance(node, ast.ImportFrom) and node.module.partition('.')[0] in OURS:\n"
        "            module = import_module(node.module)\n"
        "            for name in [alias.name for alias in node.names]:\n"
        "                assert hasattr(module, name) or import_module(f'{node.module}.{name}'), (path, name)\n"
    ).replace("OURS", repr(OURS))
    run = subprocess.run([sys.executable, "-c", code, *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("page, path, code", EXCERPTS)
def test_excerpts_are_in_the_tree(page, path, code):
    source = [line.strip() for line in (ROOT / path).read_text(encoding="utf-8").splitlines()]
    lines = [line.strip() for line in code.splitlines()]
    assert any(source[i : i + len(lines)] == lines for i in range(len(source)))


def test_readme_states_the_quality_that_the_card_measured():
    card = (ROOT / "weights/emoji64/README.md").read_text(encoding="utf-8")
    at_64 = float(re.search(r"\*\*([\d.]+)%\*\* compared at 64x64", card)[1])
    assert f"of 200 names, {at_64:.0f} % come out as the right one" in " ".join(dict(TEXTS)[Path("README.md")].split())
