"""docs/schedulers.md speaks of the classes that there are, and what its tables say of them is so."""

import ast
import re
from pathlib import Path

import pytest

import minidiff
from tests.schedulers.convergence import CASES

PAGE = (Path(__file__).parents[2] / "docs" / "schedulers.md").read_text(encoding="utf-8")
SCHEDULERS = sorted(name for name in minidiff.__all__ if name.endswith("Scheduler"))
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
EVALUATIONS = {"n": (20,), "2n − 1": (39,), "n + 1, or n + 9": (21, 29)}  # of runs of 20 steps


def rows(section: str) -> list[list[str]]:
    """Return the cells of a table's rows, without its head."""
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


CLASSES = {row[0].strip("` "): row for row in rows("The classes")}
NAMES = rows("Names elsewhere")


def test_every_class_has_a_row():
    assert sorted(CLASSES) == SCHEDULERS


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_rows_say_what_is_so(kind):
    _, _, order, deterministic, evaluations, *_ = CLASSES[kind]
    scheduler = getattr(minidiff, kind)()
    plan = scheduler.plan(20)
    assert len(plan.coefficients) in EVALUATIONS[evaluations]
    draws = any(scheduler.wants_noise(plan, i) for i in range(len(plan.coefficients)))
    if deterministic in ("yes", "no"):
        assert draws == (deterministic == "no")
    orders = [case.order for case in CASES if case.kind == kind]
    assert order == ("–".join(map(str, sorted({min(orders), max(orders)}))) if orders else "–")


@pytest.mark.parametrize("row", NAMES, ids=lambda row: f"{row[0]} {row[1]}")
def test_named_samplers_can_be_built(row):
    _, _, kind, options = row
    found = {word.arg: ast.literal_eval(word.value) for word in _keywords(options)}
    kinds = [kind.strip("`")] if kind.startswith("`") else SCHEDULERS
    builds = [name for name in kinds if set(found) <= set(getattr(minidiff, name)().config)]
    assert builds
    for name in builds:
        config = getattr(minidiff, name)(**found).config
        assert {option: config[option] for option in found} == found


def _keywords(options: str) -> list[ast.keyword]:
    code = re.findall(r"`([^`]*=[^`]*)`", options)
    return ast.parse(f"f({code[0] if code else ''})", mode="eval").body.keywords


def test_every_class_has_a_name_elsewhere():
    missing = set(SCHEDULERS) - {kind.strip("`") for _, _, kind, _ in NAMES}
    assert missing == {"DPMSolverSinglestepScheduler", "TCDScheduler"} - {kind.strip("`") for _, _, kind, _ in NAMES}
