"""``Config``, the public ``.config`` of every network, scheduler and pipeline, and how its JSON is read.

It answers with the Hub's own field names. What the networks make of theirs is in ``minidiff.networks.specs``.
"""

import json
from pathlib import Path
from typing import Any, NoReturn

from minidiff.errors import ConfigError
from minidiff.sniff import what_is

REFERENCE_VERSION = "0.42.1"  # of diffusers, whose layout our files follow; it treats files of old versions specially


class Config(dict[str, Any]):
    """A dict that cannot be changed and whose fields are also attributes: ``config.width == config["width"]``.

    ``config.copy()`` and ``config | {...}`` are ordinary dicts, to be changed and made into something else.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self:  # Python asks for dunders while unpickling and copying
            raise AttributeError(f"the configuration has no field {name!r}")
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"configurations are frozen: build a new object with {name}={value!r} instead")

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(
            "configurations are frozen: change a copy, dict(config), and build a new object with from_config"
        )

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return _frozen, (type(self), dict(self))  # pickling and copying would set items otherwise

    def __repr__(self) -> str:
        return f"Config({json.dumps(self, indent=2, default=str)})"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a new plain dict."""
        return dict(self)


def _frozen(kind: type[Config], fields: dict[str, Any]) -> Config:
    made = dict.__new__(kind)
    dict.update(made, fields)
    return made


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object from ``path``. Raises ``ConfigError`` naming the file if it is not one."""
    if what := what_is(Path(path)):
        raise ConfigError(f"{path} is no configuration: {what}")
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also text that is no UTF-8, and numbers of thousands of digits
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} should hold a JSON object, found {type(fields).__name__}")
    return fields
