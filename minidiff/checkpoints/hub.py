"""Where checkpoint files come from: a local folder, or a repository on the Hugging Face Hub.

A source that exists on disk is read from there and the Hub is never asked. Anything else is taken for a Hub id, and
the ordinary cache and the environment variables HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN are honoured because
all downloads go through ``huggingface_hub.hf_hub_download``, one file at a time and only for files that are used.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from minidiff.config import read_json
from minidiff.errors import CheckpointError, CheckpointNotFoundError, shortened

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5")  # weight formats that minidiff does not open
WHY_NO_PICKLES = (
    "minidiff reads only safetensors, because unpickling a file runs whatever code it contains; convert the weights "
    "to safetensors with a tool you trust (https://huggingface.co/spaces/safetensors/convert does it on the Hub) or "
    "look for a repository or revision that has them"
)


class MissingFileError(CheckpointNotFoundError):
    """The folder or repository is there, but it does not hold the file."""


class NotCachedError(MissingFileError):
    """The file is not in the cache and the Hub was not asked, or not reached, so nobody knows whether it exists.

    A Hub that answers with an error is no such case: that is a ``CheckpointNotFoundError``, so that nothing is loaded
    without a file that may well exist.
    """


class Weights(NamedTuple):
    """The weight files of one model, with the index that maps names to them (None if there is a single file)."""

    files: dict[str, Path]  # file name in the repository -> file on this machine
    index: dict[str, str] | None  # tensor name -> file name
    index_name: str | None


def weight_names(stem: str, variant: str | None) -> tuple[str, ...]:
    """Return the names under which weights may be stored, in the order in which the reference looks for them.

    diffusers prefers a sharded checkpoint to a single file, transformers (``stem="model"``) the other way round. The
    index of a variant has had two spellings; the first is the one that is written today.
    """
    dotted = f".{variant}" if variant else ""
    single = f"{stem}{dotted}.safetensors"
    indices = (f"{stem}.safetensors.index{dotted}.json", f"{stem}.safetensors{dotted}.index.json")
    indices = tuple(dict.fromkeys(indices))
    return (single, *indices) if stem == "model" else (*indices, single)


def variant_of(name: str, stem: str) -> str | None:
    """Return the variant of a weight file of ``stem`` ("" for none), or None for any other file."""
    shard = r"(?:-\d{5}-of-\d{5})?"
    for pattern in (
        rf"{stem}(?:\.([\w-]+?))?{shard}\.safetensors",
        rf"{stem}\.safetensors\.index(?:\.([\w-]+))?\.json",
        rf"{stem}\.safetensors\.([\w-]+)\.index\.json",
    ):
        if match := re.fullmatch(pattern, name):
            return match.group(1) or ""
    return None


def _looks_like_a_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or "\\" in source or source.count("/") > 1


@dataclass(frozen=True)
class Repo:
    """A folder or Hub repository, and how to reach it: the keyword arguments of every ``from_pretrained``."""

    source: str | Path
    subfolder: str | None = None
    revision: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    token: str | bool | None = None
    force_download: bool = False

    def __post_init__(self) -> None:
        if Path(self.source).is_file():
            raise CheckpointError(
                f"{self.source} is a single file; from_pretrained needs a folder in Hub layout (config.json beside "
                "the weights) or a Hub id; from_single_file reads checkpoints in one file"
            )

    def __str__(self) -> str:
        revision = f" (revision {self.revision})" if self.revision and not self.is_local else ""
        return f"{PurePosixPath(str(self.source), self.subfolder or '')}{revision}"

    @property
    def is_local(self) -> bool:
        """Tell whether the source exists on disk, so that the Hub plays no part."""
        return Path(self.source).exists()

    @property
    def where(self) -> dict[str, Any]:
        """All but the source, as the keyword arguments of a ``from_pretrained``."""
        return {name: value for name, value in vars(self).items() if name != "source"}

    def at(self, subfolder: str) -> "Repo":
        """Return the same repository one folder further down."""
        return replace(self, subfolder=str(PurePosixPath(self.subfolder or "", subfolder)))

    def file(self, filename: str) -> Path:
        """Return the path of a file, downloading it if need be. Raises ``CheckpointNotFoundError``."""
        if self.is_local:
            path = Path(self.source, self.subfolder or "", filename)
            if path.is_file():
                return path
            if path.is_symlink():  # of the cache: nobody should look for another file instead
                target = path.readlink()
                raise CheckpointNotFoundError(f"{path} is a link to {target}, which is not there: download it again")
            if not path.parent.is_dir():
                raise MissingFileError(f"{self.source} has no folder {self.subfolder!r}, so no {filename} in it")
            found = ", ".join(sorted(entry.name for entry in path.parent.iterdir())) or "nothing"
            raise MissingFileError(f"{path.parent} has no {filename}; it holds {found}")
        if isinstance(self.source, Path) or _looks_like_a_path(self.source):
            raise CheckpointNotFoundError(f"there is no folder {str(self.source)!r} (looked from {Path.cwd()})")
        return self._download(filename)

    def optional_file(self, filename: str) -> Path | None:
        """Return the path of a file, or None if the folder or repository (or, offline, the cache) lacks it.

        Raises ``CheckpointNotFoundError`` where the Hub answers with an error.
        """
        try:
            return self.file(filename)
        except MissingFileError:
            return None

    def names(self) -> list[str]:
        """List the files of the subfolder, for error messages. The Hub is asked if the source is not local."""
        if self.is_local:
            folder = Path(self.source, self.subfolder or "")
            return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        from huggingface_hub import HfApi

        try:
            info = HfApi(token=self.token).model_info(str(self.source), revision=self.revision)
        except Exception as error:  # its own, and those of the transport
            raise CheckpointNotFoundError(
                f"{self} lacks a file that is needed, and the Hub did not say what it has instead: {error}"
            ) from error
        folder = PurePosixPath(self.subfolder or "")
        paths = [PurePosixPath(sibling.rfilename) for sibling in info.siblings or []]
        return sorted(path.name for path in paths if path.parent == folder)

    def weights(self, stem: str, variant: str | None = None) -> Weights:
        """Find the safetensors files named ``stem``: one file, or the shards that an index lists.

        Raises ``CheckpointNotFoundError`` that says what is there instead: other variants, or only pickles.
        """
        error = None
        for name in weight_names(stem, variant):
            try:
                path = self.file(name)
            except MissingFileError as missing:
                error = missing
                continue
            return Weights({name: path}, None, None) if name.endswith(".safetensors") else self._shards(name, path)
        raise self._no_weights(stem, variant, error) from error

    def pinned(self, file: Path) -> "Repo":
        """Return this repository at the commit that ``file``, downloaded from it, belongs to.

        Later files then come from the same commit even if somebody pushes meanwhile, and cached ones need no request.
        """
        parts = file.parts
        if self.is_local or "snapshots" not in parts:
            return self
        return replace(self, revision=parts[len(parts) - 1 - parts[::-1].index("snapshots") + 1])

    def _shards(self, index_name: str, path: Path) -> Weights:
        index = read_json(path).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(value, str) for value in index.values()):
            raise CheckpointError(
                f"{path} should have a 'weight_map' from tensor names to file names, found {index!r:.50}"
            )
        # An index may come from anywhere: a name with a folder in it could point outside the repository.
        strange = sorted(
            {name for name in index.values() if not name.endswith(".safetensors") or Path(name).name != name}
        )
        if strange:
            raise CheckpointError(f"{path} names {', '.join(strange)}: shards must be .safetensors files beside it")
        files, missing = {}, []
        for name in sorted(set(index.values())):
            try:
                files[name] = self.file(name)
            except MissingFileError:
                missing.append(name)
        if missing:
            raise CheckpointNotFoundError(
                f"{path} lists {len(files) + len(missing)} shards, and {self} lacks {', '.join(missing)}; download or "
                "save the checkpoint again"
            )
        return Weights(files, index, index_name)

    def _no_weights(self, stem: str, variant: str | None, error: MissingFileError | None) -> CheckpointNotFoundError:
        wanted = f"{stem}{f'.{variant}' if variant else ''}.safetensors"
        if isinstance(error, NotCachedError):
            return error
        names = self.names()
        if shards := [name for name in names if variant_of(name, stem) == (variant or "")]:
            index = weight_names(stem, variant)[1 if stem == "model" else 0]
            return CheckpointNotFoundError(
                f"{self} has shards {', '.join(shortened(shards))}, but no index {index} of them: download that too"
            )
        variants = sorted({found for name in names if (found := variant_of(name, stem)) is not None})
        if variants:
            spelled = ", ".join("no variant" if found == "" else f"variant={found!r}" for found in variants)
            asked = f"variant={variant!r}" if variant else "no variant"
            return CheckpointNotFoundError(f"{self} has no weights {wanted} ({asked}); it has {spelled}: ask for that")
        pickles = [name for name in names if name.endswith(PICKLES)]
        if pickles:
            return CheckpointNotFoundError(f"{self} has only {', '.join(pickles)}, no {wanted}: {WHY_NO_PICKLES}")
        return CheckpointNotFoundError(f"{self} has no {wanted}; it holds {', '.join(names) or 'nothing'}")

    def _download(self, filename: str) -> Path:
        from huggingface_hub import errors, hf_hub_download

        full = str(PurePosixPath(self.subfolder or "", filename))
        options = {name: value for name, value in self.where.items() if name != "subfolder"}
        if _COMMIT.fullmatch(self.revision or "") and self._is_known_to_lack(full):
            raise MissingFileError(_FAILURES["EntryNotFoundError"].format(repo=self, file=filename))
        try:
            return Path(hf_hub_download(str(self.source), full, library_name="minidiff", **options))
        except Exception as error:  # its own, those of the transport, and those of the disk
            asked = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
            failure = asked if isinstance(asked, errors.HfHubHTTPError) else error  # it answered: that is not "offline"
            name = next(name for name in _FAILURES if isinstance(failure, getattr(errors, name, Exception)))
            if name == "LocalEntryNotFoundError" and self._is_known_to_lack(full):
                name = "EntryNotFoundError"
            why = "local_files_only=True" if self.local_files_only else error.__cause__ or error
            said = {"repo": self, "file": filename, "full": full, "here": Path.cwd(), "why": why}
            said["error"] = " ".join(str(failure).split()) or repr(failure)
            message = _FAILURES[name].format(source=self.source, revision=self.revision, **said)
            raise _KINDS.get(name, CheckpointNotFoundError)(message) from error

    def _is_known_to_lack(self, full: str) -> bool:
        """Say whether the cache holds the Hub's word that the repository has no such file."""
        from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

        if self.force_download:
            return False
        where = {"revision": self.revision, "cache_dir": self.cache_dir}
        return try_to_load_from_cache(str(self.source), full, **where) is _CACHED_NO_EXIST


