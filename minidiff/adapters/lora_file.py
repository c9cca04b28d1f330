"""A LoRA file: its tensors as updates of the layers that they are for, or one error with all that does not fit."""

import math
import re
from collections.abc import Mapping
from typing import Any

from minidiff.adapters.forms import Keyed, Update, read_update
from minidiff.adapters.lora import alpha_of
from minidiff.adapters.lora_config import layer_configs, scale_of
from minidiff.adapters.lora_names import LayerName, LoraNames, sort_tensors
from minidiff.adapters.source import AdapterFile
from minidiff.checkpoints.model import Model
from minidiff.checkpoints.original.families import FAMILIES, no_adapter
from minidiff.checkpoints.original.strangers import outside
from minidiff.errors import CheckpointError, shortened

FILE_NAME = "pytorch_lora_weights.safetensors"
_READS_TEXT = re.compile(r".*attn2[._].*to_[kv][._].*(lora_A|down)(\.\w+)?\.weight")  # its width is that of the text
_SAYS_FAMILY = ("ss_base_model_version", "modelspec.architecture")  # kohya's metadata, and ModelSpec's


def read_updates(file: AdapterFile, networks: Mapping[str, Model]) -> dict[str, dict[LayerName, Update]]:
    """Return the updates in a file, component by component; raise one ``CheckpointError`` with all that is wrong."""
    layers, problems = sort_tensors(file.tensors, LoraNames(networks))
    configs = layer_configs(file.metadata, tuple(networks))
    updates: dict[str, dict[LayerName, Update]] = {}
    for layer, given in layers.items():
        module = networks[layer.component].get_submodule(layer.ours)
        try:
            update, wrong = read_update(given, module.weight, module.bias)
            problems += wrong
            scale = 1.0 if wrong else _scale(layer, given, update, configs)
            updates.setdefault(layer.component, {})[layer] = update._replace(scale=scale)
        except (TypeError, ValueError) as error:
            problems.append(str(error))
    if problems:
        if what := outside(file.tensors):
            raise CheckpointError(f"{file.label} is {what}; nothing was changed")
        why = f" ({what})" if (what := _whose(file, networks)) else ""
        lines = "\n".join(f"  {line}" for line in shortened(problems))
        raise CheckpointError(f"{file.label} is no LoRA for this pipeline{why}; nothing was changed:\n{lines}")
    return updates


def _whose(file: AdapterFile, networks: Mapping[str, Model]) -> str | None:
    """Say what a file is that does not fit: no LoRA, or one of another family; None if nothing tells."""
    if what := no_adapter(file.tensors, "a LoRA"):
        return f"it is {what}"
    widths = {one.shape[1] for key, one in file.tensors.items() if _READS_TEXT.fullmatch(key) and one.ndim > 1}
    D = networks["unet"].config.get("cross_attention_dim") if "unet" in networks else None
    if len(widths) == 1 and D not in widths:
        (width,) = widths
        title = next((f", as {family.title} does" for family in FAMILIES if family.ctx == width), "")
        return f"its UNet reads a text of width {width}{title}, this one {D}"
    said = next((field for field in _SAYS_FAMILY if field in file.metadata), None)
    return f"{said} in its header is {file.metadata[said]!r}" if said else None


def _scale(layer: LayerName, given: Keyed, update: Update, configs: Mapping[str, Mapping[str, Any]]) -> float:
    """Return s of a layer: from the file's header, or its own alpha; 1 for what has no rank."""
    config = configs.get(layer.component, {})
    if "alpha" in given and update.form == "difference":
        raise ValueError(f"{given['alpha'][0]}: its layer has a difference, which has no rank to divide it by")
    if config.get("use_dora") and update.form != "DoRA":
        raise ValueError(f"the file's header says that {layer.hub} is DoRA, but it has no lora_magnitude_vector")
    # Without a rank it does not count: a LoKr of whole matrices was asked for rank 100000, which is infinite in half.
    alpha = alpha_of(*given["alpha"]) if "alpha" in given and update.rank else None
    own = 1.0 if alpha is None else alpha / update.rank
    if update.form == "difference" or not config:
        return own
    # Patterns are for the names in the file; transformers 5 has dropped "text_model." from those of one encoder.
    hub = any(layer.hub in key for key, _ in given.values())
    name = layer.hub if hub else layer.hub.removeprefix("text_model.")
    told = scale_of(config, name, update.rank)
    if alpha is not None and not math.isclose(own, told, rel_tol=1e-2):  # it may be stored in half
        said = told * update.rank
        raise ValueError(f"{given['alpha'][0]} is {alpha:g}, but the file's header gives an alpha of {said:g}")
    return told
