"""What a single file that minidiff wrote says of itself in its header: all that a folder holds besides weights.

The metadata ``minidiff.config`` is a JSON object with the content of each small file under its name in Hub layout, such
as ``{"model_index.json": {...}, "unet/config.json": {...}}``; a vocabulary is in it only if it is not CLIP's.
"""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from minidiff.checkpoints.original.configs import Sections, clip_vocabulary
from minidiff.config import read_json
from minidiff.errors import CheckpointError

KEY = "minidiff.config"
_MERGES = "merges.txt"


class HeaderConfigs(Sections):
    """The configuration in the header of a single file. It names classes of minidiff, and is no code."""

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, str]) -> "HeaderConfigs | None":
        """Return what a file says, None if it says nothing. Raises ``CheckpointError`` if it is no configuration."""
        if KEY not in metadata:
            return None
        try:
            sections = json.loads(metadata[KEY])
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{path}: {KEY} in its header is not JSON: {error}; pass config=") from error
        well_formed = isinstance(sections, dict) and all(
            isinstance(value, dict) or (name.endswith(_MERGES) and isinstance(value, str))
            for name, value in sections.items()
        )
        if not well_formed:
            raise CheckpointError(f"{path}: {KEY} in its header should be an object of objects; pass config=")
        return cls(f"the configuration in the header of {path}", sections)

    def read(self, name: str) -> dict[str, Any]:
        """Return a file such as ``"unet/config.json"``; of a network alone it has no folder."""
        alone = "model_index.json" not in self.sections and name not in self.sections
        return super().read(PurePosixPath(name).name if alone else name)

    def _vocabulary(self, name: str) -> tuple[dict[str, int], list[Any]]:
        merges = self.sections.get(f"{name}/{_MERGES}")
        if merges is None:
            return super()._vocabulary(name)
        return self.read(f"{name}/vocab.json"), merges.split("\n")


def said_by(folder: Path) -> str:
    """Return the small files of a folder in Hub layout as the value of ``minidiff.config``."""
    sections: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.json")):
        sections[path.relative_to(folder).as_posix()] = read_json(path)
    vocabulary = clip_vocabulary()
    for path in sorted(folder.rglob(_MERGES)):
        lines = path.read_bytes().decode().split("\n")[1:-1]  # the first is a comment
        vocab = path.relative_to(folder).with_name("vocab.json").as_posix()
        if (sections[vocab], lines) == (vocabulary[0], [" ".join(pair) for pair in vocabulary[1]]):
            del sections[vocab]
        else:
            sections[path.relative_to(folder).as_posix()] = "\n".join(lines)
    return json.dumps(sections, sort_keys=True)
