"""``AdaptedNetwork``: what a network can do with LoRA by itself, under the names of diffusers and transformers.

    unet.load_lora_adapter("pixel-art.safetensors", prefix="unet", adapter_name="pixel")
    unet.set_adapters(["pixel", "toy"], [0.8, {"mid": 0.5}])

A pipeline that has the network sees the same adapters.
Checked against ``diffusers.loaders.PeftAdapterMixin`` with peft.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from minidiff.adapters.control import AdapterControl, LoadedLora
from minidiff.adapters.forms import KERNELS
from minidiff.adapters.lora import LoraLayer, adapters_of
from minidiff.adapters.lora_config import CONFIG_NAME, KEY
from minidiff.adapters.lora_file import FILE_NAME
from minidiff.adapters.lora_names import KOHYA_NAMES, PEFT_NAMES
from minidiff.adapters.source import AdapterFile, options_of, read_adapter
from minidiff.checkpoints.remap import CONV1X1
from minidiff.checkpoints.save import save_tensors
from minidiff.config import Config
from minidiff.errors import CheckpointError


class AdaptedNetwork(AdapterControl):
    """Mixin of the networks that LoRA adapts."""

    lora_component: ClassVar[str]  # what a file calls the network

    def _lora_networks(self) -> dict[str, Any]:
        return {self.lora_component: self}

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        prefix: str | None = "transformer",
        hotswap: bool = False,
        *,
        adapter_name: str | None = None,
        **options: Any,
    ) -> LoadedLora:
        """Load a LoRA of this network alone.

        Args:
            pretrained_model_name_or_path_or_dict: as in ``LoraLoader.load_lora_weights``, likewise what is not named.
            prefix: what stands before the names of this network in the file; others are left alone. None: nothing. It
                does not count for a folder of PEFT.

        Raises:
            CheckpointError: if no name begins with the prefix; else as ``load_lora_weights``.
        """
        options = options_of("load_lora_adapter", options)
        label, tensors, header, of_peft = read_adapter(pretrained_model_name_or_path_or_dict, FILE_NAME, **options)
        if of_peft:
            parts = {key.partition(".")[0] for key in tensors}
            prefix = self.lora_component if len(parts) > 1 else parts.pop()
        if not (mine := self._of_component(tensors, prefix)):
            raise CheckpointError(f"no tensor of {label} begins with '{prefix}.'; pass prefix='unet', or None for none")
        for key in {KEY, CONFIG_NAME} & header.keys():
            if isinstance(fields := json.loads(header[key]), dict):
                header = {**header, key: json.dumps(self._of_component(fields, prefix))}
        name = self._name_to_swap(adapter_name) if hotswap else self._new_name(adapter_name)
        return self._add_lora(AdapterFile(label, mine, header), name)

    def _of_component(self, entries: Mapping[str, Any], prefix: str | None) -> dict[str, Any]:
        """Return the entries of this network, under the name that its component has in a pipeline."""
        start = "" if prefix is None else f"{prefix}."
        own = f"{self.lora_component}."
        return {own + name[len(start) :]: value for name, value in entries.items() if name.startswith(start)}

    def save_lora_adapter(
        self,
        save_directory: str | Path,
        adapter_name: str = "default",
        upcast_before_saving: bool = False,
        safe_serialization: bool = True,
        weight_name: str | None = None,
    ) -> None:
        """Write an adapter in PEFT's spelling, without a prefix; ranks and alphas stand in the header.

        Layers of a form that the reference does not have get the names of kohya and LyCORIS and an alpha of their own:
        what reads them does not look into the header.

        Args:
            save_directory: made if it does not exist.
            adapter_name: which.
            upcast_before_saving: whether in float32; the reference converts the network too, which stays as it is here.
            weight_name: of the file; default: pytorch_lora_weights.safetensors.
        """
        if not safe_serialization:
            raise CheckpointError("safe_serialization=False asks for a pickle; minidiff writes only safetensors")
        (name,) = self._known(adapter_name)
        if not self._lora_layers(name):
            raise CheckpointError(f"{name!r} changes no layer of this {type(self).__name__}: there is nothing to save")
        tensors: dict[str, Tensor] = {}
        dtype = torch.float32 if upcast_before_saving else None
        ops = {hub.removesuffix(".weight"): row.hub_op for row in self.rows() for hub in row.hub}
        for layer in self._lora_layers(name):
            is_conv = layer.module.weight.ndim == 4 or ops[layer.hub] is CONV1X1
            _, rank, scale, parts = layer.update(name)
            names = PEFT_NAMES if parts.keys() <= PEFT_NAMES.keys() else KOHYA_NAMES
            for part, tensor in parts.items():
                shape = (*tensor.shape, 1, 1)[:4] if is_conv and part in KERNELS else tensor.shape
                if part == "magnitude":  # as PEFT has it
                    shape = (1, -1, 1, 1) if is_conv else (-1,)
                tensors[f"{layer.hub}.{names.get(part, part)}"] = tensor.reshape(shape).to(dtype=dtype)
            if names is KOHYA_NAMES and rank:
                tensors[f"{layer.hub}.alpha"] = torch.tensor(scale * rank)
        path = Path(save_directory, weight_name or FILE_NAME)
        save_tensors(tensors, path, {"format": "pt", KEY: json.dumps(self._lora_config(name), sort_keys=True)})

    @property
    def peft_config(self) -> dict[str, Config]:
        """What peft's configuration of each adapter says of ranks, alphas and layers; absent without adapters."""
        if (adapters := adapters_of(self)) is None:
            raise AttributeError("no adapter is loaded")
        return {name: Config(self._lora_config(name)) for name in adapters.names}

    @peft_config.setter
    def peft_config(self, config: Any) -> None:
        raise NotImplementedError(
            f"peft cannot put its layers into {type(self).__name__}: it fills them by names that are not those of the "
            "modules here. To use an adapter call load_lora_adapter(folder), or load_lora_weights of the pipeline; to "
            "train one is not implemented"
        )

    def _lora_layers(self, name: str) -> list[LoraLayer]:
        return [layer for layer in adapters_of(self).layers.values() if name in layer.forms]

    def _lora_config(self, name: str) -> dict[str, Any]:
        forms = {f"^{layer.hub}": layer.forms[name] for layer in self._lora_layers(name)}
        ranks = {key: form.rank or 1 for key, form in forms.items()}
        alphas = {key: form.scale * ranks[key] for key, form in forms.items()}
        r, alpha = ((Counter(values.values()).most_common(1) or [(1,)])[0][0] for values in (ranks, alphas))
        fields: dict[str, Any] = {"r": r, "lora_alpha": alpha, "target_modules": [key[1:] for key in ranks]}
        fields |= {"use_dora": True} if forms and all("magnitude" in form.parts for form in forms.values()) else {}
        fields |= {"lora_bias": True} if any("up_bias" in form.parts for form in forms.values()) else {}
        fields["rank_pattern"] = {key: value for key, value in ranks.items() if value != r}
        fields["alpha_pattern"] = {key: value for key, value in alphas.items() if value != alpha}
        return fields

    def set_adapters(self, adapter_names: str | Sequence[str], weights: Any = None) -> None:
        """Make these adapters the active ones; ``weights`` as in ``LoraLoader.set_adapters``, or dicts of blocks."""

        def entry(weight: Any) -> Any:
            return {self.lora_component: weight} if isinstance(weight, Mapping) else weight

        several = isinstance(weights, list | tuple)
        super().set_adapters(adapter_names, [entry(one) for one in weights] if several else entry(weights))

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Make these adapters the active ones, each with the weight that it has."""
        self._refuse_fused("change the adapters")
        adapters, names = adapters_of(self), self._known(adapter_name)
        adapters.activate({name: adapters.weights[name] for name in names})

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Raise: new matrices for training need peft, whose configuration this takes in the reference."""
        raise NotImplementedError("add_adapter makes matrices for training, which minidiff does not do: load some")

    def enable_adapters(self) -> None:
        """Do as ``enable_lora``. Raises ``ValueError`` if there is no adapter."""
        self._need_adapter()
        self.enable_lora()

    def disable_adapters(self) -> None:
        """Do as ``disable_lora``. Raises ``ValueError`` if there is no adapter."""
        self._need_adapter()
        self.disable_lora()

    def active_adapters(self) -> list[str]:
        """Return the names of the active adapters. Raises ``ValueError`` if there is no adapter."""
        self._need_adapter()
        return self._active()

    delete_adapter = AdapterControl.delete_adapters  # in transformers

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """Make the active adapters part of the weights, as ``LoraLoader.fuse_lora`` does."""
        self._fuse(self._all_adapters(), lora_scale, safe_fusing, adapter_names)

    def unload_lora(self) -> None:
        """Remove all adapters."""
        self._remove_all()

    def _need_adapter(self) -> None:
        if adapters_of(self) is None:
            raise ValueError(f"{type(self).__name__} has no adapter: load one first")
