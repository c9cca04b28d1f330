"""The files of a CLIP tokenizer: from the Hub's spellings to the arguments of ``CLIPTokenizer``, and back.

Vocabulary: ``vocab.json`` and ``merges.txt``, or ``tokenizer.json`` alone (transformers 5 saves nothing else).
Special tokens, the later wins: ``tokenizer_config.json``, then ``special_tokens_map.json``. SD 2.x needs the second:
its configuration names "<|endoftext|>" as the pad token, its map "!". Where ``tokenizer_config.json`` carries
``added_tokens_decoder``, that is the only source of the tokens' flags and the map is not read, as in the reference.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from minidiff.atomic import unchanged, whole_folder, write_text
from minidiff.checkpoints.hub import MissingFileError, NotCachedError, Repo
from minidiff.config import read_json
from minidiff.errors import CheckpointError, ConfigError
from minidiff.sniff import what_is
from minidiff.text.bpe import END_OF_WORD

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_HEAD = "vocab.json"  # written last
NO_LIMIT = int(1e30)  # the reference's model_max_length of a tokenizer whose files do not say

_IMPLEMENTED = {  # fields that would change the tokens -> the values that describe what CLIPTokenizer does
    "add_prefix_space": (False,),
    "additional_special_tokens": ([], None),
    "do_lower_case": (True,),
    "errors": ("replace",),
    "extra_special_tokens": ([], {}, None),
    "padding_side": ("right",),
    "split_special_tokens": (False,),
    "tokenizer_class": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "truncation_side": ("right",),
}


def read_tokenizer(source: str | Path, **where: Any) -> dict[str, Any]:
    """Return the arguments of ``CLIPTokenizer`` for a folder or repository; ``where`` goes to ``Repo``.

    Raise ``CheckpointNotFoundError``, ``CheckpointError`` (a damaged file) or ``ConfigError`` (another kind).
    """
    with unchanged(Path(source, where.get("subfolder") or "", _HEAD)):  # of a local folder
        return _read(Repo(source, **where))


def _read(repo: Repo) -> dict[str, Any]:
    # The vocabulary comes last: a download that breaks off half-way then leaves no vocabulary in the cache, instead of
    # one that loads with the wrong pad token because the map is missing. For the same reason it is an error if nobody
    # knows, offline, whether there is a map; but not beside a tokenizer.json, as transformers 5 writes it without one.
    config = repo.optional_file("tokenizer_config.json")
    repo = repo.pinned(config) if config else repo
    special_map, unknown = None, None
    try:
        special_map = repo.file("special_tokens_map.json")
    except MissingFileError as error:
        unknown = error if isinstance(error, NotCachedError) else None
    extra, whole = repo.optional_file("added_tokens.json"), repo.optional_file("tokenizer.json")
    if unknown and not whole:
        raise unknown
    added = [{"id": i, "content": text} for text, i in (read_json(extra) if extra else {}).items()]
    if whole:
        vocab, merges, more = _read_whole(whole)
        added += more
    else:
        vocab, merges = read_json(repo.file(_HEAD)), _read_merges(repo.file("merges.txt"))
    return {"vocab": vocab, "merges": merges, **read_fields(config, special_map, added)}


def write_tokenizer(
    folder: Path,
    vocab: Mapping[str, int],
    merges: list[tuple[str, str]],
    added: Mapping[int, AddedToken],
    fields: Mapping[str, Any],
) -> None:
    """Write ``vocab.json``, ``merges.txt``, ``tokenizer_config.json`` and ``special_tokens_map.json``."""
    implemented = {name: values[0] for name, values in _IMPLEMENTED.items() if isinstance(values[0], bool | str)}
    decoder = {str(i): token.__getstate__() for i, token in sorted(added.items())}
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges), ""]
    with whole_folder(folder, _HEAD) as place:
        _write_json(place / "tokenizer_config.json", {**implemented, **fields, "added_tokens_decoder": decoder})
        _write_json(place / "special_tokens_map.json", {role: fields[role] for role in ROLES})
        write_text(place / "merges.txt", "\n".join(lines))
        _write_json(place / _HEAD, dict(sorted(vocab.items(), key=lambda item: item[1])))


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _read_merges(path: Path) -> list[str]:
    if what := what_is(path):
        raise CheckpointError(f"{path} holds no merges: {what}")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error}") from error
    lines = text.replace("\r\n", "\n").split("\n")  # not splitlines(), which also splits at rarer characters
    return [line for line in lines if line and not line.startswith("#version")]


def _read_whole(path: Path) -> tuple[dict[str, int], list, list[dict]]:
    """Return vocabulary, merges and added tokens of a ``tokenizer.json``."""
    data = read_json(path)
    model = data.get("model", {})
    if model.get("type") != "BPE" or model.get("end_of_word_suffix") != END_OF_WORD:
        found = f"{model.get('type')!r} with end_of_word_suffix={model.get('end_of_word_suffix')!r}"
        raise ConfigError(f"{path}: the model is {found}; CLIPTokenizer needs 'BPE' with {END_OF_WORD!r}")
    for name in ("vocab", "merges"):
        if name not in model:
            raise CheckpointError(f"{path}: 'model' has no {name!r}; it has {sorted(model)}")
    return model["vocab"], model["merges"], data.get("added_tokens", [])


def read_fields(
    config: Path | Mapping[str, Any] | None, special_map: Path | Mapping[str, Any] | None, added: list[dict]
) -> dict[str, Any]:
    """Merge the two small files, or their content, and the added tokens into keyword arguments of ``CLIPTokenizer``."""
    fields = _content(config) if config else {}
    from_map: dict[str, Any] = {}
    if "added_tokens_decoder" in fields:
        added = [{**token, "id": int(i)} for i, token in fields["added_tokens_decoder"].items()]
    elif special_map:
        from_map = _content(special_map)
        fields |= from_map
    for name, values in _IMPLEMENTED.items():
        if name in fields and fields[name] not in values:
            path = special_map if name in from_map else config
            raise ConfigError(f"{path}: {name}={fields[name]!r} is not implemented, only {values[0]!r}; convert it")

    roles = {
        role: _special_token(role, fields[role], special_map if role in from_map else config)
        for role in ROLES
        if role in fields
    }
    special = {str(token) for token in roles.values()}
    decoder = {token["id"]: _added_token(token, special) for token in added}
    return {**roles, "model_max_length": fields.get("model_max_length", NO_LIMIT), "added_tokens_decoder": decoder}


def _content(source: Path | Mapping[str, Any]) -> dict[str, Any]:
    return dict(source) if isinstance(source, Mapping) else read_json(source)


def _special_token(role: str, value: Any, path: Path) -> str | AddedToken:
    """Read a special token, which is a string or a record of flags."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        return _added_token({**value, "special": True}, set())
    raise ConfigError(f"{path}: {role}={value!r}; expected a string, or an object with 'content'")


def _added_token(record: Mapping[str, Any], special: set[str]) -> AddedToken:
    """Build an ``AddedToken``; the oldest files give the name only, and it is special if it has a role."""
    content = record["content"]
    is_special = record.get("special", content in special)
    flags = {name: record.get(name, False) for name in ("single_word", "lstrip", "rstrip")}
    return AddedToken(content, special=is_special, normalized=record.get("normalized", not is_special), **flags)
