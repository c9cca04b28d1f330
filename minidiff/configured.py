"""Classes with a configuration: recorded by the constructor, read from and written to a JSON file.

A configuration travels between classes (``Other.from_config(scheduler.config)``), so two rules of the reference
matter: fields that the source was never given do not travel, because the target has defaults of its own; and fields
that the target does not know are kept, so that the way back loses nothing.

A class of one's own derives from ``ConfigMixin``, names its file in ``config_name`` and marks its constructor with
``register_to_config``.
"""

import functools
import inspect
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from minidiff.atomic import write_text
from minidiff.checkpoints.config_file import ConfigFile
from minidiff.config import REFERENCE_VERSION, Config
from minidiff.errors import ConfigError
from minidiff.registry import public

UNSAVED = ("_use_default_values", "_ignore_files")

logger = logging.getLogger(__name__)
T = TypeVar("T", bound="ConfigMixin")


def register_to_config(init: Callable[..., None]) -> Callable[..., None]:
    """Make a constructor keep its arguments as ``self.config`` before its body runs.

    ``config["_use_default_values"]`` lists the fields that the caller did not give; ``from_config`` leaves them out.
    Arguments that begin with an underscore are recorded too, and not handed to the constructor.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self: "ConfigMixin", *args: Any, **kwargs: Any) -> None:
        annotations = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("_")}
        bound = signature.bind(self, *args, **kwargs)
        given = set(bound.arguments)
        bound.apply_defaults()
        fields = {name: bound.arguments[name] for name in _parameters(init) if name not in self.ignore_for_config}
        for name in set(fields) & set(self.renames):
            theirs, meant = self.renames[name]
            fields[name] = meant if fields[name] in theirs else fields[name]
        self._check_fields(signature.parameters, fields)
        if defaults := sorted(set(fields) - given):
            fields["_use_default_values"] = defaults
        self.register_to_config(**annotations, **fields)
        init(*bound.args, **bound.kwargs)

    return wrapped


class ConfigMixin(ConfigFile):
    """Base of classes that have a configuration."""

    ignore_for_config: ClassVar[Sequence[str]] = ()  # arguments of the constructor that are not recorded
    renames: ClassVar[Mapping[str, tuple[Sequence[Any], Any]]] = {}  # field: other classes' values, and what to record
    has_compatibles: ClassVar[bool] = False  # whether other classes may be made from this one's configuration
    _deprecated_kwargs: ClassVar[Sequence[str]] = ()
    _internal_dict: Config  # the reference's name, which pipelines written for it assign

    @property
    def config(self) -> Config:
        """The frozen configuration: ``scheduler.config.num_train_timesteps``, ``scheduler.config["beta_start"]``."""
        return self.__dict__.get("_internal_dict", Config({}))  # of a constructor that records nothing

    def register_to_config(self, **fields: Any) -> None:
        """Add fields to the configuration, or change them."""
        if self.config_name is None:
            raise NotImplementedError(f"{type(self).__name__} has no config_name: say what its file is called")
        self._internal_dict = Config({**self.__dict__.get("_internal_dict", {}), **fields})

    def __getattr__(self, name: str) -> Any:
        return field_as_attribute(self, self.__dict__.get("_internal_dict", {}), name)

    @classmethod
    def from_config(
        cls: type[T],
        config: Mapping[str, Any] | str | Path | None = None,
        return_unused_kwargs: bool = False,
        **overrides: Any,
    ) -> T | tuple[T, dict[str, Any]]:
        """Build an object from the ``config`` of any class (or a dict), with ``overrides`` for single fields.

        A folder or Hub repository may stand for the dict, as it could in old versions of the reference; then the
        arguments of ``load_config`` are understood too. ``return_unused_kwargs`` also returns what was not used.

        Raises ConfigError for an override that this class does not have and for values it does not implement.
        """
        if config is None:
            raise ValueError(f"{cls.__name__}.from_config needs a configuration, found None")
        if not isinstance(config, Mapping):
            warnings.warn(f"{cls.__name__}.from_config takes a dict: call load_config", FutureWarning, stacklevel=2)
            config, overrides = cls.load_config(config, return_unused_kwargs=True, **overrides)
        known = [name for name in _parameters(cls.__init__) if name not in cls.ignore_for_config]
        foreign = {name: value for name, value in overrides.items() if name not in known}
        if foreign and not return_unused_kwargs:
            name = next(iter(foreign))
            raise ConfigError(f"{cls.__name__} has no option {name!r}{_did_you_mean(name, known)}")
        defaults = config.get("_use_default_values", ())
        fields = {k: v for k, v in config.items() if k not in defaults and k != "_use_default_values"}
        given = {name: value for name, value in {**fields, **overrides}.items() if name in known}
        hidden = {name: value for name, value in fields.items() if name not in known}
        unused = {
            name: value for name, value in hidden.items() if not (name[0] == "_" or cls._is_elsewhere(name, config))
        }
        if unused:
            logger.warning("%s does not know %s of its configuration, which means nothing here", cls.__name__, unused)
        made = cls(**given)
        if "_class_name" in hidden:
            hidden["_class_name"] = cls.__name__
        made.register_to_config(**hidden)
        return (made, {**foreign, **hidden}) if return_unused_kwargs else made

    @classmethod
    def _is_elsewhere(cls, name: str, config: Mapping[str, Any]) -> bool:
        """Say whether a field belongs to the class that the configuration is of, or to one compatible with ours."""
        source = public(config.get("_class_name"))
        kinds = [source] if isinstance(source, type) else []
        kinds += cls._get_compatibles() if cls.has_compatibles else []
        return any(name in _parameters(kind.__init__) for kind in kinds)

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False) -> None:
        """Write the configuration into ``save_directory`` (made if missing), as the reference reads it."""
        if push_to_hub:
            raise ValueError("push_to_hub=True is not implemented: save, then use huggingface_hub.upload_folder")
        folder = Path(save_directory)
        if folder.is_file():
            raise NotADirectoryError(f"{folder} is a file: give a folder to write {self.config_name} into")
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / str(self.config_name))
        head = {"_class_name": type(self).__name__, "_diffusers_version": REFERENCE_VERSION}
        dict.update(self.config, head)  # it says so from now on, also to who has it already: as there

    def to_json_file(self, json_file_path: str | Path) -> None:
        """Write the text of ``to_json_string``."""
        write_text(Path(json_file_path), self.to_json_string())

    def to_json_string(self) -> str:
        """Return the content of the file."""
        fields = {name: value for name, value in self.config.items() if name not in UNSAVED}
        fields |= {"_class_name": type(self).__name__, "_diffusers_version": REFERENCE_VERSION}
        return json.dumps(fields, indent=2, sort_keys=True, default=_plain) + "\n"

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def _check_fields(self, parameters: Mapping[str, inspect.Parameter], fields: Mapping[str, Any]) -> None:
        """Raise ``ConfigError`` if a field is not what the constructor can work with; here anything is."""

    def _require(self, field: str, choices: Sequence[Any]) -> None:
        """Refuse a configuration whose ``field`` is none of ``choices``, naming both."""
        value = self.config[field]
        if value not in choices:
            raise ConfigError(
                f"{type(self).__name__} does not implement {field}={value!r}; it has {', '.join(map(repr, choices))}"
            )

    def _own(self) -> dict[str, Any]:
        """Return the fields of this class's constructor, or those of the classes it is derived from.

        The configuration may hold more, from another class: they count for that one alone.
        """
        return {name: self.config[name] for name in _own_names(type(self)) if name in self.config}


def field_as_attribute(owner: object, fields: Mapping[str, Any], name: str) -> Any:
    """Answer ``owner.name`` from its fields, with the reference's warning that they are asked for in ``config``."""
    kind = type(owner).__name__
    if name not in fields:
        raise AttributeError(f"{kind!r} object has no attribute {name!r}")
    warnings.warn(f"{kind}.{name} is deprecated: write {kind}.config.{name}", FutureWarning, stacklevel=3)
    return fields[name]


@functools.cache
def _own_names(cls: type) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for kind in cls.__mro__ for name in _parameters(kind.__init__)))


def _parameters(init: Callable[..., None]) -> tuple[str, ...]:
    """Return the names of a constructor's arguments, without itself and those of any name or number."""
    _, *parameters = inspect.signature(init).parameters.values()
    return tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def _plain(value: Any) -> Any:
    """Return what JSON can say of an array, a tensor, a path, or what knows it itself."""
    if isinstance(value, Path):
        return value.as_posix()
    return value.to_dict() if hasattr(value, "to_dict") else value.tolist()


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(known)}"
