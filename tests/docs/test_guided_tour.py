"""The guided tour of docs/internals.md: its calls are made, in its order, and no others lead from file to file."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import minidiff
from minidiff import StableDiffusionPipeline, UniPCMultistepScheduler
from minidiff.embedded import embedded_checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "internals.md"
PASSED_BY = {  # calls between the ten files that lead nowhere new
    # what only looks something up
    *("prompts_of", "negative_texts", "StableDiffusion._encoders", "TokenizerOutput.__getattr__", "silu"),
    *("ClassifierFree.rows", "UniPCMultistepScheduler._thresholding", "Core._thresholding"),
    "Core.draw_noise",  # UniPC draws none
    *("ResBlock.forward", "Upsample.forward"),  # of the autoencoder: the blocks that the UNet has shown
}
Call = tuple[str, str]  # file, function


def rows() -> Iterator[tuple[Call | None, Call]]:
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if re.match(r"\|[^|]*\| `\w+\.py::", line):
            caller, callee = (re.search(r"`(\w+\.py)::([\w.]+)`", cell) for cell in line.split("|")[1:3])
            yield caller and caller.groups(), callee.groups()


@pytest.fixture(scope="module")
def calls() -> tuple[list[Call], list[tuple[str, Call]]]:
    """Every function of minidiff that a generation runs, and every call from one file into another, by the first."""
    pipe = StableDiffusionPipeline.from_pretrained(embedded_checkpoint())
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    run, between, home = {}, {}, f"{Path(minidiff.__file__).parent}/"

    def ours(frame: FrameType | None) -> FrameType | None:
        while frame is not None and not frame.f_code.co_filename.startswith(home):
            frame = frame.f_back
        return frame

    def look(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame is ours(frame):
            name, owner = frame.f_code.co_name, frame.f_locals.get("self")
            kinds = [kind for kind in type(owner).__mro__ if name in vars(kind)] if owner is not None else []
            of = next((k for k in kinds if sys.modules[k.__module__].__file__ == frame.f_code.co_filename), None)
            call = (Path(frame.f_code.co_filename).name, f"{of.__name__}.{name}" if of else name)
            run.setdefault(call)
            before = ours(frame.f_back)
            while (
                before is not None and before.f_code.co_name == "__call__" and "recompute" in before.f_code.co_filename
            ):
                before = ours(before.f_back)
            file = Path(before.f_code.co_filename).name if before else ""
            if file != call[0]:
                between.setdefault((file, call))

    sys.setprofile(look)
    try:
        pipe("red apple", num_inference_steps=3, seed=0)
    finally:
        sys.setprofile(None)
    return list(run), list(between)


def test_the_tour_is_short() -> None:
    files = {file for row in rows() for file, _ in filter(None, row)}
    moves = 2 * sum(caller is not None for caller, _ in rows())
    assert len(files) == 10
    assert moves == 48  # as the page says


def test_the_tour_is_the_way(calls: tuple[list[Call], list[tuple[str, Call]]]) -> None:
    run, between = calls
    order = [run.index(callee) for _, callee in rows()]
    assert order == sorted(order)
    for caller, callee in rows():
        assert caller is None or (caller in run and (caller[0], callee) in between), (caller, callee)


def test_nothing_leads_past_it(calls: tuple[list[Call], list[tuple[str, Call]]]) -> None:
    _, between = calls
    files = {file for row in rows() for file, _ in filter(None, row)}
    told = {(caller[0], callee) for caller, callee in rows() if caller is not None}
    others = {(file, call) for file, call in between if file in files and call[0] in files} - told
    assert {call[1] for _, call in others} == PASSED_BY
