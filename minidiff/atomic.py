"""Write files and folders whole or not at all.

Whatever is written is made in a folder of its own beside its place, ``.minidiff-RANDOM.tmp``, and gets its name when it
is complete and on the disk. A process that is killed leaves that folder behind; the next write to the same place
removes it, and knows it from one in use by a lock. Nothing is written through a symbolic link, and nothing is replaced
that no writer of ours makes: a device, a pipe, a socket, a link.
"""

import ctypes
import errno
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

from minidiff.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, so nothing that was left behind is removed
    fcntl = None  # type: ignore[assignment]

_PREFIX, _SUFFIX = ".minidiff-", ".tmp"
_YOUNG = 60  # seconds in which a folder may not be locked yet
MOST_ENTRIES = 1000  # of a folder that is exchanged as a whole
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


def kind_of(path: Path) -> str | None:
    """Say what is at ``path`` itself, links not followed: "a file", "a folder", "a device", ...; None for nothing."""
    try:
        return _KINDS.get(stat.S_IFMT(path.lstat().st_mode), "a file")
    except FileNotFoundError:
        return None


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file under the name that it is given, then move it to ``path``.

    Raises:
        FileExistsError: if something else than a regular file has the name.
        OSError: if the disk is full; what was at ``path`` is still there.
    """
    _refuse_other_than_files(path)
    with workplace(path) as place:
        made = place / path.name
        made.touch()
        mode = made.stat().st_mode  # what the user's umask asks for; safetensors makes files that only the owner reads
        write(made)
        made.chmod(mode)
        _sync(made)
        _refuse_other_than_files(path)  # it may have become something else since
        os.replace(made, path)
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 as it is: a line ends as it does in ``text``."""
    write_file(path, lambda made: made.write_bytes(text.encode()))


@contextmanager
def whole_folder(target: Path, head: str) -> Iterator[Path]:
    """Yield a folder to write into, which takes the place of ``target`` when the block ends without an exception.

    Files of ``target`` that are not written stay: the folder begins with hard links to them. Then the two are
    exchanged, so that nobody sees a part of the old beside a part of the new.

    Where that cannot be (the current folder, a mount point, very many files in it), the block writes into ``target``:
    then ``head``, the file that is read first, is removed before anything else, and the block has to write it last. A
    kill between leaves a folder that does not load, not one that is half old and half new.

    Raises:
        FileExistsError: if ``target`` is no folder, or has something else in it than files and folders, such as the
            links in a snapshot of the Hub's cache.
    """
    target = target.resolve()
    if kind_of(target) not in ("a folder", None):
        raise FileExistsError(f"{target} is {kind_of(target)}; expected a folder, or nothing")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not _can_be_exchanged(target):
        target.mkdir(exist_ok=True)
        (target / head).unlink(missing_ok=True)
        yield target
        return
    with workplace(target) as place:
        made = place / target.name
        made.mkdir()
        linked = _link_all(target, made)
        yield made
        _sync(made)
        put_in_place(made, target)
        _move_arrivals(made, target, linked)  # ``made`` is the old one now, or gone
    _sync(target.parent)


def put_in_place(made: Path, target: Path) -> None:
    """Give a file or folder its name; a folder that had it gets the other's, where the system can at the same moment.

    Raises:
        FileExistsError: if something of another kind has the name.
    """
    if kind_of(target) is None or kind_of(target) == kind_of(made) == "a file":
        os.replace(made, target)
        return
    if kind_of(target) != "a folder" or kind_of(made) != "a folder":
        raise FileExistsError(f"{target} has become {kind_of(target)}; it was not replaced")
    try:
        _exchange(made, target)
    except OSError:  # for a moment nothing has the name; the old folder is beside it then
        aside = target.with_name(f"{target.name}.old-{uuid4().hex}")
        os.rename(target, aside)
        os.rename(made, target)
        os.rename(aside, made)


