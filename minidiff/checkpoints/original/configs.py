"""What a checkpoint's repository holds besides weights, wherever it comes from: a folder, the package, a file's header.

``published/*.json`` holds it for each published model, section by section under the name of the file on the Hub, so
that a local file needs no network.
"""

import gzip
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from minidiff.checkpoints.hub import MissingFileError, Repo
from minidiff.config import read_json
from minidiff.registry import public

PUBLISHED = Path(__file__).with_name("published")
MERGES = PUBLISHED / "clip_merges.txt.gz"


class Sections:
    """A configuration that is in memory: the content of each file under its name in Hub layout."""

    def __init__(self, title: str, sections: Mapping[str, Any]) -> None:
        self.title, self.sections = title, sections

    def __str__(self) -> str:
        return self.title

    def read(self, name: str) -> dict[str, Any]:
        """Return a file such as ``"unet/config.json"``."""
        if name not in self.sections:
            raise MissingFileError(f"{self} has no {name}; it has {', '.join(self.sections) or 'nothing'}")
        return dict(self.sections[name])

    def tokenizer(self, name: str) -> Any:
        """Return the tokenizer of the component ``name``."""
        config, roles = (self.read(f"{name}/{file}.json") for file in ("tokenizer_config", "special_tokens_map"))
        vocab, merges = self._vocabulary(name)
        return public("CLIPTokenizer").of_content(vocab, merges, config, roles)

    def _vocabulary(self, name: str) -> tuple[dict[str, int], list[Any]]:
        return clip_vocabulary()


class PackagedConfigs(Sections):
    """The configuration of a published model, which comes with the package."""

    def __init__(self, name: str) -> None:
        sections = read_json(PUBLISHED / f"{name}.json")
        if base := sections.get("extends"):
            sections = {**PackagedConfigs(base).sections, **sections}
        super().__init__(f"the configuration of {name}", sections)


class FolderConfigs:
    """A folder or repository in Hub layout that the caller names to describe a file; its weights are not read."""

    def __init__(self, repo: Repo) -> None:
        self.repo = repo

    def __str__(self) -> str:
        return f"config={str(self.repo)!r}"

    def read(self, name: str) -> dict[str, Any]:
        """Return a file such as ``"unet/config.json"``."""
        return read_json(self.repo.file(name))

    def tokenizer(self, name: str) -> Any:
        """Return the tokenizer in the folder of the component ``name``."""
        return public("CLIPTokenizer").from_pretrained(self.repo.source, **self.repo.at(name).where)


Configs = Sections | FolderConfigs


@lru_cache(maxsize=1)
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return CLIP's 49,408 tokens with their ids, and its 48,894 merges.

    The tokens are in the order in which CLIP made them: the 256 bytes, the 256 bytes at the end of a word, what each
    merge joins, start and end. Only the merges are stored.
    """
    lines = gzip.decompress(MERGES.read_bytes()).decode().split("\n")[1:-1]  # the first line is a comment
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(line.replace(" ", "") for line in lines)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, [tuple(line.split(" ")) for line in lines]


def _byte_letters() -> list[str]:
    """Return the printable letters that stand for the 256 bytes in byte-level BPE, in the order of CLIP's vocabulary.

    Bytes that Latin-1 prints stand for themselves and come first; the others are letters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(0x100 + n) for n in range(256 - len(printable))]
