"""Convert a checkpoint to the other layout, or to another dtype, one tensor at a time: ``minidiff convert IN OUT``.

The header of the output is known from the headers of the input, so it is written first. Then the values of each tensor
are read, converted and written a megabyte at a time; only a transposed matrix is in memory as a whole. What is
incomplete has a temporary name.
"""

import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from minidiff.atomic import kind_of, put_in_place, unchanged, workplace
from minidiff.checkpoints.hub import variant_of
from minidiff.checkpoints.load import FLOAT8
from minidiff.checkpoints.original.edm import edm_marks
from minidiff.checkpoints.original.families import scheduler_changes
from minidiff.checkpoints.original.header import said_by
from minidiff.checkpoints.original.prefixes import NETWORKS
from minidiff.checkpoints.original.read import StoredNetwork
from minidiff.checkpoints.original.write import groups_of_part, marks, original_metadata, original_tables
from minidiff.checkpoints.save import save_json
from minidiff.checkpoints.stream import Group, write_stream
from minidiff.checkpoints.tools.checkpoint import Checkpoint, edm_fields, open_checkpoint, scheduler_fields
from minidiff.config import REFERENCE_VERSION, read_json
from minidiff.errors import CheckpointError, CheckpointNotFoundError, ConfigError, shortened
from minidiff.registry import RENAMED, public

LAYOUTS = ("hub", "single-file")
HEADS = ("model_index.json", "config.json")  # what is read first in a folder
Progress = Callable[[int, int], None]  # bytes written now, bytes in all


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    dtype: torch.dtype | None = None,
    config: str | Path | None = None,
    prediction_type: str | None = None,
    variant: str | None = None,
    use_ema: bool = False,
    force: bool = False,
    progress: Progress = lambda now, total: None,
) -> Checkpoint:
    """Write the checkpoint ``source`` as ``target`` and return what was read.

    Args:
        source: a single file in the original spelling, or a folder in Hub layout (a pipeline or one network).
        target: a file that ends in .safetensors, or a folder.
        to: "hub" or "single-file"; by default what the name of ``target`` says.
        dtype: of the weights, by default what is stored; in float8 gains and biases stay as they are stored.
        config, prediction_type, variant, use_ema: as in ``open_checkpoint``.
        force: whether to replace ``target`` if it exists; a folder only if it is a checkpoint.
        progress: called with the bytes written after each tensor, and the bytes that there will be.

    Raises:
        FileExistsError: if ``target`` exists and ``force`` is not given.
        CheckpointError: if tensors are missing, unknown or misshapen, or the original spelling has no names for them.
    """
    source, target = Path(source), Path(os.path.abspath(target))  # "." has no name; a link is not followed
    to = _layout(target, to)
    _check_target(source, target, force)
    heads = [source / name for name in HEADS if (source / name).is_file()]
    with workplace(target) as place:
        made = place / target.name
        with unchanged(heads[0] if heads else source):
            checkpoint = open_checkpoint(
                source, config=config, prediction_type=prediction_type, variant=variant, use_ema=use_ema
            ).check()
            write = _write_single_file if to == "single-file" else _write_folder
            write(checkpoint, made, dtype, progress)
        _check_target(source, target, force)  # it may have come to be, or have been changed, since
        put_in_place(made, target, [path.relative_to(target) for path in target.rglob("*")])
    return checkpoint


def _layout(target: Path, to: str | None) -> str:
    said = "single-file" if target.suffix == ".safetensors" else "hub"
    if to not in (None, *LAYOUTS):
        raise ValueError(f"to={to!r} is not one of {', '.join(LAYOUTS)}")
    if to not in (None, said):
        raise ValueError(
            f"{target} is the name of a {'file' if said == 'single-file' else 'folder'}: a single file ends in "
            ".safetensors, a folder in Hub layout does not"
        )
    return said


def _check_target(source: Path, target: Path, force: bool) -> None:
    if not target.parent.is_dir():
        raise CheckpointNotFoundError(f"the folder {target.parent} of the output {target.name} does not exist")
    if kind_of(target) is None:
        return
    if source.exists() and target.resolve() in (source.resolve(), *source.resolve().parents):
        raise FileExistsError(f"{target} is the input, or holds it; write to another place")
    if not force:
        raise FileExistsError(f"{target} exists; --force replaces it")
    if target in (Path.cwd(), *Path.cwd().parents):
        raise FileExistsError(f"{target} is the current folder, or holds it: it is not replaced; name another")
    _refuse_foreign(target, "a file" if target.suffix == ".safetensors" else "a folder")