_COMMIT = re.compile("[0-9a-f]{40}")  # what is not in a commit will never be in it
_LOG_IN = "log in with `hf auth login`, set HF_TOKEN or pass token="
_FAILURES = {  # error of huggingface_hub, the first that it is -> what ours says
    "HFValidationError": (
        "{source!r} is neither an existing folder (looked from {here}) nor a Hub id such as 'name/repository'"
    ),
    "GatedRepoError": f"{{source}} is a gated repository: accept its terms on its page on the Hub, then {_LOG_IN}",
    "RepositoryNotFoundError": (
        "there is no folder {source!r} (looked from {here}) and the Hub has no such public repository; check the "
        f"spelling, and if it is private {_LOG_IN}"
    ),
    "RevisionNotFoundError": "{source} has no revision {revision!r}; pass a branch, a tag or a commit that it has",
    "LocalEntryNotFoundError": (
        "{full} of {source} is not in the Hugging Face cache and the Hub was not reached ({why}); download it once "
        "with a connection, or pass the path of a local folder"
    ),
    "EntryNotFoundError": "{repo} has no {file} on the Hub; check subfolder=, revision= and variant=",
    "HfHubHTTPError": (
        "the Hub did not give {full} of {source}, and the Hugging Face cache has it not: {error}; try again later, or "
        "pass local_files_only=True to do with what the cache has"
    ),
    "Exception": "{full} of {source} could not be downloaded: {error}; try again",
}
_KINDS = {"LocalEntryNotFoundError": NotCachedError, "EntryNotFoundError": MissingFileError}  # of ours, where special
