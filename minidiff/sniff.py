"""What a file is that should be another, from its first bytes."""

from pathlib import Path

_AGAIN = "download it again (force_download=True)"
_ANSWERS = (b"entry not found", b"repository not found", b"invalid username", b"access to model", b"not found")
_ERRORS = (b'{"error"', b'{"message"')  # what a server says in JSON


def what_is(path: Path) -> str | None:
    """Say what a file is that holds neither weights nor a configuration; None if it may be either."""
    with path.open("rb") as file:
        head = file.read(128).lstrip()
    if not head:
        return "it is empty; download or save it again (force_download=True)"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; run `git lfs pull` in that folder"
    if head.lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"it is a web page; {_AGAIN}"
    if head.startswith(b"GGUF"):
        return "it is a GGUF file: UNet2DConditionModel.from_single_file reads those of UNets"
    if head.startswith(b"\x80\x02") or (head.startswith(b"PK\x03\x04") and b"data.pkl" in head):
        return "it is a pickle with another name, which minidiff does not open because it can run code"
    if head.startswith(b"PK\x03\x04"):
        return "it is a ZIP archive: unpack it, and look for safetensors in it"
    if head.lower().startswith(_ANSWERS) or head.replace(b" ", b"").startswith(_ERRORS):
        return f"it is a server's answer instead of the file: {head.decode(errors='replace')!r}; {_AGAIN}"
    return None
