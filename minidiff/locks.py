"""Locks on folders, by which savers wait for each other, on one machine and where the system has them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, so savers do not wait, and nothing that was left behind is removed
    fcntl = None  # type: ignore[assignment]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make a folder, if there is none, and let others of this machine who save to it wait for the end of the block."""
    existed = folder.is_dir()
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        held = None
        with suppress(FileNotFoundError):
            held = lock(folder, wait=True)
            if held is None or os.path.samestat(os.fstat(held), folder.stat()):
                break
        unlock(held)  # whoever had it has exchanged the folder for another
    try:
        yield
    finally:
        if not existed:
            with suppress(OSError):  # it is not empty: all went well
                folder.rmdir()
        unlock(held)


def lock(folder: Path, wait: bool = False) -> int | None:
    """Lock a folder until the returned handle is unlocked; None where there are no locks.

    Raises ``BlockingIOError`` if another has it and is not waited for.
    """
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException as error:
        os.close(handle)
        if not isinstance(error, OSError) or isinstance(error, BlockingIOError):
            raise
        return None  # a file system that has none
    return handle


def unlock(held: int | None) -> None:
    """Let go of what ``lock`` returned."""
    if held is not None:
        fcntl.flock(held, fcntl.LOCK_UN)  # processes that were forked meanwhile have the handle too
        os.close(held)


def is_in_use(place: Path) -> bool:
    """Say whether a folder is locked, or nobody knows."""
    try:
        held = lock(place)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    unlock(held)
    return held is None
