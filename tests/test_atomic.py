"""Files and folders are whole or not there: kills at each change of the disk, links, devices, a full disk."""

import errno
import os
import random
import shutil
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import minidiff
from minidiff import atomic, locks
from minidiff.checkpoints import load
from minidiff.checkpoints.hub import Repo
from minidiff.checkpoints.tools.convert import convert
from minidiff.errors import CheckpointError
from minidiff.images import tensors as images
from minidiff.pipelines import base
from minidiff.text import tokenizer_files
from tests.kills import changes, kill_at
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> minidiff.StableDiffusionPipeline:
    folder = save_tiny(tmp_path_factory.mktemp("atomic") / "tiny")
    return minidiff.StableDiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> minidiff.StableDiffusionPipeline:
    """Another version of every part of ``old``."""
    folder = save_tiny(tmp_path_factory.mktemp("atomic") / "tiny")
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(folder)
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        for parameter in network.parameters():
            parameter.data = parameter.data + 1
    pipe.scheduler = minidiff.PNDMScheduler.from_config(pipe.scheduler.config, beta_end=0.02)
    pipe.tokenizer.model_max_length = 60
    return pipe


def version_of(pipe: minidiff.StableDiffusionPipeline, new: minidiff.StableDiffusionPipeline) -> set[bool]:
    """Return {True} if every part is that of ``new``, {False} if none is."""
    networks = [(pipe.unet, new.unet), (pipe.vae, new.vae), (pipe.text_encoder, new.text_encoder)]
    same = {
        torch.equal(a, b) for one, other in networks for a, b in zip(one.parameters(), other.parameters(), strict=True)
    }
    same.add(pipe.scheduler.config.beta_end == new.scheduler.config.beta_end)
    same.add(pipe.tokenizer.model_max_length == 60)
    return same


def strays(folder: Path) -> list[Path]:
    return list(folder.glob(".minidiff-*"))


def moments(work: Callable[[], object], folder: Path, count: int) -> list[int]:
    """Return some changes of the disk that ``work`` makes: at random, the last, and around the exchange."""
    all_ = changes(work, folder)
    exchange = len(all_) - 1 - all_[::-1].index("ctypes.dlsym")
    near = {exchange, exchange + 1, len(all_) - 1}
    return sorted({*random.Random(0).sample(range(len(all_)), min(count, len(all_))), *near})


@pytest.mark.parametrize(("shards", "count"), [(None, 14), ("20KB", 3)])
def test_killed_pipeline_saves(
    old: minidiff.StableDiffusionPipeline,
    new: minidiff.StableDiffusionPipeline,
    tmp_path: Path,
    shards: str | None,
    count: int,
) -> None:
    """A kill at any change of the disk leaves the old pipeline or the new one, never parts of both."""
    folder, found = tmp_path / "pipe", []
    old.save_pretrained(folder, max_shard_size=shards)
    for k in moments(lambda: old.save_pretrained(folder, max_shard_size=shards), tmp_path, count):
        kill_at(k, lambda: new.save_pretrained(folder, max_shard_size=shards), tmp_path)
        found.append(version_of(minidiff.StableDiffusionPipeline.from_pretrained(folder), new))
        for path in strays(tmp_path):
            shutil.rmtree(path)
        if found[-1] != {False}:
            old.save_pretrained(folder, max_shard_size=shards)
    assert all(len(same) == 1 for same in found)
    assert {False} in found and {True} in found  # killed before the exchange, and after it
    new.save_pretrained(folder, max_shard_size=shards)
    assert strays(tmp_path) == [] and version_of(minidiff.StableDiffusionPipeline.from_pretrained(folder), new) == {
        True
    }


@pytest.mark.parametrize("part", ["unet", "tokenizer"])
def test_killed_saves_of_a_part(
    old: minidiff.StableDiffusionPipeline, new: minidiff.StableDiffusionPipeline, tmp_path: Path, part: str
) -> None:
    folder, found = tmp_path / "pipe", []
    old.save_pretrained(folder)
    for k in moments(lambda: getattr(old, part).save_pretrained(folder / part), tmp_path, 3):
        kill_at(k, lambda: getattr(new, part).save_pretrained(folder / part), tmp_path)
        found.append(version_of(minidiff.StableDiffusionPipeline.from_pretrained(folder), new))
    assert {False} in found  # killed at the beginning; whole at every moment, or it would not load


