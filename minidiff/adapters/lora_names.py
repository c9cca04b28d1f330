"""The names of LoRA tensors: from the spellings of many programs to the layers of our networks, by the name table.

===================  =================================================================================================
written by           the matrix A of the first query of a UNet, and of its text encoder
===================  =================================================================================================
PEFT                 unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight
                     text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight
diffusers            unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight
                     text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight
diffusers, 2023      unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight
                     text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight
kohya                lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight
                     lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight
kohya, SDXL          lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight
                     lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight
ComfyUI, OneTrainer  diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_A.weight
                     text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight
OneTrainer, OMI      unet.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_down.weight
                     clip_l.text_model.encoder.layers.0.self_attn.q_proj.lora_down.weight
OneTrainer, bare     input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_A.weight
SimpleTuner          lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight
PEFT, wrapped        base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight
PEFT, in memory      unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.default.weight
===================  =================================================================================================

A dotted name is a name of the Hub's column, or of the original single file's for a UNet. Kohya writes "_" for ".",
which cannot be undone by looking at the name ("to_q" has one of its own), so all names of the table are written that
way once and looked up. Endings and beginnings are independent: any beginning may have any ending.
docs/adapters.md says where each spelling was read.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from minidiff.adapters.forms import LYCORIS_PARTS
from minidiff.checkpoints.model import Model
from minidiff.checkpoints.names import unwrapped
from minidiff.compat.published import own_modules

Role = str  # a part of ``minidiff.adapters.forms``

_ENDINGS: dict[str, Role] = {".lora_A.weight": "down", ".lora_B.weight": "up", ".alpha": "alpha"}
for _stem in (".lora.", ".lora_linear_layer.", "_lora.", ".lora_"):
    _ENDINGS |= {f"{_stem}down.weight": "down", f"{_stem}up.weight": "up"}
_ENDINGS |= {".lora_mid.weight": "mid", ".lora_B.bias": "up_bias", ".lora_up.bias": "up_bias"}
_ENDINGS |= {".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude"}
_ENDINGS |= {".diff": "diff", ".diff_b": "diff_b", ".w_norm": "diff", ".b_norm": "diff_b", ".dora_scale": "dora_scale"}
_ENDINGS |= {f".{part}": part for part in LYCORIS_PARTS}
PEFT_NAMES = {  # of the parts that PEFT has
    "down": "lora_A.weight",
    "up": "lora_B.weight",
    "up_bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
}
# The same beside parts that PEFT does not have; those of LyCORIS are called as here.
KOHYA_NAMES = PEFT_NAMES | {part: f"lora_{part}.weight" for part in ("down", "up", "mid")}
_KOHYA = {  # beginning of a name -> component
    "lora_unet_": "unet",
    "lycoris_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_BEGINNINGS = _KOHYA | {f"{name}.": name for name in ("unet", "text_encoder", "text_encoder_2")}
_BEGINNINGS |= {
    "diffusion_model.": "unet",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "clip_l.": "text_encoder",
    "clip_g.": "text_encoder_2",
}
_WRAPPED = re.compile(r"(?<![^.])base_model\.model\.")
# The name of an adapter, inside a tensor's name.
_ADAPTER = re.compile(r"(\.lora_(?:A|B|magnitude_vector))\.([^.]+)(?=\.(?:weight|bias)$)")
_OLD_UNET = {"to_out": "to_out.0"}  # "to_out_lora" adapts "to_out.0"
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}

NOT_IMPLEMENTED = {  # pattern of a name -> the kind of adapter that it gives away
    r"\.boft_": "BOFT (butterflies of rotations)",
    r"\.oft_": "OFT (rotations)",
    r"\.[ab][12]\.weight$|\.bm\.weight$": "GLoRA",
    r"\.on_input$|\.ia3_": "IA3 (factors of activations)",
    r"\.vera_": "VeRA (shared random matrices)",
}


class LayerName(NamedTuple):
    """One layer of a pipeline's networks."""

    component: str
    ours: str
    hub: str