def _exchange(one: Path, other: Path) -> None:
    """Let two folders change names at one moment. Raises ``OSError`` where the system cannot."""
    names = os.fsencode(one), os.fsencode(other)
    try:
        C = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            result = C.renamex_np(*names, 2)  # RENAME_SWAP
        else:
            result = C.renameat2(-100, names[0], -100, names[1], 2)  # AT_FDCWD, RENAME_EXCHANGE
    except (AttributeError, TypeError) as error:  # a library without it, and Windows
        raise OSError(errno.ENOSYS, "this system cannot exchange two folders") from error
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))


@contextmanager
def workplace(target: Path) -> Iterator[Path]:
    """Yield a new folder beside ``target``, on the same disk, which is removed at the end with what is in it."""
    _remove_stale(target.parent)
    place = target.with_name(f"{_PREFIX}{uuid4().hex}{_SUFFIX}")
    place.mkdir()
    lock = _lock(place)
    try:
        yield place
    except Exception as error:
        if not _is_full(error):
            raise
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        message = f"the disk of {target.parent} is full after {size:,} bytes of {target.name}; {target} is as it was"
        raise OSError(errno.ENOSPC, message) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
        if lock is not None:
            os.close(lock)


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """Watch that ``path`` stays the file that it is while it and what belongs to it are read.

    Raises:
        CheckpointError: if it is another one at the end, or was when something else failed: a save came between.
    """
    before = _identity(path)
    try:
        yield
    except Exception as error:
        if _identity(path) == before:
            raise
        raise CheckpointError(_REPLACED.format(path)) from error
    if _identity(path) != before:
        raise CheckpointError(_REPLACED.format(path))


_REPLACED = "{} was replaced while it and what lies beside it were read, which may be of two saves: load again"


def _identity(path: Path) -> tuple[int, ...]:
    """Return what tells one file from the next of its name."""
    with suppress(FileNotFoundError):
        status = path.stat()
        return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
    return ()


def _refuse_other_than_files(path: Path) -> None:
    kind = kind_of(path)
    if kind not in ("a file", None):
        where = f" to {os.readlink(path)}" if kind == "a symbolic link" else ""
        raise FileExistsError(f"{path} is {kind}{where}; only a regular file is replaced: give another name")


def _remove_stale(folder: Path) -> None:
    """Remove what a killed process left in ``folder``; a lock ends with its process."""
    for place in folder.glob(f"{_PREFIX}*{_SUFFIX}") if fcntl else ():
        with suppress(OSError):  # somebody else removed it, or has the lock
            if time.time() - place.stat().st_mtime > _YOUNG and (lock := _lock(place)) is not None:
                shutil.rmtree(place)
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """Lock a folder until the returned handle is closed. Raises ``BlockingIOError`` if another has it."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    with suppress(PermissionError):  # Windows does not open folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _is_full(error: Exception) -> bool:
    """Say whether a disk or a quota is full; safetensors says it in the text of an error of its own."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in numbers or any(f"(os error {number})" in str(error) for number in numbers)


def _can_be_exchanged(target: Path) -> bool:
    entries = [target, *islice(target.rglob("*"), MOST_ENTRIES)] if target.exists() else []
    for path in entries:
        if kind_of(path) != "a folder":
            _refuse_other_than_files(path)
    busy = target in (Path.cwd(), *Path.cwd().parents) or any(path.is_mount() for path in entries)
    return not busy and len(entries) <= MOST_ENTRIES and os.access(target.parent, os.W_OK)


def _link_all(source: Path, target: Path) -> set[Path]:
    """Make the folders and files of ``source``, if there is one, appear in ``target`` too; return their names."""
    names = {path.relative_to(source) for path in source.rglob("*") if _PREFIX not in str(path.relative_to(source))}
    for name in sorted(names):
        if (source / name).is_dir():
            (target / name).mkdir()
        else:
            try:
                os.link(source / name, target / name)
            except OSError:  # a file system without hard links
                shutil.copy2(source / name, target / name)
    return names


def _move_arrivals(old: Path, target: Path, known: set[Path]) -> None:
    """Keep what others have put into the old folder since its files were linked."""
    for name in sorted({path.relative_to(old) for path in old.rglob("*")} - known):
        if kind_of(old / name) != "a folder" and kind_of(target / name) is None:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.rename(old / name, target / name)
