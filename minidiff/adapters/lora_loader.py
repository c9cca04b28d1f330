"""``LoraLoader``: what a pipeline can do with LoRA, under the reference's names.

    pipe.load_lora_weights("pixel-art.safetensors", adapter_name="pixel")
    pipe.set_adapters(["pixel", "toy"], [0.8, 0.5])
    pipe(prompt, cross_attention_kwargs={"scale": 0.7})
    pipe.fuse_lora()

The adapters belong to the networks, so pipelines that share networks share their adapters. Checked against
``diffusers.loaders.StableDiffusionLoraLoaderMixin`` and ``StableDiffusionXLLoraLoaderMixin`` with peft;
docs/adapters.md lists where it differs.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from minidiff.adapters.lora import (
    Adapters,
    LowRank,
    Weight,
    adapters_of,
    check_number,
    check_updates,
    remove_adapters,
    scale_from,
)
from minidiff.adapters.lora_config import layer_configs, scale_of
from minidiff.adapters.lora_names import Found, LayerName, Names, sort_tensors
from minidiff.adapters.lora_weights import component_weights
from minidiff.adapters.source import AdapterFile, read_adapter
from minidiff.checkpoints.model import Model, refuse_pickles, refuse_unless_harmless
from minidiff.checkpoints.original.families import FAMILIES, no_adapter
from minidiff.errors import CheckpointError, shortened

logger = logging.getLogger("minidiff")

FILE_NAME = "pytorch_lora_weights.safetensors"
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_READS_TEXT = re.compile(r".*attn2[._].*to_[kv][._].*(lora_A|down)\.weight")  # its width is that of the text
_SAYS_FAMILY = ("ss_base_model_version", "modelspec.architecture")  # kohya's metadata, and ModelSpec's


@dataclass(frozen=True)
class LoadedLora:
    """What ``load_lora_weights`` did: the Hub names of the layers that it adapts in each network, with their ranks."""

    adapter_name: str
    layers: dict[str, dict[str, int]]  # component -> Hub name of a layer -> rank

    def __str__(self) -> str:
        counts = []
        for component, ranks in self.layers.items():
            spread = "-".join(str(rank) for rank in sorted({min(ranks.values()), max(ranks.values())}))
            counts.append(f"{len(ranks)} layers of {component} (rank {spread})")
        return f"LoRA {self.adapter_name!r} adapts {', '.join(counts)}"


class LoraLoader:
    """Adds LoRA to a pipeline with ``unet``, ``text_encoder`` and ``text_encoder_2``, or some of them."""

    components: Mapping[str, Any]

    # --- loading and unloading ---------------------------------------------------------------------------------------

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        use_safetensors: bool | None = None,
        **harmless: Any,
    ) -> LoadedLora:
        """Load a LoRA file and make it the active adapter of the networks that it is for.

        Adapters that are fused there are taken out of the weights, as in the reference. Everything is checked before
        anything is changed. The spellings are listed in ``minidiff.adapters.lora_names``.

        Args:
            pretrained_model_name_or_path_or_dict: a safetensors file, a folder, a Hub id, or tensors by name.
            adapter_name: what to call it; default: default_0, default_1...
            hotswap: whether it takes the place of the adapter of this name: active or not as that one, at the weight 1.
            weight_name: the file in the folder or repository; default: pytorch_lora_weights.safetensors, or the only
                safetensors file there.

        Returns:
            which layers it adapts; the same is logged.

        Raises:
            CheckpointError: one error with all tensors that have no layer in this pipeline, lack their other matrix,
                have a wrong shape, or belong to a kind of adapter that is not implemented.
            CheckpointNotFoundError: if there is no such file.
            ValueError: if the name is taken, or, with ``hotswap``, if it is not, or fused.
        """
        refuse_pickles(use_safetensors)
        if unknown := refuse_unless_harmless(harmless):
            raise TypeError(f"load_lora_weights got unknown arguments {', '.join(unknown)}")
        where = {"subfolder": subfolder, "revision": revision, "cache_dir": cache_dir, "token": token}
        where |= {"local_files_only": local_files_only, "force_download": force_download}
        name = self._name_to_swap(adapter_name) if hotswap else self._new_name(adapter_name)
        file = read_adapter(pretrained_model_name_or_path_or_dict, FILE_NAME, weight_name, **where)
        return self._add_lora(file, name)

    def _add_lora(self, file: AdapterFile, name: str) -> LoadedLora:
        """Add an adapter to the networks that its file is for, in the place of one of this name if there is one."""
        networks = self._lora_networks()
        updates = read_updates(file, networks)
        there = self._all_adapters()
        for component, network in networks.items():
            layers = {layer.ours: (layer.hub, update) for layer, update in updates.get(component, {}).items()}
            if component in there and name in there[component].names:
                there[component].swap(name, layers)
            elif layers:
                self._add_to(network, component, name, layers)
        ranks = {
            component: {layer.hub: len(update.down) for layer, update in layers.items()}
            for component, layers in updates.items()
        }
        loaded = LoadedLora(name, ranks)
        logger.info("%s", loaded)
        return loaded

    def _add_to(self, network: Model, component: str, name: str, layers: Mapping[str, tuple[str, LowRank]]) -> None:
        """Add an adapter to a network; those that are fused there are taken out of the weights."""
        if adapters_of(network) is None:
            network._lora = Adapters(network)
        adapters = adapters_of(network)
        if fused := adapters.fused:
            logger.warning("%s of %s is no longer fused: %r takes its place", ", ".join(fused), component, name)
            adapters.unfuse()
        if not adapters.enabled:  # as in the reference
            logger.warning("the adapters of %s are disabled, %r too: call enable_lora()", component, name)
        adapters.add(name, layers)

    def enable_lora_hotswap(self, **options: Any) -> None:
        """Do nothing: an adapter may be replaced by one of any rank, which the reference has to prepare."""

    def unload_lora_weights(self) -> None:
        """Remove all adapters. The weights are bit for bit the originals; but those that are fused stay so."""
        for network in self._lora_networks().values():
            if adapters_of(network) is not None:
                remove_adapters(network)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove some adapters; one that is not there costs a warning. Where no active one is left, the oldest becomes
        active, as in the reference."""
        self._refuse_fused("delete adapters")
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if not any(name in adapters.names for adapters in self._all_adapters().values()):
                logger.warning("there is no adapter %r to delete", name)
            for adapters in self._all_adapters().values():
                adapters.delete(name)
        for network in self._lora_networks().values():
            if adapters_of(network) is not None and not adapters_of(network).names:
                remove_adapters(network)

    # --- which of them count, and how much ---------------------------------------------------------------------------

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Make these adapters the active ones.

        Args:
            adapter_names: one name or several.
            adapter_weights: what to multiply them with, 1 by default: a number for all, or a list with one entry each.
                An entry may also be a dict of components and blocks, see ``minidiff.adapters.lora_weights``.

        Raises:
            ValueError: naming an adapter, component or block that is not there.
        """
        self._refuse_fused("change the adapters")
        names = self._known(adapter_names)
        entries = list(adapter_weights) if isinstance(adapter_weights, list | tuple) else [adapter_weights] * len(names)
        if len(entries) != len(names):
            raise ValueError(f"adapter_weights has {len(entries)} entries for {len(names)} adapters")
        networks = self._lora_networks()
        weights: dict[str, dict[str, Weight]] = {component: {} for component in networks}
        for name, entry in zip(names, entries, strict=True):
            for component, weight in component_weights(entry, networks).items():
                weights[component][name] = weight
        for component, adapters in self._all_adapters().items():
            adapters.activate(weights[component])

    def get_active_adapters(self) -> list[str]:
        """Return the names of the active adapters."""
        return list(dict.fromkeys(name for adapters in self._all_adapters().values() for name in adapters.active))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the names of all adapters of each network that has some."""
        return {component: list(adapters.names) for component, adapters in self._all_adapters().items()}

    def disable_lora(self) -> None:
        """Work without the adapters until ``enable_lora``; fused ones are taken out of the weights."""
        for adapters in self._all_adapters().values():
            adapters.unfuse()
            adapters.enable(False)

    def enable_lora(self) -> None:
        """Work with the active adapters again."""
        for adapters in self._all_adapters().values():
            adapters.enable(True)

    # --- fusing ------------------------------------------------------------------------------------------------------

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Make the active adapters part of the weights: W + s B A costs nothing in a call, but cannot be scaled there.

        Args:
            components: the networks; default: all.
            lora_scale: what to multiply all adapters with.
            safe_fusing: raise, and change nothing, if a weight becomes infinite or NaN.
            adapter_names: must be the active ones, if given.

        Raises:
            ValueError: if there is nothing to fuse, or naming what is not there or is fused already.
        """
        chosen = self._chosen(components)
        check_number("lora_scale", lora_scale)
        if adapter_names is not None and set(self._known(adapter_names)) != set(self.get_active_adapters()):
            raise ValueError(
                f"adapter_names={list(adapter_names)}, but {self.get_active_adapters()} are active; choose them with "
                "set_adapters() first"
            )
        if fused := [component for component, adapters in chosen.items() if adapters.fused]:
            raise ValueError(f"the adapters of {', '.join(fused)} are fused already; call unfuse_lora() first")
        chosen = {name: adapters for name, adapters in chosen.items() if adapters.active and adapters.enabled}
        if not chosen:
            raise ValueError("there is no active adapter to fuse")
        for adapters in chosen.values():
            adapters.fuse(lora_scale, safe_fusing)

    def unfuse_lora(self, components: Sequence[str] | None = None) -> None:
        """Put the original weights back: the very tensors, not W + s B A - s B A as in the reference.

        If nothing is fused, a warning says so: what fused and then unloaded has no originals any more.
        """
        chosen = [adapters for adapters in self._chosen(components).values() if adapters.fused]
        if not chosen:
            logger.warning("no adapter is fused; after unload_lora_weights() the original weights are gone")
        for adapters in chosen:
            adapters.unfuse()

    @property
    def fused_loras(self) -> set[str]:
        """The names of the adapters that are fused."""
        return {name for adapters in self._all_adapters().values() for name in adapters.fused}

    @property
    def num_fused_loras(self) -> int:
        """The number of adapters that are fused."""
        return len(self.fused_loras)

    # --- what there is -----------------------------------------------------------------------------------------------

    def _lora_networks(self) -> dict[str, Model]:
        return {name: self.components[name] for name in COMPONENTS if self.components.get(name) is not None}

    def _all_adapters(self) -> dict[str, Adapters]:
        found = {component: adapters_of(network) for component, network in self._lora_networks().items()}
        return {component: adapters for component, adapters in found.items() if adapters is not None}

    def _chosen(self, components: Sequence[str] | None) -> dict[str, Adapters]:
        if components is None:
            return self._all_adapters()
        networks = self._lora_networks()
        if isinstance(components, str) or not components or set(components) - set(networks):
            raise ValueError(f"components should be a list of some of {', '.join(networks)}; found {components!r}")
        return {component: adapters for component, adapters in self._all_adapters().items() if component in components}

    def _known(self, names: str | Iterable[str]) -> list[str]:
        names = [names] if isinstance(names, str) else list(names)
        there = {name for adapters in self._all_adapters().values() for name in adapters.names}
        if not names or set(names) - there or len(set(names)) < len(names):
            raise ValueError(f"there are the adapters {sorted(there)}; found {names}")
        return names

    def _new_name(self, name: str | None) -> str:
        taken = {name for adapters in self._all_adapters().values() for name in adapters.names}
        if name is None:
            return next(new for k in range(len(taken) + 1) if (new := f"default_{k}") not in taken)
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"adapter_name should be a text without '.', found {name!r}")
        if name in taken:
            raise ValueError(
                f"there is an adapter {name!r} already; choose another adapter_name or delete_adapters() it"
            )
        return name

    def _name_to_swap(self, name: str | None) -> str:
        there = sorted({name for adapters in self._all_adapters().values() for name in adapters.names})
        if name not in there:
            raise ValueError(f"hotswap=True replaces one of the adapters {there}; found {name!r} as adapter_name")
        self._refuse_fused("replace an adapter")
        return str(name)

    def _say_what_is_scaled(self, scale: float) -> None:
        """Warn if a call asks for another scale and there is nothing to scale, which the reference leaves unsaid."""
        adapters = self._all_adapters().values()
        if scale != 1 and all(one.fused for one in adapters):
            why = f"{', '.join(sorted(self.fused_loras))} is fused" if adapters else "no LoRA is loaded"
            logger.warning("cross_attention_kwargs={'scale': %g} has no effect: %s", scale, why)

    def _refuse_fused(self, what: str) -> None:
        if self.fused_loras:
            raise ValueError(
                f"cannot {what} while {', '.join(sorted(self.fused_loras))} is fused: call unfuse_lora() first, or "
                "unload_lora_weights() to keep the fused weights"
            )


def read_updates(file: AdapterFile, networks: Mapping[str, Model]) -> dict[str, dict[LayerName, LowRank]]:
    """Return the updates in a file, component by component; raise one ``CheckpointError`` with all that is wrong."""
    layers, problems = sort_tensors(file.tensors, Names(networks))
    for component, network in networks.items():
        mine = [(layer.ours, *found.down, *found.up) for layer, found in layers.items() if layer.component == component]
        problems += check_updates(network, mine)
    configs = layer_configs(file.metadata, tuple(networks))
    updates: dict[str, dict[LayerName, LowRank]] = {}
    for layer, found in layers.items():
        try:
            scale = _scale(layer, found, configs)
        except ValueError as error:
            problems.append(str(error))
            continue
        update = LowRank(found.down[1], found.up[1], scale)
        updates.setdefault(layer.component, {})[layer] = update
    if problems:
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


def _scale(layer: LayerName, found: Found, configs: Mapping[str, Mapping[str, Any]]) -> float:
    """Return s of a layer: from the file's header, or its own alpha."""
    rank = found.down[1].shape[0] if found.down[1].ndim else 0
    if rank == 0:
        return 1.0  # a wrong shape, which is reported
    if found.alpha is None:
        return scale_of(configs.get(layer.component, {}), layer.hub, rank)
    if layer.component in configs:
        raise ValueError(f"{found.alpha[0]}: the file's header gives an alpha too; there should be one")
    return scale_from(*found.alpha, rank)
