"""Write files and folders whole or not at all.

Whatever is written is made in a folder of its own beside its place, ``.minidiff-RANDOM.tmp``, and gets its name when it
is complete and on the disk. A process that is killed leaves that folder behind; a write to the same place, an hour
later, removes it, and knows it from one in use by a lock and by its age: locks are not seen from another machine.
No file is written through a symbolic link, and nothing is replaced that no writer of ours makes: a device, a pipe, a
socket, a link. What is replaced keeps its mode and, as far as one may give them, its owner and group.
"""

import ctypes
import errno
import math
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

from minidiff.errors import CheckpointError
from minidiff.locks import alone, is_in_use, lock, unlock

_PREFIX, _SUFFIX = ".minidiff-", ".tmp"
_YOUNG = 3600  # seconds without a change in which a folder may be that of a process on another machine
_swept: dict[Path, float] = {}  # folders that were searched for what was left behind, and when
HEADS = ("model_index.json", "config.json", "vocab.json")  # of a pipeline, a network, a tokenizer: what is read first
MOST_ENTRIES = 5000  # of a folder that is exchanged as a whole: it takes about a second
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
    before = path.stat() if path.exists() else None
    with nullcontext(path.parent) if _is_hidden(path) else workplace(path) as place:
        made = place / path.name
        made.unlink(missing_ok=True)  # in a hidden folder it may be another name of the file that is seen
        made.touch()
        status = before or made.stat()  # what the umask asks for; safetensors makes files that only the owner reads
        write(made)
        _sync(made)
        _give(made, status)
        if made != path:
            _refuse_other_than_files(path)  # it may have become something else since
            os.replace(made, path)
            _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 as it is: a line ends as it does in ``text``."""
    write_file(path, lambda made: made.write_bytes(text.encode()))


@contextmanager
def whole_folder(target: Path, head: str) -> Iterator[Path]:
    """Yield a folder to write into, which takes the place of ``target`` when the block ends without an exception.

    Whatever is in ``target`` and not written stays: the folder begins with hard links to it. Then the two are
    exchanged, so that nobody sees a part of the old beside a part of the new. Others who save to ``target`` wait.

    Where that cannot be (the current folder, a mount point, very many files in it, a disk without hard links), the
    block writes into ``target``: then ``head``, the file that is read first, is removed before anything else, and the
    block has to write it last. A kill between leaves a folder that does not load, not one that is half old and half
    new. In a folder that is being made so, ``target`` is only a part of what is made.

    Raises:
        FileExistsError: if ``target`` is no folder; ``write_file`` raises it for what is no file in it, such as the
            links in a snapshot of the Hub's cache.
    """
    hidden = _is_hidden(target)
    target = target if hidden else target.resolve()
    if kind_of(target) not in ("a folder", None):
        raise FileExistsError(f"{_seen(target)} is {kind_of(target)}; expected a folder, or nothing")
    if hidden:
        target.mkdir(parents=True, exist_ok=True)
        yield target
        return
    with alone(target), _linked(target) as (made, known):
        if made is None:
            _refuse_other_than_files(target / head)
            (target / head).unlink(missing_ok=True)
            yield target
            return
        before = target.stat()
        yield made
        put_in_place(made, target, known)
        if kind_of(made) is not None and os.path.samestat(made.stat(), before):  # it is the old one, not another save
            _move_arrivals(made, target, known)


def put_in_place(made: Path, target: Path, known: Iterable[Path] = ()) -> None:
    """Give a file or folder its name; a folder that had it gets the other's, where the system can at the same moment.

    Where it cannot, there is no folder for a moment, the old one is beside it. Where not even that can be, the files
    are moved one by one, and those ``known`` that are no more are removed. Meanwhile the files that are read first are
    not there (``HEADS``), so that nothing in the folder loads.

    Raises:
        FileExistsError: if something of another kind has the name.
    """
    kinds = kind_of(made), kind_of(target)
    if kinds[1] is not None and kinds not in (("a file", "a file"), ("a folder", "a folder")):
        raise FileExistsError(f"{target} has become {kinds[1]}; it was not replaced")
    if kinds[0] == "a folder":
        for folder in (made, *_entries(made)):
            if kind_of(folder) == "a folder":
                _sync(folder)
    if kinds[1] != "a folder":
        os.replace(made, target)
    else:
        try:
            _exchange(made, target)
        except OSError:
            _replace(made, target, set(known))
    _sync(target.parent)


def _replace(made: Path, target: Path, known: set[Path]) -> None:
    aside = target.with_name(f"{target.name}.old-{uuid4().hex}")
    try:
        os.rename(target, aside)
    except OSError:
        _move_into(made, target, known)
        return
    try:
        os.rename(made, target)
    except OSError:
        os.rename(aside, target)
        raise
    os.rename(aside, made)


def _move_into(made: Path, target: Path, known: set[Path]) -> None:
    new = {path.relative_to(made) for path in _entries(made)}
    heads = {name for name in known | new if name.name in HEADS}
    for name in sorted(known, key=lambda name: (name not in heads, -len(name.parts))):
        if name in heads or name not in new:
            with suppress(OSError):  # it may be gone already, and a folder may not be empty
                (target / name).rmdir() if kind_of(target / name) == "a folder" else (target / name).unlink()
    for name in [*sorted(new - heads), *sorted(new & heads, key=lambda name: -len(name.parts))]:
        if kind_of(made / name) == "a folder":
            (target / name).mkdir(exist_ok=True)
        else:
            os.replace(made / name, target / name)
    _sync(target)


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
    with suppress(OSError):  # a folder may be written to and not read
        _remove_stale(target.parent)
    place = target.with_name(f"{_PREFIX}{uuid4().hex}{_SUFFIX}")
    try:
        place.mkdir()
    except OSError as error:
        message = f"{target.name} cannot be written there: {error.strerror}"
        raise OSError(error.errno, message, str(target.parent)) from error
    held = lock(place)
    try:
        yield place
    except Exception as error:
        if not _is_full(error):
            raise
        found = [path.lstat() for path in _entries(place)]
        size = sum(status.st_size for status in found if stat.S_ISREG(status.st_mode) and status.st_nlink == 1)
        message = f"the disk of {target.parent} is full after {size:,} bytes of {target.name}; {target} is as it was"
        raise OSError(errno.ENOSPC, message) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
        unlock(held)


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
        raise FileExistsError(f"{_seen(path)} is {kind}{where}; only a regular file is replaced: give another name")


def _is_hidden(path: Path) -> bool:
    """Say whether a path is in a folder that is being made."""
    return _seen(path) != path


def _seen(path: Path) -> Path:
    """Return the path that something in a folder that is being made will have."""
    return Path(*(part for part in path.parts if not _is_workplace(part)))


def _is_workplace(name: str) -> bool:
    return name.startswith(_PREFIX) and name.endswith(_SUFFIX)


def _remove_stale(folder: Path) -> None:
    """Remove what a killed process left in ``folder``; a lock ends with its process."""
    now, folder = time.monotonic(), folder.absolute()
    if now - _swept.get(folder, -math.inf) < _YOUNG:  # it may hold 100,000 pictures, each written by itself
        return
    _swept[folder] = now
    for place in (folder / name for name in os.listdir(folder) if _is_workplace(name)):
        with suppress(OSError):  # somebody else removed it, or has the lock
            changed = max(path.lstat().st_mtime for path in (place, *_entries(place)))
            if time.time() - changed > _YOUNG and (held := lock(place)) is not None:
                shutil.rmtree(place)
                unlock(held)


def _give(made: Path, status: os.stat_result) -> None:
    """Give a file or folder the mode of another and, as far as one may, its owner and group."""
    for owner in ((status.st_uid, -1), (-1, status.st_gid)) if hasattr(os, "chown") else ():
        with suppress(OSError):
            os.chown(made, *owner)
    made.chmod(stat.S_IMODE(status.st_mode))


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    is_folder = path.is_dir()
    with suppress(OSError) if is_folder else nullcontext():  # not every system opens folders, or syncs them
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _is_full(error: Exception) -> bool:
    """Say whether a disk or a quota is full; safetensors says it in the text of an error of its own."""
    numbers = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in numbers or any(f"(os error {number})" in str(error) for number in numbers)


def _entries(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder and below, folders before their content, but not what is made there at the moment.

    Raises ``OSError`` for a folder that it cannot read.
    """

    def stop(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # it was removed meanwhile
            raise error

    for where, folders, files in os.walk(folder, onerror=stop):  # does not follow links
        yield from (Path(where, name) for name in (*folders, *files))
        folders[:] = (name for name in folders if not _is_workplace(name))


def _exchangeable(target: Path) -> list[Path] | None:
    """Return the names of what is in a folder, None if the folder cannot be exchanged."""
    try:
        entries = list(islice(_entries(target), MOST_ENTRIES + 1))
    except PermissionError:
        return None
    busy = set(_mount_points())
    with suppress(FileNotFoundError):  # it was removed
        busy |= {Path.cwd(), *Path.cwd().parents}
    if target in busy or any(path in busy or path.is_mount() for path in (target, *entries)):
        return None
    if len(entries) > MOST_ENTRIES or not os.access(target.parent, os.W_OK):
        return None
    return [path.relative_to(target) for path in entries if not _is_hidden(path)]


@contextmanager
def _linked(target: Path) -> Iterator[tuple[Path | None, list[Path]]]:
    """Yield a folder that begins with hard links to what is in ``target``, and their names; None if that cannot be."""
    known = _exchangeable(target)
    with nullcontext() if known is None else workplace(target) as place:
        made = None if place is None else place / target.name
        yield (made, known) if made and _link_all(known, target, made) else (None, [])


def _mount_points() -> Iterator[Path]:
    """Yield where something is mounted, on Linux: of a folder on the same disk ``is_mount`` does not know it."""
    with suppress(OSError), open("/proc/self/mountinfo", encoding="unicode_escape") as file:
        yield from (Path(line.split(" ")[4]) for line in file)


def _link_all(names: Iterable[Path], source: Path, target: Path) -> bool:
    """Make ``target``, and in it what has these names in ``source``. Return whether the disk can."""
    target.mkdir()
    _give(target, source.stat())
    for name in names:
        try:
            _link(source / name, target / name)
        except FileNotFoundError:  # it was removed meanwhile
            continue
        except OSError:
            return False
    return True


def _link(source: Path, target: Path) -> None:
    kind = kind_of(source)
    if kind == "a folder":
        target.mkdir()
        _give(target, source.stat())
    elif kind == "a symbolic link":
        target.symlink_to(os.readlink(source))
    else:
        os.link(source, target)


def _move_arrivals(old: Path, target: Path, known: Iterable[Path]) -> None:
    """Keep what others have put into the old folder since its files were linked."""
    for name in sorted({path.relative_to(old) for path in _entries(old)} - set(known)):
        if _is_workplace(name.name) and not is_in_use(old / name):
            continue
        if kind_of(old / name) is not None and kind_of(target / name) is None:  # not moved yet
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.rename(old / name, target / name)
