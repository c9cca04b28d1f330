"""Output records that answer by name, by index and by key, as the reference's do.

``out.sample``, ``out[0]``, ``out["sample"]`` and ``sample, = out.to_tuple()`` are the same tensor. Fields that are
None are left out of the index, so ``out[1]`` means "the second thing that was computed".

A record is a dict of those fields, too, and torch looks into it as into any dict (a *pytree*): what walks through
whatever a network returns - mixed precision, data parallelism, ``torch.export`` - finds the tensors and can put others
in their place. Checked against ``diffusers.utils.BaseOutput``.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import fields
from typing import Any, NoReturn

from torch.utils._pytree import register_pytree_node


class Output(OrderedDict[str, Any]):
    """Base of every output dataclass: adds tuple and mapping access to the named fields.

    ``Record({"sample": x})``, with nothing else, is ``Record(sample=x)``: what rebuilds a mapping builds it so.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        register_pytree_node(
            cls,
            lambda out: (list(out.values()), list(out)),
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        first, *others = values.values()
        if isinstance(first, dict) and all(value is None for value in others):
            values = first
        for name, value in values.items():
            if value is not None:
                self[name] = value

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are not None, in declaration order."""
        return tuple(self.values())

    def __getitem__(self, key: int | slice | str) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __missing__(self, key: Hashable) -> NoReturn:
        raise KeyError(f"{type(self).__name__} has no {key!r}; it has {', '.join(self)}")

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self and value is not None:
            super().__setitem__(name, value)

    def _refuse(self, *arguments: Any, **options: Any) -> NoReturn:
        raise TypeError(f"the fields of {type(self).__name__} can be given other values, but not be added or taken out")

    __delitem__ = setdefault = pop = popitem = clear = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        make, _, *rest = super().__reduce__()
        return make, tuple(getattr(self, field.name) for field in fields(self)), *rest