@pytest.mark.parametrize("kind", ["picture", "scheduler"])
def test_killed_writes_of_a_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("picture.png" if kind == "picture" else "scheduler_config.json")

    def write(level: int) -> None:
        if kind == "picture":
            images.save_png(Image.new("L", (8, 8), level), path)
        else:
            minidiff.PNDMScheduler(num_train_timesteps=level).save_pretrained(tmp_path)

    contents = []
    for level in (20, 10):
        write(level)
        contents.append(path.read_bytes())
    found = []
    for k in range(len(changes(lambda: write(10), tmp_path))):
        kill_at(k, lambda: write(20), tmp_path)
        found.append(contents.index(path.read_bytes()))
        write(10)
    assert found == sorted(found, reverse=True) and set(found) == {0, 1}  # first the old, then the new, nothing else


def test_what_a_killed_process_left_is_removed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    monkeypatch.setattr(atomic, "_swept", {})
    kill_at(4, lambda: atomic.write_text(path, "new"), tmp_path)
    (left,) = strays(tmp_path)
    (inside,) = left.iterdir()
    os.utime(left, (0, 0))
    atomic.write_text(path, "young")
    assert left.exists()  # something in it was just written: by another machine, whose locks are not seen
    os.utime(inside, (0, 0))
    atomic.write_text(path, "searched")
    assert left.exists()  # not at each write: there may be many files
    with atomic.workplace(path) as place:
        os.utime(place, (0, 0))
        atomic._swept.clear()
        atomic.write_text(path, "old")
        assert strays(tmp_path) == [place]  # in use, however old
    assert strays(tmp_path) == [] and path.read_text() == "old"


