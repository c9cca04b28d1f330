"""Output records that answer by name, by index and by key, as the reference's do.

``out.sample``, ``out[0]``, ``out["sample"]`` and ``sample, = out.to_tuple()`` are the same tensor. Fields that are
None are left out of the index, so ``out[1]`` means "the second thing that was computed".
"""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any


class Output:
    """Base of every output dataclass: adds tuple and mapping access to the named fields."""

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are not None, in declaration order."""
        return tuple(getattr(self, key) for key in self.keys())

    def keys(self) -> tuple[str, ...]:
        """Return the names of the fields that are not None."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)

    def __getitem__(self, key: int | slice | str) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(f"{type(self).__name__} has no {key!r}; it has {', '.join(self.keys())}")
            return getattr(self, key)
        return self.to_tuple()[key]

    def __len__(self) -> int:
        return len(self.keys())

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())
