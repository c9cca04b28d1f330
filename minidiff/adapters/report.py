"""What the file of an adapter holds, by its header and without its model: ``minidiff inspect FILE_OR_FOLDER``."""

import re
from collections.abc import Iterable
from pathlib import Path

from minidiff.adapters.bundled import PREFIX
from minidiff.adapters.forms import described, rank_of, read_form
from minidiff.adapters.lora_config import COMPONENTS, CONFIG_NAME, WEIGHTS_NAME, component_of
from minidiff.adapters.lora_file import FILE_NAME
from minidiff.adapters.lora_names import stems
from minidiff.checkpoints.gguf import is_gguf
from minidiff.checkpoints.load import SafetensorsFile, StoredTensor, read_header
from minidiff.checkpoints.original.families import stranger
from minidiff.checkpoints.tools.inspect import aligned
from minidiff.config import read_json
from minidiff.errors import shortened

_ORIGINAL = r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)"
SPELLINGS = {  # the first that a name begins like says whose it is; the table in docs/adapters.md has them all
    r"(.*\.)?base_model\.model\.": "PEFT",
    r".*\.lora_(A|B|magnitude_vector)\.[^.]+\.(weight|bias)$": "PEFT in memory, with the name of an adapter",
    r"lycoris_": "SimpleTuner",
    rf"lora_unet_{_ORIGINAL}_": "kohya, with the names of original files",
    r"lora_(unet|te\d?)_": "kohya",
    r"diffusion_model\.|text_encoders\.clip_[lgh]\.": "ComfyUI (OneTrainer writes it too)",
    rf"unet\.{_ORIGINAL}\.|clip_[lg]\.": "OMI (OneTrainer)",
    rf"{_ORIGINAL}\.": "OneTrainer, with the names of original files",
    r".*\.processor\.|.*_lora\.(down|up)\.": "diffusers of early 2023",
    r".*\.(lora|lora_linear_layer)\.(down|up)\.": "diffusers",
    r"(unet|text_encoder(_2)?)\..*\.lora_(A|B|magnitude_vector)": "PEFT, as diffusers writes it",
    r"(unet|text_encoder(_2)?)\.|down_blocks|mid_block|up_blocks|conv_|time_embedding|add_": "the Hub's names",
}


def spelling(keys: Iterable[str]) -> str:
    """Return whose spellings these names are."""
    found = {next((whose for pattern, whose in SPELLINGS.items() if re.match(pattern, key)), "") for key in keys}
    return ", ".join(whose for whose in SPELLINGS.values() if whose in found) or "unknown"


def _stored(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name; the names of PEFT's get their component in front, as for loading."""
    found = {tensor.name: tensor for tensor in read_header(SafetensorsFile(path))}
    if path.name != WEIGHTS_NAME:
        return found
    told = component_of(read_json(path.with_name(CONFIG_NAME)))
    component = path.parent.name if path.parent.name in COMPONENTS else told
    return {f"{component}.{name}": tensor for name, tensor in found.items()}


def report_adapter(path: Path) -> str | None:
    """Return a page about a file of LoRA or another form: whose spelling, networks, layers, forms, ranks, words; None
    if it is none, or for a model of another family. A folder may be of PEFT."""
    inside = (path / FILE_NAME, path / WEIGHTS_NAME, *(path / part / WEIGHTS_NAME for part in COMPONENTS))
    if path.is_file() and is_gguf(path):
        return None
    files = [path] if path.is_file() else [file for file in inside if file.is_file()]
    stored = {name: tensor for file in files for name, tensor in _stored(file).items()}
    layers = stems(stored)
    if stranger(stored, "a LoRA") or not any(roles.keys() - {"alpha"} for roles in layers.values()):
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
    words = [key.removeprefix(PREFIX) for key in stored if key.startswith(PREFIX)]
    wrong += [f"{key}: no part of an adapter" for key in stored if key not in known and not key.startswith(PREFIX)]
    source = "file" if path.is_file() else "folder"
    table = [("kind", f"an adapter: load its model, then call pipe.load_lora_weights({source})")]
    table.append(("spelling", spelling(known)))
    table += [(component, f"{len(found)} layers: {described(found)}") for component, found in kinds.items()]
    table += [("embeddings", ", ".join(words))] if words else []
    table.append(("unexpected", str(len(wrong) or "nothing")))
    lines = [str(path), *("  " + line for line in aligned(table)), *(f"    {line}" for line in shortened(wrong))]
    return "\n".join(lines)