def _refuse_foreign(target: Path, expected: str) -> None:
    """Raise unless ``target`` is what ``expected`` says, a folder with nothing in it that is not of a checkpoint."""
    if kind_of(target) != expected:
        raise FileExistsError(f"{target} is {kind_of(target)}, not {expected}: it is not replaced; name another")
    if expected == "a file":
        return
    foreign = [
        str(path.relative_to(target))
        for path in sorted(target.rglob("*"))
        if kind_of(path) != "a folder" and not (kind_of(path) == "a file" and _is_of_a_checkpoint(path))
    ]
    if foreign or not any((target / name).is_file() for name in HEADS):
        what = "\n".join(["; it holds:", *(f"  {name}" for name in shortened(foreign))]) if foreign else ""
        raise FileExistsError(f"{target} is a folder, but no checkpoint: it is not replaced; name another{what}")


def _is_of_a_checkpoint(path: Path) -> bool:
    """Say whether a file is one that this library writes."""
    if any(variant_of(path.name, stem) is not None for stem in ("model", "diffusion_pytorch_model")):
        return True
    if path.name in (*HEADS, "scheduler_config.json"):
        with suppress(ConfigError, CheckpointError):
            return bool({"_class_name", "architectures"} & read_json(path).keys())
    return path.name in (
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "preprocessor_config.json",
    )


def _write_single_file(checkpoint: Checkpoint, target: Path, dtype: torch.dtype | None, progress: Progress) -> None:
    parts = {part.name: part for part in checkpoint.parts if part.name in ("", *NETWORKS)}
    tables = original_tables({name: part.model for name, part in parts.items()})
    groups = [group for name, rows in tables.items() for group in groups_of_part(parts[name], rows, "ldm", dtype)]
    groups += marks(checkpoint.prediction, checkpoint.zero_snr)
    groups += edm_marks(*edm_fields(checkpoint.parts, checkpoint.index, checkpoint.configs))
    total = sum(group.size for group in groups)
    with TemporaryDirectory() as folder:
        for name, rows in tables.items():
            _write_config(parts[name], list(groups_of_part(parts[name], rows, "ldm", dtype)), Path(folder, name))
        written = replace(checkpoint, prediction=None, zero_snr=False, parts=list(parts.values()))  # marks say the rest
        _write_small_files(written, Path(folder))
        metadata = original_metadata(checkpoint.prediction, said_by(Path(folder)))
    write_stream(target, groups, metadata, lambda size: progress(size, total))


def _write_folder(checkpoint: Checkpoint, target: Path, dtype: torch.dtype | None, progress: Progress) -> None:
    work = [(part, list(groups_of_part(part, part.rows, "hub", dtype))) for part in checkpoint.parts]
    total = sum(group.size for _, groups in work for group in groups)
    target.mkdir()
    for part, groups in work:
        folder = target / part.name
        _write_config(part, groups, folder)
        path = folder / f"{part.model.weights_stem}.safetensors"
        write_stream(path, groups, {"format": "pt"}, lambda size: progress(size, total))
    _write_small_files(checkpoint, target)


def _write_config(part: StoredNetwork, groups: list[Group], folder: Path) -> None:
    part.model.to(_usual_dtype(groups))  # on the meta device: a text encoder's config.json names its dtype
    part.model.save_config(folder)


def _write_small_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Write what a pipeline has besides networks: index, scheduler and tokenizers."""
    if not checkpoint.index:
        return
    index = {name: value for name, value in checkpoint.index.items() if not name.startswith("_")}
    for name, entry in index.items():
        if not isinstance(entry, list) or entry == [None, None] or any(part.name == name for part in checkpoint.parts):
            continue
        kind = RENAMED.get(str(entry[1]), str(entry[1]))
        if kind == "CLIPTokenizer":
            checkpoint.configs.tokenizer(name).save_pretrained(folder / name)
        elif kind == "CLIPImageProcessor":
            (folder / name).mkdir()
            path = f"{name}/preprocessor_config.json"
            save_json(checkpoint.configs.read(path), folder / path)
        elif kind.endswith("Scheduler"):
            fields = scheduler_fields(checkpoint.configs, name)
            if changes := scheduler_changes(fields, checkpoint.prediction, checkpoint.zero_snr):
                public(kind).from_config(fields, **changes)  # raises if it has no such option
                fields |= changes
            (folder / name).mkdir()
            save_json(fields, folder / name / "scheduler_config.json")
        else:  # such as a safety checker, which no single file has
            index[name] = [None, None]
    head = {"_class_name": checkpoint.index.get("_class_name"), "_diffusers_version": REFERENCE_VERSION}
    save_json(head | index, folder / "model_index.json")


def _usual_dtype(groups: list[Group]) -> torch.dtype:
    """Return the dtype to compute in: that of most tensors, but not float8."""
    kinds = Counter(dtype for group in groups for _, dtype, _ in group.specs if dtype not in FLOAT8.values())
    return kinds.most_common(1)[0][0] if kinds else torch.float32
