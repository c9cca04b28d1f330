"""``AdapterControl``: what a pipeline and a network alike can do with the LoRA adapters that they have."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from minidiff.adapters.forms import Update, described
from minidiff.adapters.lora import Adapters, adapters_of, remove_adapters
from minidiff.adapters.lora_file import read_updates
from minidiff.adapters.lora_weights import component_weights
from minidiff.adapters.source import AdapterFile
from minidiff.checkpoints.model import Model
from minidiff.errors import check_number

logger = logging.getLogger("minidiff")


@dataclass(frozen=True)
class LoadedLora:
    """What ``load_lora_weights`` did: the Hub names of the layers that it changes in each network, with their ranks."""

    adapter_name: str
    layers: dict[str, dict[str, int]]  # component -> Hub name of a layer -> rank, 0 where there is none
    forms: dict[str, dict[str, str]]  # component -> Hub name of a layer -> form, see ``minidiff.adapters.forms``
    words: tuple[str, ...] = ()  # the embeddings in the file

    def __str__(self) -> str:
        counts = []
        for component, ranks in self.layers.items():
            kinds = described(zip(self.forms[component].values(), ranks.values(), strict=True))
            counts.append(f"{len(ranks)} layers of {component} ({kinds})")
        brings = f", and brings the words {', '.join(self.words)}" if self.words else ""
        return f"LoRA {self.adapter_name!r} adapts {', '.join(counts)}{brings}"


class AdapterControl:
    """Adapters of some networks: adding, choosing, fusing and removing them."""

    def _lora_networks(self) -> dict[str, Model]:
        """Return the networks by the names that files have for them."""
        raise NotImplementedError

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
        weights = [component_weights(entry, self._lora_networks()) for entry in entries]
        for component, adapters in self._all_adapters().items():
            adapters.activate({name: weight[component] for name, weight in zip(names, weights, strict=True)})

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove some adapters; one that is not there costs a warning. Where no active one is left, the oldest becomes
        active, as in the reference."""
        self._refuse_fused("delete adapters")
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name not in self._names():
                logger.warning("there is no adapter %r to delete", name)
            for adapters in self._all_adapters().values():
                adapters.delete(name)
        for adapters in self._all_adapters().values():
            if not adapters.names:
                remove_adapters(adapters.network)

    def disable_lora(self) -> None:
        """Work without the adapters until ``enable_lora``; fused ones are taken out of the weights."""
        for adapters in self._all_adapters().values():
            adapters.unfuse()
            adapters.enable(False)

    def enable_lora(self) -> None:
        """Work with the active adapters again."""
        for adapters in self._all_adapters().values():
            adapters.enable(True)

    def _add_lora(self, file: AdapterFile, name: str, words: tuple[str, ...] = ()) -> LoadedLora:
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
        ranks, forms = (
            {part: {layer.hub: getattr(one, field) for layer, one in found.items()} for part, found in updates.items()}
            for field in ("rank", "form")
        )
        loaded = LoadedLora(name, ranks, forms, words)
        logger.info("%s", loaded)
        return loaded

    def _add_to(self, network: Model, component: str, name: str, layers: Mapping[str, tuple[str, Update]]) -> None:
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

    def _fuse(
        self, chosen: Mapping[str, Adapters], scale: float, safe: bool, adapter_names: Sequence[str] | None
    ) -> None:
        """Make the active adapters part of the weights; see ``LoraLoader.fuse_lora``."""
        check_number("lora_scale", scale)
        if adapter_names is not None and set(self._known(adapter_names)) != set(self._active()):
            raise ValueError(
                f"adapter_names={list(adapter_names)}, but {self._active()} are active; choose them with "
                "set_adapters() first"
            )
        if fused := [component for component, adapters in chosen.items() if adapters.fused]:
            raise ValueError(f"the adapters of {', '.join(fused)} are fused already; call unfuse_lora() first")
        chosen = {name: adapters for name, adapters in chosen.items() if adapters.active and adapters.enabled}
        if not chosen:
            raise ValueError("there is no active adapter to fuse")
        with ExitStack() as undo:
            for adapters in chosen.values():
                adapters.fuse(scale, safe)
                undo.callback(adapters.unfuse)
            undo.pop_all()

    def _remove_all(self) -> None:
        for adapters in self._all_adapters().values():
            remove_adapters(adapters.network)

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

    def _active(self) -> list[str]:
        return list(dict.fromkeys(name for adapters in self._all_adapters().values() for name in adapters.active))

    def _names(self) -> set[str]:
        return {name for adapters in self._all_adapters().values() for name in adapters.names}

    def _known(self, names: str | Iterable[str]) -> list[str]:
        names, there = [names] if isinstance(names, str) else list(names), self._names()
        if not names or set(names) - there or len(set(names)) < len(names):
            raise ValueError(f"there are the adapters {sorted(there)}; found {names}")
        return names

    def _new_name(self, name: str | None, others: Iterable[str] = ()) -> str:
        """Return the name of a new adapter, which is none of the others that there are besides."""
        taken = self._names() | set(others)
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
        if name not in (there := sorted(self._names())):
            raise ValueError(f"hotswap=True replaces one of the adapters {there}; found {name!r} as adapter_name")
        self._refuse_fused("replace an adapter")
        return str(name)

    def _refuse_fused(self, what: str) -> None:
        if self.fused_loras:
            raise ValueError(
                f"cannot {what} while {', '.join(sorted(self.fused_loras))} is fused: call unfuse_lora() first, or "
                "unload_lora_weights() to keep the fused weights"
            )
