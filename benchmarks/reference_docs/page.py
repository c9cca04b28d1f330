"""The code blocks of one page, run in order in one namespace, as a reader does who pastes them one after the other."""

import contextlib
import io
import os
import re
import signal
import sys
import textwrap
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

LIMIT = 90  # seconds for one block
FENCED = re.compile(r"^[ \t]*```(?:py|python|Python)\b[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
PICTURE = re.compile(r"""(["'])https?://[^"']*?(mask)?[^"'/]*\.(?:png|jpe?g|webp)[^"']*\1""")
CHANGES = (  # what a small checkpoint on a machine without a GPU asks for, the same for both sides
    (re.compile(r"""(["'])(?:cuda(?::\d)?|mps)\1"""), '"cpu"'),
    (re.compile(r"torch\.(?:float16|half)\b"), "torch.float32"),
    (re.compile(r"""\bmode=["'](?:reduce-overhead|max-autotune|default)["'],?"""), ""),
    (re.compile(r"\b(height|width|resolution)(\s*=\s*)\d+"), r"\1\g<2>64"),
    (re.compile(r"[\w.]+\.enable_(?:model|sequential)_cpu_offload\(.*\)"), "pass"),
    (re.compile(r"[\w.]+\.enable_xformers_memory_efficient_attention\(.*\)"), "pass"),
    (re.compile(r"resize\(\(\s*\d+\s*,\s*\d+\s*\)"), "resize((32, 32)"),
)


def blocks(text: str) -> list[str]:
    """Return the Python code blocks of a page or of a module's docstrings, without prompts and printed output."""
    return [_source(textwrap.dedent(found)) for found in FENCED.findall(text)]


def _source(block: str) -> str:
    lines = block.splitlines()
    if not any(line.startswith(">>>") for line in lines):
        return block
    return "\n".join(line[4:] for line in lines if line.startswith((">>>", "...")))


def adapt(source: str, pictures: Path) -> str:
    """Return the code of a block with the device, the sizes and the addresses of pictures changed to what is here."""
    for pattern, text in CHANGES:
        source = pattern.sub(text, source)
    return PICTURE.sub(lambda found: repr(str(pictures / ("mask.png" if "mask" in found[0] else "image.png"))), source)


def run(sources: list[str], folder: Path, pictures: Path, *, migrated: bool, answer: Connection) -> None:
    """Run the blocks of a page in ``folder`` and send the outcome of each: "ran" or its error. Called in a process
    of its own."""
    from benchmarks.reference_tests import stand_in

    if migrated:
        stand_in.migrate("page")
    os.chdir(folder)
    _answer_requests()
    torch.compile = partial(torch.compile, backend="eager")
    page = ModuleType("page")  # classes of the page are looked up in it, by dataclasses for one
    sys.modules["page"] = page
    signal.signal(signal.SIGALRM, _too_long)
    for source in sources:
        signal.alarm(LIMIT)
        answer.send(_outcome(adapt(source, pictures), page.__dict__))
        signal.alarm(0)


def _outcome(source: str, names: dict[str, Any]) -> str:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            exec(compile(source, "<page>", "exec"), names)
        except (Exception, SystemExit) as error:
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    return "ran"


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"longer than {LIMIT} s")


def _answer_requests() -> None:
    """Let ``requests.get`` answer for a local picture, as pages write that open what they download."""
    import requests

    def get(path: str, **_: Any) -> requests.Response:
        answer = requests.Response()
        answer.status_code, answer.raw = 200, io.BytesIO(Path(path).read_bytes())
        return answer

    requests.get = get
