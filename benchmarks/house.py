"""Measure the library room by room: ``python -m benchmarks.house [CHECKOUT]``.

What the table counts is what ``tests/house/test_law.py`` holds:

* code: lines that are neither empty nor a comment alone nor a docstring's; signatures: those from ``def`` to ``:``;
* length of a function: its lines without signature and docstring;
* nesting: how many ``for``, ``while``, ``if``, ``with``, ``try`` and ``match`` of its function stand in each other;
  ``elif`` does not nest, and a function inside a function begins at 0 again;
* imports: of modules of the library, at the head of a file, in a function, or for type checkers alone.
"""

import argparse
import ast
import io
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "minidiff"
# Where the files of a room were before they were moved, so that the tables of any two checkouts have the same rows.
MOVED = {
    "networks": "layers unet unet_unconditional vae clip slicing tiles freeu recompute vocabulary",
    "text": "tokenizer tokenizer_files pipelines.texts",
    "schedulers": "noise_schedule",
    "images": "images pipelines.image_inputs pipelines.image_regions image_processor",
    "cli": "cli cli_convert cli_inspect",
}
ROOM_OF = {old: room for room, names in MOVED.items() for old in names.split()}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
NESTING = (ast.For, ast.AsyncFor, ast.While, ast.If, ast.With, ast.AsyncWith, ast.Try, ast.Match)
SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


class Function(NamedTuple):
    """A function or method: ``name`` is ``module.Class.name``."""

    name: str
    lines: int
    nesting: int


class Module(NamedTuple):
    """One file. ``imports`` are those that run when it is imported, ``late`` those of functions and type checkers."""

    name: str
    raw: int
    code: int
    docstring: int
    signature: int
    functions: tuple[Function, ...]
    imports: frozenset[str]
    late: frozenset[str]


def _documented(node: ast.AST) -> ast.stmt | None:
    """Return the docstring of a module, class or function, as a statement."""
    first = node.body[0] if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTION)) and node.body else None
    is_text = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return first if is_text else None


def _lines(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _nesting(statements: Iterable[ast.stmt]) -> int:
    """Return how deep compound statements stand in each other, without functions and classes inside."""
    return max((_depth(statement) for statement in statements), default=0)


def _depth(statement: ast.stmt) -> int:
    if not isinstance(statement, NESTING):
        return 0
    otherwise = getattr(statement, "orelse", [])
    is_elif = isinstance(statement, ast.If) and len(otherwise) == 1 and isinstance(otherwise[0], ast.If)
    inside = [*getattr(statement, "body", []), *([] if is_elif else otherwise), *getattr(statement, "finalbody", [])]
    for part in [*getattr(statement, "handlers", []), *getattr(statement, "cases", [])]:
        inside += part.body
    deepest = 1 + _nesting(inside)
    return max(deepest, _depth(otherwise[0])) if is_elif else deepest


def _functions(node: ast.AST, name: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        inner = f"{name}.{child.name}" if isinstance(child, (ast.ClassDef, *FUNCTION)) else name
        if isinstance(child, FUNCTION):
            yield inner, child
        yield from _functions(child, inner)


def _function(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> Function:
    body = node.body[1:] if _documented(node) else node.body
    return Function(name, _lines(node)[-1] - body[0].lineno + 1 if body else 0, _nesting(body))


def _imported(node: ast.AST, modules: set[str]) -> set[str]:
    """Return the modules of the library that an import statement names; the package itself is ``minidiff``."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names if alias.name.partition(".")[0] == PACKAGE}
    if not isinstance(node, ast.ImportFrom) or (node.module or "").partition(".")[0] != PACKAGE:
        return set()
    inner = {f"{node.module}.{alias.name}" for alias in node.names}
    return inner & modules | ({node.module} if inner - modules else set())


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what runs when a file is imported: neither functions nor what is for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTION) or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)):
            continue
        yield child
        yield from _at_import(child)


def _module(name: str, text: str, modules: set[str]) -> Module:
    tree = ast.parse(text)
    docstrings = {line for node in ast.walk(tree) if (found := _documented(node)) for line in _lines(found)}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in SKIPPED]
    code = {line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - docstrings
    functions = list(_functions(tree, name))
    heads = [range(node.lineno, max(node.lineno + 1, node.body[0].lineno)) for _, node in functions]
    head = {found for node in _at_import(tree) for found in _imported(node, modules)}
    return Module(
        name=name,
        raw=len(text.splitlines()),
        code=len(code),
        docstring=len(docstrings),
        signature=len(code & set().union(*heads)),
        functions=tuple(_function(*function) for function in functions),
        imports=frozenset(head),
        late=frozenset({found for node in ast.walk(tree) for found in _imported(node, modules)} - head),
    )


def read(checkout: Path) -> dict[str, Module]:
    """Measure every file of the library in a checkout; keys are dotted names, the package's own is ``minidiff``."""
    names = {}
    for path in sorted((checkout / PACKAGE).rglob("*.py")):
        parts = path.relative_to(checkout).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: _module(name, path.read_text(encoding="utf-8"), set(names)) for name, path in names.items()}


def room(name: str) -> str:
    """Return the room of a module: its folder in the library of today, "top" for a file that stands outside them."""
    inner = name.partition(".")[2]
    folder, _, rest = inner.partition(".")
    return ROOM_OF.get(inner) or (folder if rest or folder in _FOLDERS else "top")


_FOLDERS = set("adapters checkpoints cli compat fast images networks pipelines schedulers text".split())


def circles(modules: dict[str, Module]) -> list[set[str]]:
    """Return the groups of modules that import each other at the head of their files, each seen from every one."""
    below: dict[str, set[str]] = {}
    for name in modules:
        found, waiting = set(), [name]
        while waiting:
            new = {other for other in modules[waiting.pop()].imports if other in modules} - found
            found |= new
            waiting += new
        below[name] = found
    groups = {frozenset(other for other in below[name] if name in below[other]) for name in modules}
    return [set(group) for group in sorted(groups, key=sorted) if group]


def table(modules: dict[str, Module]) -> str:
    """Return the rooms as Markdown, and the whole."""
    rooms: dict[str, list[Module]] = defaultdict(list)
    for module in modules.values():
        rooms[room(module.name)].append(module)
    lines = ["| room | files | raw | code | of it signatures | docstring | longest function | deepest nesting |"]
    lines.append("|---|" + "---:|" * 7)
    for name, inside in [*sorted(rooms.items()), ("**all**", list(modules.values()))]:
        functions = [function for module in inside for function in module.functions]
        counts = [sum(getattr(m, part) for m in inside) for part in ("raw", "code", "signature", "docstring")]
        deepest = [max((getattr(f, part) for f in functions), default=0) for part in ("lines", "nesting")]
        lines.append(f"| {name} | {len(inside)} | " + " | ".join(f"{n:,}" for n in [*counts, *deepest]) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.house", description=__doc__.splitlines()[0])
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).parents[1])
    print(table(read(parser.parse_args(argv).checkout)))


if __name__ == "__main__":
    main()