class LoraNames:
    """The layers that adapters change, linear and convolutional ones and norms, by every name that a file may use."""

    def __init__(self, networks: Mapping[str, Model]) -> None:
        self.networks = networks
        self.dotted: dict[str, dict[str, LayerName]] = {}  # component -> name -> layer
        self.flat: dict[str, dict[str, LayerName]] = {}  # the same with "_" for "."
        for component, network in networks.items():
            self.dotted[component] = {}
            self.flat[component] = {}
            for layer, original in _layers(component, network):
                for name in {layer.hub, original} - {None}:
                    _enter(self.dotted[component], name, layer)
                    _enter(self.flat[component], name.replace(".", "_"), layer)

    def find(self, key: str) -> tuple[LayerName, Role] | str:
        """Return the layer that a tensor belongs to and its role there, or the reason why there is none."""
        for pattern, kind in NOT_IMPLEMENTED.items():
            if re.search(pattern, key):
                return f"{kind}, which minidiff does not implement"
        if (parts := _taken_apart(key)) is None:
            return "no part of a LoRA layer in any spelling that minidiff knows"
        component, flat, name, ending = parts
        if component not in self.networks:
            return f"for {component}, which this pipeline does not have"
        if not flat:
            name = self._modern(component, name, old=ending.startswith("_"))
        if layer := (self.flat if flat else self.dotted)[component].get(name):
            return layer, _ENDINGS[ending]
        return f"for a layer {name!r}, which {component} does not have"

    def _modern(self, component: str, name: str, old: bool) -> str:
        """Return a dotted name in the Hub's modern spelling."""
        name = name.replace(".processor.", ".")
        if old:
            stem, dot, last = name.rpartition(".")
            name = stem + dot + (_OLD_UNET if component == "unet" else _OLD_TEXT).get(last, last)
        modern = self.networks[component].canonical_hub_name(f"{name}.weight")
        return name if modern is None else modern.removesuffix(".weight")


def _taken_apart(key: str) -> tuple[str, bool, str, str] | None:
    """Return component, whether dots are "_", layer and ending of a tensor's name, without wrappers and the adapter.

    Files that hold a UNet's layers alone, saved by the UNet itself, name no component.
    """
    name = _ADAPTER.sub(r"\1", _WRAPPED.sub("", unwrapped(key)))
    ending = next((one for one in _ENDINGS if name.endswith(one)), None)
    start = next((one for one in _BEGINNINGS if name.startswith(one)), "")
    layer = name[len(start) :].removesuffix(ending or "")
    return None if ending is None else (_BEGINNINGS.get(start, "unet"), start in _KOHYA, layer, ending)


def _enter(names: dict[str, LayerName], name: str, layer: LayerName) -> None:
    other = names.setdefault(name, layer)
    assert other is layer, f"{name} is two layers: {layer} and {other}"


def _layers(component: str, network: Model) -> Iterator[tuple[LayerName, str | None]]:
    """Yield each layer that adapters change, with its name in the UNet of an original single file."""
    modules = dict(own_modules(network))
    for row in network.rows():
        for k, (ours, hub) in enumerate(zip(row.ours, row.hub, strict=True)):
            layer = ours.removesuffix(".weight")
            if layer != ours and isinstance(modules[layer], nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm):
                original = row.ldm[k].removesuffix(".weight") if component == "unet" else None
                yield LayerName(component, layer, hub.removesuffix(".weight")), original


def sort_tensors(tensors: Mapping[str, Tensor], names: LoraNames) -> tuple[dict[LayerName, dict], list[str]]:
    """Group the tensors of a file by layer and role; also return a line for each tensor that belongs to no layer."""
    layers: dict[LayerName, dict[Role, tuple[str, Tensor]]] = {}
    adapters = dict.fromkeys(found[2] for key in tensors if (found := _ADAPTER.search(key)))
    problems = [f"it holds the adapters {', '.join(adapters)}: give one of them alone"] if len(adapters) > 1 else []
    for key, tensor in tensors.items():
        found = names.find(key)
        if isinstance(found, str):
            problems.append(f"{key}: {found}")
            continue
        layer, part = found
        first, _ = layers.setdefault(layer, {}).setdefault(part, (key, tensor))
        if first != key:
            problems.append(f"{key}: the same tensor as {first}")
    return layers, problems


def stems(keys: Iterable[str]) -> dict[tuple[str, str], dict[Role, str]]:
    """Group names in a file by component and layer, as far as they can be without the networks: role -> name."""
    found: dict[tuple[str, str], dict[Role, str]] = {}
    for key in keys:
        if parts := _taken_apart(key):
            component, _, layer, ending = parts
            found.setdefault((component, layer), {})[_ENDINGS[ending]] = key
    return found
