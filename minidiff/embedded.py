"""The checkpoints that minidiff carries with it, so that a first picture needs no network.

In the repository they are ``weights/NAME``; the wheel carries the same folders as ``minidiff/_weights/NAME``.
"""

from pathlib import Path

from minidiff.errors import CheckpointNotFoundError

DEFAULT = "emoji64"  # text to image; "emoji32-ddpm" draws without a prompt
GUIDANCE = 2.0  # suits the default best, says its card

_PACKAGE = Path(__file__).resolve().parent
_FOLDERS = (_PACKAGE / "_weights", _PACKAGE.parent / "weights")  # installed wheel; source checkout or editable install


def embedded_names() -> list[str]:
    """Return the names of the embedded checkpoints, in alphabetical order."""
    return sorted({index.parent.name for folder in _FOLDERS for index in folder.glob("*/model_index.json")})


def embedded_checkpoint(name: str = DEFAULT) -> Path:
    """Return the folder of an embedded checkpoint, whatever the working directory.

    Raises ``CheckpointNotFoundError`` naming the folders searched and the checkpoints that are there.
    """
    for folder in _FOLDERS:
        if (folder / name / "model_index.json").is_file():
            return folder / name
    here = ", ".join(embedded_names()) or "none"
    raise CheckpointNotFoundError(
        f"no embedded checkpoint {name!r} in {' or '.join(map(str, _FOLDERS))}; found: {here}. "
        f"If it should be there, install minidiff again from a complete checkout."
    )
