"""Where an adapter comes from: a mapping of tensors, a safetensors file, a folder or a repository on the Hub.

A folder of PEFT's ``save_pretrained`` holds ``adapter_model.safetensors`` of one network, and ``adapter_config.json``;
PEFT's examples write one for each network: ``unet/``, ``text_encoder/``.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minidiff.adapters.lora_config import COMPONENTS, CONFIG_NAME, WEIGHTS_NAME, component_of
from minidiff.checkpoints.arguments import refuse_unless_harmless
from minidiff.checkpoints.hub import PICKLES, WHY_NO_PICKLES, MissingFileError, NotCachedError, Repo
from minidiff.checkpoints.load import DTYPES, SafetensorsFile, read_header
from minidiff.checkpoints.model import refuse_pickles
from minidiff.config import read_json
from minidiff.errors import CheckpointError, CheckpointNotFoundError, shortened

_OPTIONS = {"weight_name", *(field.name for field in fields(Repo))} - {"source"}


class AdapterFile(NamedTuple):
    """What was found."""

    label: str  # the path, for error messages
    tensors: dict[str, Tensor]
    metadata: dict[str, str]  # of the file's header, or what lay beside it
    of_peft: bool = False  # whether it is a folder of PEFT, whose names are given the component in front here


def read_adapter(
    source: str | Path | Mapping[str, Tensor],
    default_name: str,
    weight_name: str | None = None,
    **where: Any,
) -> AdapterFile:
    """Read the tensors of an adapter; those of a file are memory-mapped.

    Args:
        source: tensors by name, the path of a file or folder, or a Hub id.
        default_name: what the reference calls such a file.
        weight_name: the file in the folder or repository. By default ``default_name``, or else the only safetensors
            file that there is.
        where: the other arguments of ``Repo``.

    Raises:
        CheckpointNotFoundError: if there is no such file, or if several could be meant.
        CheckpointError: if it is a pickle or damaged, or if a tensor is not floating or not finite.
    """
    if isinstance(source, Mapping):
        found = AdapterFile("the given state dict", dict(source), {})
    else:
        path = Path(source)
        found = (
            _read(Repo(path.parent), path)
            if path.is_file()
            else _find(Repo(source, **where), default_name, weight_name)
        )
    if not found.tensors:
        raise CheckpointError(f"{found.label} holds no tensors")
    check_tensors(found.label, found.tensors)
    return found


def options_of(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a loading method that say where the file lies: those of ``read_adapter``.

    Raises:
        TypeError: if another one asks for something.
        CheckpointError: if ``use_safetensors=False`` asks for a pickle.
    """
    options = refuse_unless_harmless(given)
    refuse_pickles(options.pop("use_safetensors", None))
    if unknown := options.keys() - _OPTIONS:
        raise TypeError(f"{method} got unknown arguments {', '.join(sorted(unknown))}")
    return {name: value for name, value in options.items() if value is not None}


def check_tensors(label: str, tensors: Mapping[str, object]) -> None:
    """Raise ``CheckpointError`` if a tensor is not floating, or has values that are not finite.

    An alpha is one number, whatever its type, and checked where it is used.
    """
    values = {key: value for key, value in tensors.items() if not (_kind(value) and key.endswith(".alpha"))}
    dtypes = list(DTYPES.values())
    if wrong := [
        f"{key} is {_kind(value) or type(value).__name__}"
        for key, value in values.items()
        if _kind(value) not in dtypes
    ]:
        accepted = ", ".join(map(str, dtypes))
        raise CheckpointError(f"{label}: {'; '.join(shortened(wrong))}; expected tensors of {accepted}")
    if wrong := [key for key, value in values.items() if not value.isfinite().all()]:
        raise CheckpointError(f"{label}: {', '.join(shortened(wrong))} holds values that are not finite: it is damaged")


def _kind(value: object) -> torch.dtype | None:
    return value.dtype if isinstance(value, Tensor) else None


def _find(repo: Repo, default_name: str, weight_name: str | None) -> AdapterFile:
    """Read the file that is meant, or else the folders of PEFT for several networks."""
    try:
        path = _choose(repo, default_name, weight_name)
    except MissingFileError as error:
        alone = weight_name is not None or isinstance(error, NotCachedError)
        parts = [name for name in COMPONENTS if not alone and CONFIG_NAME in repo.at(name).names()]
        if not parts:
            raise
        files = [_read(repo.at(part), _choose(repo.at(part), WEIGHTS_NAME, None), part) for part in parts]
        tensors = {key: tensor for file in files for key, tensor in file.tensors.items()}
        fields = {key: value for file in files for key, value in json.loads(file.metadata[CONFIG_NAME]).items()}
        return AdapterFile(str(repo), tensors, {CONFIG_NAME: json.dumps(fields)}, of_peft=True)
    return _read(repo.at(str(PurePosixPath(weight_name or "").parent)), path)


def _choose(repo: Repo, default_name: str, weight_name: str | None) -> Path:
    """Return the path of the file that is meant."""
    if weight_name is not None:
        if weight_name.endswith(PICKLES):
            raise CheckpointError(f"weight_name={weight_name!r} is a pickle: {WHY_NO_PICKLES}")
        return repo.file(weight_name)
    try:
        return repo.file(default_name)
    except NotCachedError:
        raise
    except MissingFileError as error:
        names = repo.names()
        files = [name for name in names if name.endswith(".safetensors")]
        if len(files) == 1:
            return repo.file(files[0])
        if files:
            raise CheckpointNotFoundError(
                f"{repo} has several safetensors files ({', '.join(files)}): pass weight_name= to say which"
            ) from error
        pickles = [name for name in names if name.endswith(PICKLES)]
        why = f"only {', '.join(pickles)}: {WHY_NO_PICKLES}" if pickles else f"only {', '.join(names) or 'nothing'}"
        raise MissingFileError(f"{repo} has no {default_name} and no other safetensors file, {why}") from error


def _read(repo: Repo, path: Path, component: str | None = None) -> AdapterFile:
    """Read a file of ``repo``; one of PEFT is for the component, by default the one that its configuration tells."""
    if path.name.endswith(PICKLES):
        raise CheckpointError(f"{path} is a pickle: {WHY_NO_PICKLES}")
    source = SafetensorsFile(path)  # says what is wrong with a file that is not safetensors
    tensors = {one.name: one.mapped for one in read_header(source)}
    metadata = source.mapped.metadata() or {}
    if path.name != WEIGHTS_NAME:
        return AdapterFile(str(path), tensors, metadata)
    config = read_json(repo.pinned(path).file(CONFIG_NAME))  # without it nobody knows alpha
    told = component_of(config)
    tensors, fields = ({f"{component or told}.{name}": one for name, one in part.items()} for part in (tensors, config))
    return AdapterFile(str(path), tensors, {CONFIG_NAME: json.dumps(fields)}, of_peft=True)
