"""The configuration of a scheduler: recorded by its constructor, read from and written to ``scheduler_config.json``.

A configuration travels between scheduler classes (``Other.from_config(scheduler.config)``), so two rules of the
reference matter: fields that the source was never given do not travel, because the target has defaults of its own;
and fields that the target does not know are kept, so that the way back loses nothing.
"""

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from minidiff.config import Config, read_json
from minidiff.errors import ConfigError

CONFIG_NAME = "scheduler_config.json"
FORMAT = "0.42.1"  # the version of the reference whose spelling of the file we write

T = TypeVar("T", bound="Configured")


def records_config(init: Callable[..., None]) -> Callable[..., None]:
    """Make a constructor keep its arguments as ``self.config`` before its body runs.

    ``config["_use_default_values"]`` lists the fields that the caller did not give; ``from_config`` leaves them out.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self: "Configured", *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        given = set(bound.arguments)
        bound.apply_defaults()
        fields = {name: value for name, value in bound.arguments.items() if name != "self"}
        self._config = Config({**fields, "_use_default_values": sorted(set(fields) - given)})
        init(*bound.args, **bound.kwargs)

    return wrapped


class Configured:
    """Base of the schedulers for everything that concerns their configuration."""

    _config: Config

    @property
    def config(self) -> Config:
        """The frozen configuration: ``scheduler.config.num_train_timesteps``, ``scheduler.config["beta_start"]``."""
        return self._config

    @classmethod
    def from_config(cls: type[T], config: Mapping[str, Any], **overrides: Any) -> T:
        """Build a scheduler from the ``config`` of any scheduler (or a dict), with ``overrides`` for single fields.

        Raises ConfigError for an override that this class does not have and for values it does not implement.
        """
        if not isinstance(config, Mapping):
            raise TypeError(
                f"{cls.__name__}.from_config takes a configuration or a dict, found {config!r}; "
                f"to read a folder or a Hub repository call {cls.__name__}.from_pretrained"
            )
        known = _parameters(cls)
        for name in overrides:
            if name not in known:
                raise ConfigError(f"{cls.__name__} has no option {name!r}{_did_you_mean(name, known)}")
        defaults = config.get("_use_default_values", ())
        fields = {k: v for k, v in config.items() if k not in defaults and k != "_use_default_values"} | overrides
        scheduler = cls(**{name: value for name, value in fields.items() if name in known})
        hidden = {name: value for name, value in fields.items() if name not in known}
        if "_class_name" in hidden:
            hidden["_class_name"] = cls.__name__
        scheduler._config = Config({**scheduler._config, **hidden})
        return scheduler

    @classmethod
    def from_pretrained(
        cls: type[T],
        pretrained_model_name_or_path: str | Path,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        token: str | bool | None = None,
        **overrides: Any,
    ) -> T:
        """Read ``scheduler_config.json`` of a folder or a Hub repository; it may be another scheduler's.

        Raises CheckpointNotFoundError if there is none, ConfigError for values this class does not implement.
        """
        from minidiff.checkpoints.hub import find_file  # brings huggingface_hub only where a file is looked for

        path = find_file(
            pretrained_model_name_or_path,
            CONFIG_NAME,
            subfolder=subfolder,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            token=token,
        )
        return cls.from_config(read_json(path), **overrides)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``scheduler_config.json`` into ``save_directory`` (made if missing), as the reference reads it."""
        folder = Path(save_directory)
        if folder.is_file():
            raise NotADirectoryError(f"{folder} is a file: give a folder to write {CONFIG_NAME} into")
        folder.mkdir(parents=True, exist_ok=True)
        fields = {name: value for name, value in self._config.items() if name != "_use_default_values"}
        fields |= {"_class_name": type(self).__name__, "_diffusers_version": FORMAT}
        text = json.dumps(fields, indent=2, sort_keys=True, default=lambda value: value.tolist())  # arrays and tensors
        (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")

    def __repr__(self) -> str:
        fields = {name: value for name, value in self._config.items() if not name.startswith("_")}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in fields.items())})"

    def _require(self, field: str, choices: Sequence[Any]) -> None:
        """Refuse a configuration whose ``field`` is none of ``choices``, naming both."""
        value = self._config[field]
        if value not in choices:
            raise ConfigError(
                f"{type(self).__name__} does not implement {field}={value!r}; it has {', '.join(map(repr, choices))}"
            )

    def _own(self, field: str, default: Any) -> Any:
        """Return a field of this class's constructor, ``default`` for a class that has none of that name.

        The config may hold the field all the same, from another scheduler: it counts for that one alone.
        """
        return self.config[field] if field in _parameters(type(self)) else default


def _parameters(cls: type) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(cls.__init__).parameters if name != "self")


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(known)}"
