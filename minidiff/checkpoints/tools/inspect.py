"""Say what a checkpoint holds, in aligned columns: ``minidiff inspect FILE_OR_FOLDER``. Only headers are read."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from pathlib import Path

from minidiff.checkpoints.load import DTYPES, FLOAT8, StoredTensor, expected_shapes
from minidiff.checkpoints.original.families import stranger
from minidiff.checkpoints.original.read import SingleFile, StoredNetwork
from minidiff.checkpoints.remap import SAME, Row
from minidiff.checkpoints.tools.checkpoint import Checkpoint

SPELLINGS = {"single-file": "single file in the original spelling", "hub": "folder in Hub layout"}
_NAMES = {name: str(dtype).removeprefix("torch.") for name, dtype in {**DTYPES, **FLOAT8}.items()}


def report(checkpoint: Checkpoint) -> str:
    """Return a page about a checkpoint: family, networks, dtypes, prediction, what is missing or unknown."""
    stored = [tensor for part in checkpoint.parts for tensor in part.found.values()]
    everything = [*stored, *(tensor for tensor, _ in checkpoint.dropped)]
    head = [
        ("family", checkpoint.title),
        ("layout", f"{SPELLINGS[checkpoint.layout]}, {_bytes(everything)}, {len(everything):,} tensors"),
        ("prediction", _prediction(checkpoint)),
    ]
    lines = [str(checkpoint.path), *(f"  {name:<11} {value}" for name, value in head), ""]
    table = [("component", "class", "tensors", "parameters", "size", "dtype")]
    table += [
        _line(part.name or "(alone)", type(part.model).__name__, part.found.values()) for part in checkpoint.parts
    ]
    if len(checkpoint.parts) > 1:
        table.append(_line("all", "", stored))
    lines += ["  " + line for line in aligned(table, right=(2, 3, 4))]
    lines += ["", f"  {'left out':<11} {_left_out(checkpoint)}"]
    for kind in ("missing", "unexpected", "stored twice", "of a wrong shape", "of a wrong dtype"):
        found = checkpoint.wrong.get(kind, [])
        if found or kind in ("missing", "unexpected"):
            lines.append(f"  {kind:<11} {len(found) or 'nothing'}")
            lines += [f"    {line}" for line in found]
    return "\n".join(lines)


def report_stranger(path: Path) -> str | None:
    """Return a page about a single file that is no checkpoint, or of another family; None if it may be one of ours."""
    if not path.is_file():
        return None
    contents = SingleFile.of(path)
    if (what := stranger(contents.shapes)) is None:
        return None
    _, _, count, numbers, size, dtype = _line("", "", contents.stored)
    table = [("kind", what), ("layout", f"{size}, {count} tensors, {numbers} parameters"), ("dtype", dtype)]
    return "\n".join([str(path), *(f"  {name:<11} {value}" for name, value in table)])


def keys(checkpoint: Checkpoint) -> str:
    """Return the name table of a checkpoint: ours, Hub, original, our shape, and the change of layout."""
    from minidiff.checkpoints.original.write import original_tables
    from minidiff.errors import CheckpointError

    try:
        tables = original_tables({part.name: part.model for part in checkpoint.parts})
    except CheckpointError:  # a network without an original spelling: the column repeats the Hub's
        tables = {part.name: part.rows for part in checkpoint.parts}
    lines: list[str] = []
    for part in checkpoint.parts:
        rows = part.rows if part.spelling == "ldm" else tables[part.name]
        table = [("ours", "hub", "original", "shape", "layout"), *_key_lines(part, rows)]
        lines += [f"{part.name or type(part.model).__name__}", *("  " + line for line in aligned(table)), ""]
    return "\n".join(lines).rstrip()


def _key_lines(part: StoredNetwork, rows: Iterable[Row]) -> Iterator[tuple[str, ...]]:
    shapes = expected_shapes(part.model, rows, "ours")
    for row in rows:
        changes = [
            f"{side}: {op.name}" for side, op in (("hub", row.hub_op), ("original", row.ldm_op)) if op is not SAME
        ]
        for i, ours in enumerate(row.ours):
            hub = row.hub[i] if len(row.hub) > 1 else row.hub[0]
            ldm = row.ldm[i] if len(row.ldm) > 1 else row.ldm[0]
            yield ours, hub, ldm, "x".join(map(str, shapes[ours])), "; ".join(changes)


def aligned(table: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Return the lines of a table with columns as wide as need be; those in ``right`` are aligned to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]

    def cell(i: int, text: str) -> str:
        return text.rjust(widths[i]) if i in right else text.ljust(widths[i])

    return ["  ".join(cell(i, text) for i, text in enumerate(row)).rstrip() for row in table]


def _line(name: str, kind: str, stored: Iterable[StoredTensor]) -> tuple[str, ...]:
    stored = list(stored)
    kinds = Counter(_NAMES.get(tensor.dtype, tensor.dtype) for tensor in stored)
    dtype = next(iter(kinds), "-") if len(kinds) < 2 else ", ".join(f"{kind} ({n})" for kind, n in kinds.most_common())
    return name, kind, f"{len(stored):,}", f"{sum(prod(t.shape) for t in stored):,}", _bytes(stored), dtype


def _bytes(stored: Iterable[StoredTensor]) -> str:
    size = sum(tensor.size for tensor in stored)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _prediction(checkpoint: Checkpoint) -> str:
    if checkpoint.prediction is not None:
        return checkpoint.prediction + (", trained with zero terminal SNR" if checkpoint.zero_snr else "")
    if any(type(part.model).__name__ == "UNet2DConditionModel" for part in checkpoint.parts):
        return "not said: epsilon or v_prediction; loading needs prediction_type="
    return "-"


def _left_out(checkpoint: Checkpoint) -> str:
    reasons = Counter(reason for _, reason in checkpoint.dropped)
    lines = [f"{len(checkpoint.dropped)} tensors", *(f"    {n:>4} {reason}" for reason, n in reasons.items())]
    lines = [*(lines if reasons else ()), *(f"{name}: its weights are not there" for name in checkpoint.absent)]
    return "\n".join(lines) or "nothing"
