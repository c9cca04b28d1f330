"""What the file of an adapter holds, by its header and without its model: ``minidiff inspect FILE``."""

from pathlib import Path

from minidiff.adapters.forms import described, rank_of, read_form
from minidiff.adapters.lora_names import stems
from minidiff.checkpoints.load import read_header
from minidiff.checkpoints.tools.inspect import aligned
from minidiff.errors import shortened


def report_adapter(path: Path) -> str | None:
    """Return a page about a file of LoRA or another form: networks, layers, forms, ranks; None if it is none."""
    stored = {tensor.name: tensor for tensor in read_header(path.name, path)}
    layers = stems(stored)
    if not any(roles.keys() - {"alpha"} for roles in layers.values()):
        return None
    kinds: dict[str, list[tuple[str, int]]] = {}
    wrong = []
    for (component, _), roles in layers.items():
        try:
            form, shapes = read_form({role: (key, None) for role, key in roles.items()})
            rank = rank_of({role: stored[key].shape for role, key in roles.items()}, shapes)
            kinds.setdefault(component, []).append((form, rank))
        except ValueError as error:
            wrong.append(str(error))
    known = {key for roles in layers.values() for key in roles.values()}
    wrong += [f"{key}: no part of an adapter" for key in stored if key not in known]
    table = [("kind", "an adapter: load its model, then call pipe.load_lora_weights(file)")]
    table += [(component, f"{len(found)} layers: {described(found)}") for component, found in kinds.items()]
    table.append(("unexpected", str(len(wrong) or "nothing")))
    lines = [str(path), *("  " + line for line in aligned(table)), *(f"    {line}" for line in shortened(wrong))]
    return "\n".join(lines)
