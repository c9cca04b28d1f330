"""``Named``: a network that answers to the Hub's names, lists itself by them, and takes weights in any spelling."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from minidiff.checkpoints.original.prefixes import without_prefix
from minidiff.checkpoints.remap import Row
from minidiff.compat.attention import kind_of
from minidiff.compat.published import Names, Part, Published, Tree, grow
from minidiff.config import Config

# Published names right below a network, of which none is ours: to set one is to exchange what has that name.
_TOP = frozenset(
    "down_blocks mid_block up_blocks time_embedding add_embedding class_embedding conv_norm_out text_model".split()
)


class Named(Published):
    """Base of every network: the published tree, and ``state_dict`` and ``load_state_dict`` by the name table."""

    config: Config

    def rows(self) -> list[Row]:
        """Return the rows of the name table that belong to this configuration."""
        raise NotImplementedError

    @classmethod
    def canonical_hub_name(cls, name: str) -> str | None:
        """Return the modern Hub spelling of a stored name, or None for a tensor that is left out on purpose."""
        return name

    def published(self) -> Part:
        """Return the published tree, made anew if modules have been exchanged since."""
        return self._published_tree().root

    def _listed(self) -> Mapping[str, nn.Module | None]:
        return self.published()._modules

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _TOP and isinstance(value, nn.Module | None):
            setattr(self.published(), name, value)
        else:
            nn.Module.__setattr__(self, name, value)
            self._tell(value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for module in self._modules.values():
            self._tell(module)

    def _tell(self, module: Any) -> None:
        """Tell a part that has its published name as its own to whom it belongs."""
        if isinstance(module, Published):
            vars(module)["_network"] = self

    def _published_tree(self) -> Tree:
        tree = vars(self).get("_tree")
        if tree is not None and tree.seen[0][0] is not self._modules:
            tree = None  # a foreign copy brought along what belongs to another
        if tree is None or not tree.current():
            tree = vars(self)["_tree"] = grow(self, self.rows(), self.config, kind_of, tree.parts if tree else {})
        return tree

    def __getattr__(self, name: str) -> Any:
        own = vars(self)
        if any(name in own.get(kind, ()) for kind in ("_modules", "_parameters", "_buffers")):
            return nn.Module.__getattr__(self, name)
        if not name.startswith("_") and "config" in own:
            parts = self.published()._modules
            if name in parts:
                return parts[name]
            if name in ("mid_block", "class_embedding") and "down_blocks" in parts:
                return None  # of a UNet that has none
            if name in self.config:
                warnings.warn(
                    f"{type(self).__name__}.{name} is deprecated: write {type(self).__name__}.config.{name}",
                    FutureWarning,
                    stacklevel=2,
                )
                return self.config[name]
            for half in ("text_model", "vision_model"):  # transformers 5 writes no prefix
                if half in parts and name in parts[half]._modules:
                    return parts[half]._modules[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def state_dict(
        self, *args: Any, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Return the weights under their published names and in the Hub's layout, as views where that is another."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        names = self._published_tree().names
        mine = {key[len(prefix) :]: state.pop(key) for key in list(state) if key.startswith(prefix)}
        found = {}
        for name, tensor in mine.items():
            op = names.ops.get(names.plain(name))
            found[names.published(names.plain(name))] = tensor if op is None else op.from_ours((tensor,))[0]
        order = [name for name, _ in [*self.named_parameters(), *self.named_buffers()]]
        state.update((prefix + name, found[name]) for name in dict.fromkeys([*order, *found]) if name in found)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take over weights, in the Hub's spelling (old or new), in ours or in that of an original single file.

        Raises:
            RuntimeError: listing by their published names those that are missing, unexpected or of a wrong shape.
        """
        names = self._published_tree().names
        try:
            found = super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            text = re.sub(r"[\w.]+\.\w+", lambda match: names.published(match[0]), str(error))
            raise RuntimeError(text) from None
        missing = [names.published(name) for name in found.missing_keys]
        return type(found)(missing, found.unexpected_keys)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Translate what is meant for this network; torch then loads it, alone or inside another module."""
        mine = {key[len(prefix) :]: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        translated = self._ours(mine, self._published_tree().names)
        state_dict.update((prefix + name, tensor) for name, tensor in translated.items())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _ours(self, state: dict[str, Tensor], names: Names) -> dict[str, Tensor]:
        """Return weights of any spelling under our names; what is not in the table keeps the end of its name."""
        own, known = ({name for row in names.rows for name in row.names(column)} for column in ("ours", "hub"))
        state = {name if name in own else without_prefix(name): tensor for name, tensor in state.items()}
        modern = {name: self.canonical_hub_name(name) for name in state if name not in own}
        modern = {name: hub for name, hub in modern.items() if hub is None or hub in known}
        state = {modern.get(name, name): tensor for name, tensor in state.items() if modern.get(name, name) is not None}
        result: dict[str, Tensor] = {}
        for row in names.rows:
            for spelling in ("ours", "hub", "ldm"):
                if all(name in state for name in row.names(spelling)):
                    tensors = tuple(state.pop(name) for name in row.names(spelling))
                    result.update(zip(row.ours, row.op(spelling).to_ours(tensors), strict=True))
                    break
        inner = {hub: ours for ours, hub in [*names.modules.items(), *names.layers.items()]}
        for name, tensor in state.items():
            heads = [name[: match.start()] for match in re.finditer(r"\.", name)]
            head = next((head for head in reversed(heads) if head in inner), "")
            result[inner[head] + name[len(head) :] if head else name] = tensor
        return {names.actual(name): tensor for name, tensor in result.items()}
