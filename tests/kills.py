"""End a process at a chosen change of the disk, as ``kill -9`` would: no ``finally`` runs, no buffer is written."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

CHANGES = {"open", "os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "ctypes.dlsym"}


def changes(work: Callable[[], object], folder: Path) -> list[str]:
    """Return the changes of what is in ``folder`` that the work makes, done in a fork.

    ``ctypes.dlsym`` stands for the exchange of two folders, which is looked up each time; names of what is removed from
    a folder come without it.
    """
    reader, writer = os.pipe()
    _forked(work, folder, lambda k, event: os.write(writer, f"{event}\n".encode()))
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        return file.read().decode().split()


def kill_at(k: int, work: Callable[[], object], folder: Path) -> None:
    """Do ``work`` in a fork that ends before its change number ``k``, from 0."""
    if _forked(work, folder, lambda now, event: os._exit(9) if now == k else None) != 9:
        raise AssertionError(f"the work ended before its change {k}")


def _forked(work: Callable[[], object], folder: Path, at: Callable[[int, str], object]) -> int:
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            if event in CHANGES and (str(arguments[0])[0] != "/" or str(folder) in str(arguments[0])):
                count += 1
                at(count - 1, event)

        sys.addaudithook(hook)
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, 9):
        raise AssertionError(f"the work failed by itself with {code}")
    return code
