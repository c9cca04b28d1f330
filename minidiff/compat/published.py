"""The published names of a network's parts, as attributes, without renaming anything.

Programs reach into networks: ``unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_q``. Those names are
the Hub column of the name table. Here they become a second tree over the same layers::

    UNet2DConditionModel                      what computes: down, mid, up
      down.0.attn.0.blocks.0.cross_attn.q ─┐
                                           ├─ one nn.Linear, with its weight, hooks and adapters
    Part                                   │  what is called by published names: down_blocks, mid_block, up_blocks
      down_blocks.0...attn2.to_q ──────────┘

A leaf of the second tree *is* the layer. An inner node is a ``Part``, which stands for one module of the network if
the same layers lie below both: it has that module's hooks, attributes and mode. The tree is made from the rows when
someone first asks, and made anew when modules have been exchanged.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from minidiff.checkpoints.remap import Op, Row

# Children that the reference sets to None where a part does not have them, and what it has beyond the table.
_NONE = frozenset("downsamplers upsamplers conv_shortcut time_emb_proj group_norm spatial_norm".split())
_REBUILT = "this {} lacks {}; copy it with copy.deepcopy, compile its blocks with compile_repeated_blocks()"
_SHARED = ("_parameters", "_buffers", "_non_persistent_buffers_set")  # and all hooks


class _NoHooks(OrderedDict):
    """The hooks of a part that is never called: there are none, and one that is added would not be heard."""

    def __init__(self, name: str = "") -> None:
        super().__init__()
        self.name = name

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError(f"{self.name} is a name, not a module that is called: hook the parts in it, or the network")


class Part(nn.Module):
    """What a published name stands for: its children have published names, its layers are those of the network."""

    def __init__(self) -> None:
        super().__init__()
        # real: the module of the network that this stands for; places: where the children that are layers really are
        vars(self).update(real=None, places={}, name="", config={})

    def _stand_for(self, real: nn.Module | None, name: str, config: Mapping[str, Any]) -> None:
        own = vars(self)
        own.update(real=real, name=name, config=config, places={})
        own["_modules"].clear()
        if real is None or type(real).forward is nn.Module.forward:
            own.update({key: _NoHooks(name) for key in own if key.endswith("hooks") and "state_dict" not in key})
        else:
            own.update({key: value for key, value in vars(real).items() if "_hooks" in key})
        if real is not None:
            own.update({key: vars(real)[key] for key in _SHARED})
            for key in ("training", "_is_full_backward_hook"):
                own.pop(key, None)  # read from the module, see __getattr__

    def __getattr__(self, name: str) -> Any:
        if name in self._modules:
            return self._modules[name]
        if name in _NONE:
            return None
        real = vars(self).get("real")
        if real is not None and hasattr(real, name):
            return getattr(real, name)
        raise AttributeError(f"{self.name or type(self).__name__} has no {name!r}; it has {', '.join(self._modules)}")

    def __setattr__(self, name: str, value: Any) -> None:
        own = vars(self)
        if "places" not in own or isinstance(getattr(type(self), name, None), property):
            super().__setattr__(name, value)
        elif name == "_modules":
            raise RuntimeError(_REBUILT.format(self.name, "its network"))
        elif name in own["places"]:
            module, key = own["places"][name]
            setattr(module, key, value)
            self._modules[name] = value
        elif name in self._modules:
            raise TypeError(f"{self.name}.{name} cannot be exchanged as a whole; exchange the layers in it")
        elif name == "__class__":  # a class derived from the part's own, whose forward then computes
            super().__setattr__(name, value)
            vars(self.real).pop("forward", None)
            if value.forward is not Part.forward:
                self.forward = self.forward
        elif name == "forward":
            self.real.forward = partial(self._with_their_arguments, value)  # a partial, which the fast ways respect
        elif self.real is not None:
            setattr(self.real, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.real if name not in vars(self) and self.real is not None else super(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as the reference's module of this name does, hooks included."""
        return self._with_our_arguments(self.real, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the class says, whatever has been put in the place of ``forward`` and without hooks."""
        return self._with_our_arguments(partial(type(self.real).forward, self.real), *args, **kwargs)

    def _with_our_arguments(self, run: Any, *args: Any, **kwargs: Any) -> Any:
        """Call ``run``, which has our signature, with the reference's arguments."""
        if self.real is None or type(self.real).forward is nn.Module.forward:
            raise TypeError(f"{self.name} cannot be called; call the layers in it, or the network")
        return run(*args, **kwargs)

    @staticmethod
    def _with_their_arguments(run: Any, *args: Any, **kwargs: Any) -> Any:
        """Call ``run``, which has the reference's signature, with our arguments."""
        return run(*args, **kwargs)


class PartList(Part, nn.ModuleList):
    """Numbered parts."""

    def __init__(self, modules: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self._modules.update((str(i), module) for i, module in enumerate(modules))


class Names(NamedTuple):
    """The names of one network: ours -> the Hub's, of layers and of the modules that a part stands for."""

    layers: dict[str, str]  # in the order of the published tree
    modules: dict[str, str]
    rows: list[Row]
    ops: dict[str, Op]  # of tensors, by our name, where the Hub lays them out otherwise
    compiled: dict[str, str]  # a module's name without what torch.compile puts into it -> with it

    def published(self, ours: str) -> str:
        """Return the published name of a tensor or a module; what is not in the table keeps the end of its name."""
        head, tail = ours, ""
        while head and head not in self.layers and head not in self.modules:
            head, _, last = head.rpartition(".")
            tail = f".{last}{tail}"
        return (self.layers.get(head) or self.modules.get(head, "")) + tail if head else ours

    @staticmethod
    def plain(ours: str) -> str:
        """Return our name without what ``torch.compile`` puts into the names of what it has compiled."""
        return ours.replace("._orig_mod", "")

    def actual(self, ours: str) -> str:
        """Return our name with it."""
        head, _, tensor = ours.rpartition(".")
        return f"{self.compiled[head]}.{tensor}" if head in self.compiled else ours


Children = tuple[dict[str, nn.Module | None], dict[str, nn.Module | None]]  # of a module: what it has, and had


class Tree(NamedTuple):
    """The published tree of a network, and what shows whether it still is."""

    root: Part
    names: Names
    parts: dict[str, Part]
    seen: list[Children]

    def current(self) -> bool:
        """Return whether the network still has the modules it was made for."""
        return all(now == then for now, then in self.seen)


KindOf = Callable[[Iterable[str], nn.Module | None], type[Part]]  # what stands for a part with these children


def grow(
    network: nn.Module, rows: list[Row], config: Mapping[str, Any], kind_of: KindOf, old: Mapping[str, Part]
) -> Tree:
    """Make the published tree of a network; parts of an older one keep their identity."""
    modules = {Names.plain(name): module for name, module in own_modules(network)}
    layers = _layers(rows, modules, network)
    children: dict[str, dict[str, None]] = defaultdict(dict)
    for hub in layers:
        for name in _above(hub):
            parent, _, last = name.rpartition(".")
            children[parent][last] = None
    stands_for = _correspondence(layers, children, modules)
    if len(children[""]) == 1:  # text_model is all there is
        stands_for = {**dict.fromkeys(children[""], ""), **stands_for}
    parts: dict[str, Part] = {}
    order: dict[str, str] = {}

    def node(name: str) -> nn.Module:
        if name in layers:
            order[layers[name]] = name
            return modules[layers[name]]
        real = modules.get(stands_for.get(name))
        kind = PartList if _numbered(children[name]) else kind_of(children[name], real)
        part = parts[name] = old[name] if isinstance(old.get(name), kind) else kind()
        part._stand_for(real, name, config)
        dot = name and f"{name}."
        for last in children[name]:
            part._modules[last] = node(dot + last)
            if dot + last in layers:
                parent, _, key = layers[dot + last].rpartition(".")
                part.places[last] = (modules[parent], key)
        if isinstance(part, PartList):
            _fill(part, 2 if name.endswith("to_out") else 1)
        if isinstance(real, Published) and real is not network:  # it has its published name, too
            vars(real)["_part"] = part
            return real
        return part

    root = node("")
    compiled = {Names.plain(name): name for name, _ in own_modules(network) if "._orig_mod" in name}
    ops = {row.ours[0]: row.hub_op for row in rows if row.hub_op.name != "same"}
    names = Names(order, {real: name for name, real in stands_for.items()}, rows, ops, compiled)
    return Tree(root, names, parts, _attach_added(modules, names, parts))


def _layers(rows: list[Row], modules: Mapping[str, nn.Module], network: nn.Module) -> dict[str, str]:
    """Return our layers by their published names, in the order in which the reference, too, makes its modules."""
    named = [
        (o, h) for row in rows for o, h in zip(row.ours, row.hub, strict=True) if "." in o
    ]  # not the network's own
    pairs = {o.rpartition(".")[0]: h.rpartition(".")[0] for o, h in named}
    if lost := pairs.keys() - modules.keys():
        raise RuntimeError(_REBUILT.format(type(network).__name__, min(lost)))
    return {pairs[ours]: ours for ours in modules if ours in pairs}


def _attach_added(modules: Mapping[str, nn.Module], names: Names, parts: Mapping[str, Part]) -> list[Children]:
    """Hang modules that are not in the table, which someone added, where they belong; return what was looked at."""
    inner = {name for ours in names.layers for name in ("", *_above(ours.rpartition(".")[0]))}
    for path in sorted(inner):
        for key, module in modules[path]._modules.items():
            own = f"{path}.{key}" if path else key
            if module is not None and own not in names.layers and own not in inner and _holds_tensors(module):
                published = names.published(own)
                above = next(above for above in [*reversed(list(_above(published))), ""] if above in parts)
                parts[above]._modules[published.removeprefix(f"{above}.")] = module
    return [(modules[name]._modules, dict(modules[name]._modules)) for name in inner]


def _above(name: str) -> Iterator[str]:
    """Yield the beginnings of a dotted name, the shortest first, and the name itself."""
    parts = name.split(".") if name else []
    for i in range(len(parts)):
        yield ".".join(parts[: i + 1])


def _correspondence(
    layers: Mapping[str, str], children: Mapping[str, Any], modules: Mapping[str, nn.Module]
) -> dict[str, str]:
    """Return for inner published names our module with the very same layers below it, where there is one.

    Where several are nested without anything beside them, the outer ones correspond, unless there are too few of ours.
    """
    ours_below, hub_below = defaultdict(list), defaultdict(list)
    for i, (hub, ours) in enumerate(layers.items()):
        for names, name in ((ours_below, ours), (hub_below, hub)):
            for above in list(_above(name))[:-1]:
                names[above].append(i)
    chains: dict[tuple[int, ...], tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for name in sorted(ours_below, key=len):
        if not isinstance(modules[name], nn.ModuleList):
            chains[tuple(ours_below[name])][0].append(name)
    for name in sorted(hub_below, key=len):
        if not _numbered(children[name]):
            chains[tuple(hub_below[name])][1].append(name)
    result = {}
    for mine, theirs in chains.values():
        count = min(len(mine), len(theirs))
        theirs = theirs[len(theirs) - count :]
        result.update(zip(theirs, mine[:count], strict=True))
    return result


def _numbered(names: Iterable[str]) -> bool:
    return all(name.isdecimal() for name in names)


def _fill(part: PartList, least: int) -> None:
    """Put an identity where the reference has a layer without weights, such as a dropout that is off."""
    count = max(least, 1 + max(map(int, part._modules)))
    found = dict(part._modules)
    part._modules.clear()
    part._modules.update((str(i), found.get(str(i)) or nn.Identity()) for i in range(count))


def _holds_tensors(module: nn.Module) -> bool:
    return any(True for inner in module.modules() if inner._parameters or inner._buffers)


def own_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield a module and all that are below it, by the names that they have as Python attributes."""
    yield name, module
    for key, child in module._modules.items():
        if child is not None:
            yield from own_modules(child, f"{name}.{key}" if name else key)


class Published(nn.Module):
    """A network, or a part of one, that answers to published names and is listed by them.

    ``named_modules``, ``named_children``, ``named_parameters``, ``named_buffers`` give published names; ``modules`` and
    ``children`` give the modules that compute.
    """

    def _listed(self) -> Mapping[str, nn.Module | None]:
        """Return the children by their published names; without its network, by ours."""
        network = vars(self).get("_network")
        if network is None:
            return self._modules
        network.published()  # which has told this part what it stands for
        if vars(self)["_part"].real is not self:
            raise RuntimeError(_REBUILT.format(type(self).__name__, "its place"))
        return vars(self)["_part"]._modules

    def __getattr__(self, name: str) -> Any:
        if "_network" in vars(self) and name not in self._modules and name in self._listed():
            return self._listed()[name]
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        known = "_network" in vars(self) and isinstance(value, nn.Module | None) and name not in self._modules
        if known and name in self._listed():
            setattr(vars(self)["_part"], name, value)
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_part", "_tree", "_network")}

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield this and every module below it, with their published names."""
        memo = set() if memo is None else memo
        if self not in memo:
            memo.update({self} if remove_duplicate else ())
            yield prefix, self
            for name, child in self.named_children():
                yield from child.named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules right below this, with their published names."""
        if torch.jit._trace._trace_module_map is not None:  # torch.jit.trace looks for what really holds the weights
            yield from ((name, child) for name, child in self._modules.items() if child is not None)
            return
        yield from self._listed().items()

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        """Yield this and every module below it that computes."""
        found = (module for _, module in own_modules(self))
        yield from dict.fromkeys(found) if remove_duplicate else found

    def children(self) -> Iterator[nn.Module]:
        """Yield the modules right below this that compute."""
        yield from dict.fromkeys(module for module in self._modules.values() if module is not None)