def test_other_files_of_a_folder_stay(old: minidiff.StableDiffusionPipeline, tmp_path: Path) -> None:
    """Those that were there, and those that come while the new ones are written."""
    (tmp_path / "unet" / "notes").mkdir(parents=True)
    (tmp_path / "unet" / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "unet" / "config.json").write_text("{}")
    with atomic.whole_folder(tmp_path / "unet", "config.json") as place:
        atomic.write_text(place / "config.json", "new")
        (tmp_path / "unet" / "notes" / "late.txt").write_text("late")
        assert (tmp_path / "unet" / "config.json").read_text() == "{}"
    read = {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert read == {"mine.txt": "mine", "config.json": "new", "late.txt": "late"}


def test_links_that_are_not_written_stay(old: minidiff.StableDiffusionPipeline, tmp_path: Path) -> None:
    """A folder of training holds such as ``wandb/latest-run``: the last save was refused."""
    (tmp_path / "out" / "wandb").mkdir(parents=True)
    (tmp_path / "out" / "wandb" / "latest-run").symlink_to("run-1")
    os.mkfifo(tmp_path / "out" / "pipe")
    old.save_pretrained(tmp_path / "out")
    old.save_pretrained(tmp_path / "out")
    assert os.readlink(tmp_path / "out" / "wandb" / "latest-run") == "run-1"
    assert atomic.kind_of(tmp_path / "out" / "pipe") == "a pipe"


def test_a_folder_that_is_a_link_is_not_written_into(old: minidiff.StableDiffusionPipeline, tmp_path: Path) -> None:
    """Such as the autoencoder that another pipeline has too."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "vae").symlink_to(tmp_path / "shared")
    with pytest.raises(FileExistsError, match=r"/pipe/vae is a symbolic link; expected a folder"):
        old.save_pretrained(tmp_path / "pipe")
    assert list((tmp_path / "shared").iterdir()) == [] and [p.name for p in (tmp_path / "pipe").iterdir()] == ["vae"]


@pytest.mark.parametrize("kind", ["a file", "a folder"])
def test_what_is_replaced_keeps_its_mode_and_owner(tmp_path: Path, kind: str) -> None:
    """A private file became everybody's, and the folder of a group its saver's alone."""
    path = tmp_path / "x"
    path.mkdir() if kind == "a folder" else path.touch()
    path.chmod(0o2770 if kind == "a folder" else 0o600)
    if os.geteuid() == 0:
        os.chown(path, 1234, 1235)
    before = path.stat()
    if kind == "a folder":
        with atomic.whole_folder(path, "config.json") as place:
            atomic.write_text(place / "config.json", "new")
    else:
        atomic.write_text(path, "new")
    after = path.stat()
    assert after.st_ino != before.st_ino
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_a_part_that_is_being_written_comes_along(tmp_path: Path) -> None:
    """Its writer has the lock; where nobody has, it was left behind."""
    folder = tmp_path / "pipe"
    folder.mkdir()
    with atomic.workplace(folder / "unet") as used:
        (used / "unet").mkdir()
        (folder / ".minidiff-left.tmp").mkdir()
        with atomic.whole_folder(folder, "model_index.json") as place:
            atomic.write_text(place / "model_index.json", "new")
        assert (used / "unet").is_dir()
        assert {path.name for path in folder.iterdir()} == {"model_index.json", used.name}


@pytest.mark.parametrize("with_locks", [True, False])
def test_two_savers_of_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_locks: bool) -> None:
    """They wait for each other, and where there are no locks the last one is whole.

    What the first had written came back as an arrival, and was loaded instead of what the second wrote.
    """
    begun = threading.Event()
    if not with_locks:
        monkeypatch.setattr(locks, "fcntl", None)

    def save(index: bool) -> None:
        with atomic.whole_folder(tmp_path / "unet", "config.json") as place:
            (begun.set if index else begun.wait)()
            if not index:
                (place / "index").unlink(missing_ok=not with_locks)
            time.sleep(0.1 if index else 0.2)
            for name in ["index"] * index + ["config.json"]:
                atomic.write_text(place / name, str(index))

    first, second = (threading.Thread(target=save, args=(index,)) for index in (True, False))
    first.start()
    begun.wait()
    second.start()
    first.join()
    second.join()
    assert [(p.name, p.read_text()) for p in (tmp_path / "unet").iterdir()] == [("config.json", "False")]


def test_a_fork_does_not_keep_a_lock(tmp_path: Path) -> None:
    with atomic.whole_folder(tmp_path / "unet", "config.json") as place:
        atomic.write_text(place / "config.json", "new")
        if (child := os.fork()) == 0:
            time.sleep(60)
            os._exit(0)
    held = locks.lock(tmp_path / "unet")
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert held is not None
    os.close(held)


@pytest.mark.parametrize("without", ["fcntl", "flock"])
def test_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: str) -> None:
    """As on Windows, and on some file systems of clusters, where nothing could be saved."""

    def missing(handle: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    if without == "fcntl":
        monkeypatch.setattr(locks, "fcntl", None)
    else:
        monkeypatch.setattr(locks.fcntl, "flock", missing)
    for text in ("old", "new"):
        with atomic.whole_folder(tmp_path / "unet", "config.json") as place:
            atomic.write_text(place / "config.json", text)
    assert (tmp_path / "unet" / "config.json").read_text() == "new" and strays(tmp_path) == []


WHYS = ["the current folder", "many files", "beside it is not ours", "no hard links", "a folder that cannot be read"]


@pytest.mark.parametrize("why", [*WHYS, "a mount point"])
def test_a_folder_that_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """It is written into, and until it is whole it has not the file that is read first."""
    target = tmp_path / "pipe"
    target.mkdir()
    (target / "model_index.json").write_text("old")
    if why == "the current folder":
        monkeypatch.chdir(target)
    elif why == "many files":
        monkeypatch.setattr(atomic, "MOST_ENTRIES", 0)
    elif why == "beside it is not ours":
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    elif why == "no hard links":
        monkeypatch.setattr(os, "link", not_permitted)
    elif why == "a folder that cannot be read":
        monkeypatch.setattr(atomic, "_entries", not_permitted)
    else:
        monkeypatch.setattr(atomic, "_mount_points", lambda: [target])
    before = target.stat().st_ino
    with atomic.whole_folder(target, "model_index.json") as place:
        assert place == target and not (target / "model_index.json").exists()
        atomic.write_text(place / "model_index.json", "new")
    assert target.stat().st_ino == before and (target / "model_index.json").read_text() == "new"


def not_permitted(*arguments: object) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


def test_without_an_exchange_by_the_system(
    old: minidiff.StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over NFS: the folders change names one after the other, and if the second cannot, the first gets its back."""
    monkeypatch.setattr(atomic, "_exchange", not_permitted)
    folder, rename = tmp_path / "unet", os.rename
    old.unet.save_pretrained(folder)
    (folder / "mine.txt").write_text("mine")
    before = folder.stat().st_ino
    old.unet.save_pretrained(folder)
    assert folder.stat().st_ino != before and (folder / "mine.txt").exists()
    monkeypatch.setattr(os, "rename", lambda a, b: not_permitted() if ".minidiff" in str(a) else rename(a, b))
    before = folder.stat().st_ino
    with pytest.raises(PermissionError):
        old.unet.save_pretrained(folder)
    assert folder.stat().st_ino == before and [path.name for path in tmp_path.iterdir()] == ["unet"]


def test_a_folder_that_cannot_be_renamed(
    old: minidiff.StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of a lower layer of a container: the files are moved one by one, and meanwhile nothing in it loads."""
    monkeypatch.setattr(atomic, "_exchange", not_permitted)
    monkeypatch.setattr(os, "rename", not_permitted)
    folder = tmp_path / "pipe"
    old.save_pretrained(folder, max_shard_size="20KB")
    (folder / "mine.txt").write_text("mine")
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda one, other: (moved.append(Path(other).name), replace(one, other)))
    before = folder.stat().st_ino
    old.save_pretrained(folder)
    assert moved[-1] == "model_index.json" and folder.stat().st_ino == before
    assert not list(folder.rglob("*.index.json")) and (folder / "mine.txt").exists() and strays(tmp_path) == []
    assert version_of(minidiff.StableDiffusionPipeline.from_pretrained(folder), old) >= {True}


def irregular(path: Path, kind: str) -> None:
    """Put something that is no file at ``path``."""
    if kind == "a symbolic link":
        path.with_name("precious").write_text("precious")
        path.symlink_to(path.with_name("precious"))
    elif kind == "a device":
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    else:
        socket.socket(socket.AF_UNIX).bind(str(path))


KINDS = ["a symbolic link", "a pipe", "a folder", "a socket", *(["a device"] if os.geteuid() == 0 else [])]


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, when: str) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    path = Path("x.json")
    if when == "before":
        irregular(path, kind)

    def write(made: Path) -> None:
        made.write_text("new")
        if when == "meanwhile":
            irregular(path, kind)

    with pytest.raises(FileExistsError, match=f"x.json is {kind}.*only a regular file is replaced"):
        atomic.write_file(path, write)
    assert atomic.kind_of(path) == kind and strays(tmp_path) == []
    assert not Path("precious").exists() or Path("precious").read_text() == "precious"


def test_savers_do_not_write_through_links(old: minidiff.StableDiffusionPipeline, tmp_path: Path) -> None:
    """As in a snapshot of the Hub's cache, whose files are links to those that other revisions have too."""
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    old.save_pretrained(snapshot)
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    before = {path.name: path.read_bytes() for path in blobs.iterdir()}
    for save in (
        lambda: old.save_pretrained(snapshot),
        lambda: old.unet.save_pretrained(snapshot / "unet"),
        lambda: old.scheduler.save_pretrained(snapshot / "scheduler"),
        lambda: old.tokenizer.save_pretrained(snapshot / "tokenizer"),
    ):
        with pytest.raises(FileExistsError, match="is a symbolic link to .*only a regular file is replaced"):
            save()
    assert {path.name: path.read_bytes() for path in blobs.iterdir()} == before
    assert version_of(minidiff.StableDiffusionPipeline.from_pretrained(snapshot), old) >= {True}


@pytest.mark.parametrize("target", ["folder", "file.safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_convert_replaces_nothing_but_checkpoints(
    old: minidiff.StableDiffusionPipeline, tmp_path: Path, target: str, kind: str
) -> None:
    if kind == "a folder" and target == "folder":
        kind = "a file"
        (tmp_path / target).write_text("mine")
    else:
        irregular(tmp_path / target, kind)
    old.unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(FileExistsError, match=f"{target} is {kind}, not a "):
        convert(tmp_path / "unet", tmp_path / target, force=True)
    assert atomic.kind_of(tmp_path / target) == kind and strays(tmp_path) == []


@pytest.mark.parametrize("foreign", ["app.py", "unet/notes.txt", "unet/config.json", "model.bin", ".git/HEAD"])
def test_convert_refuses_a_folder_with_foreign_files(
    old: minidiff.StableDiffusionPipeline, tmp_path: Path, foreign: str
) -> None:
    """A project with a ``config.json`` of its own was deleted."""
    project = tmp_path / "project"
    old.vae.save_pretrained(project)
    (project / foreign).parent.mkdir(exist_ok=True)
    (project / foreign).write_text('{"of": "mine"}')
    old.unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(FileExistsError, match=f"(?s)no checkpoint: it is not replaced.*{foreign}"):
        convert(tmp_path / "unet", project, force=True)
    assert (project / foreign).read_text() == '{"of": "mine"}'


def test_convert_to_the_current_folder_and_a_broken_link(
    old: minidiff.StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first took the current folder away from the process and its shell, the second was a raw error."""
    old.unet.save_pretrained(tmp_path / "unet")
    old.unet.save_pretrained(tmp_path / "here")
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path / "here")
    for target in (".", tmp_path / "here"):
        with pytest.raises(FileExistsError, match="/here is the current folder"):
            convert(tmp_path / "unet", target, force=True)
    with pytest.raises(FileExistsError, match="/link is a symbolic link, not a folder"):
        convert(tmp_path / "unet", tmp_path / "link", force=True)


def test_convert_looks_again_before_it_replaces(old: minidiff.StableDiffusionPipeline, tmp_path: Path) -> None:
    old.unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(FileExistsError, match="out exists; --force replaces it"):
        convert(
            tmp_path / "unet", tmp_path / "out", progress=lambda now, total: (tmp_path / "out").mkdir(exist_ok=True)
        )
    assert list((tmp_path / "out").iterdir()) == [] and strays(tmp_path) == []


# --- a save comes between --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [None, "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_load_in_whose_middle_a_save_comes_is_whole(
    old: minidiff.StableDiffusionPipeline,
    new: minidiff.StableDiffusionPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    shards: str | None,
) -> None:
    """Each tensor that was converted was read from the file that had the name at that moment."""
    old.unet.save_pretrained(tmp_path / "unet", max_shard_size=shards or "1GB")

    def save_then_fill(*arguments: Any) -> None:
        new.unet.save_pretrained(tmp_path / "unet", max_shard_size=shards or "1GB")
        fill(*arguments)

    fill = load.fill
    monkeypatch.setattr(load, "fill", save_then_fill)
    loaded = minidiff.UNet2DConditionModel.from_pretrained(tmp_path / "unet", torch_dtype=dtype)
    for one, other in zip(loaded.parameters(), old.unet.parameters(), strict=True):
        assert torch.equal(one, other.to(dtype))


def test_a_save_between_configuration_and_weights(
    old: minidiff.StableDiffusionPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old.unet.save_pretrained(tmp_path / "unet")

    def save_then_find(repo: Repo, stem: str, variant: str | None) -> Any:
        old.unet.save_pretrained(tmp_path / "unet")
        return find(repo, stem, variant)

    find = Repo.weights
    monkeypatch.setattr(Repo, "weights", save_then_find)
    with pytest.raises(CheckpointError, match=r"config.json was replaced while it and .* were read"):
        minidiff.UNet2DConditionModel.from_pretrained(tmp_path / "unet")


@pytest.mark.parametrize("exchanged", [True, False])
def test_a_save_between_two_parts_of_a_pipeline(
    old: minidiff.StableDiffusionPipeline,
    new: minidiff.StableDiffusionPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    exchanged: bool,
) -> None:
    """Parts of the old and of the new were loaded together."""
    old.save_pretrained(tmp_path / "pipe")
    if not exchanged:
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)

    def load_then_save(*arguments: Any) -> Any:
        part = load_component(*arguments)
        new.save_pretrained(tmp_path / "pipe")
        return part

    load_component = base.load_component
    monkeypatch.setattr(base, "load_component", load_then_save)
    with pytest.raises(CheckpointError, match=r"model_index.json was replaced while it and .* were read"):
        minidiff.StableDiffusionPipeline.from_pretrained(tmp_path / "pipe")


def test_a_conversion_during_which_the_source_is_saved(
    old: minidiff.StableDiffusionPipeline, new: minidiff.StableDiffusionPipeline, tmp_path: Path
) -> None:
    old.save_pretrained(tmp_path / "pipe")

    def save_once(now: int, total: int) -> None:
        if not saved:
            saved.append(new.save_pretrained(tmp_path / "pipe"))

    saved: list[None] = []
    with pytest.raises(CheckpointError, match=r"model_index.json was replaced while it and .* were read"):
        convert(tmp_path / "pipe", tmp_path / "out.safetensors", progress=save_once)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_save_while_a_tokenizer_is_read(
    old: minidiff.StableDiffusionPipeline,
    new: minidiff.StableDiffusionPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old.tokenizer.save_pretrained(tmp_path / "tokenizer")

    def save_then_read(path: Path) -> list[str]:
        new.tokenizer.save_pretrained(tmp_path / "tokenizer")
        return read(path)

    read = tokenizer_files._read_merges
    monkeypatch.setattr(tokenizer_files, "_read_merges", save_then_read)
    with pytest.raises(CheckpointError, match=r"vocab.json was replaced while it and .* were read"):
        minidiff.CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"x.json cannot be written there: .*: '.*/missing'"):
        atomic.write_text(tmp_path / "missing" / "x.json", "new")


@pytest.mark.parametrize("of", [OSError(errno.ENOSPC, "No space left"), ValueError("IO error (os error 28)")])
def test_a_full_disk(tmp_path: Path, of: Exception) -> None:
    def write(made: Path) -> None:
        made.write_bytes(bytes(1234))
        raise of

    (tmp_path / "a.bin").write_text("old")
    with pytest.raises(OSError, match=r"the disk of .* is full after 1,234 bytes of a.bin; .*a.bin is as it was"):
        atomic.write_file(tmp_path / "a.bin", write)
    assert (tmp_path / "a.bin").read_text() == "old" and strays(tmp_path) == []
