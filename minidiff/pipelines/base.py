"""``DiffusionPipeline``: components that belong together, loaded from and saved to a folder with a model_index.json.

The file names the pipeline's class and, for each component, a library and a class; each component lies in a subfolder
of its own name.
"""

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from minidiff.atomic import unchanged, whole_folder
from minidiff.checkpoints.arguments import device_of
from minidiff.checkpoints.hub import Repo
from minidiff.checkpoints.load import as_dtype, paused_collector
from minidiff.checkpoints.model import Pretrained, refuse_pickles, refuse_unless_harmless
from minidiff.checkpoints.save import save_json
from minidiff.config import REFERENCE_VERSION, Config, read_json
from minidiff.configured import field_as_attribute
from minidiff.errors import CheckpointError, ConfigError
from minidiff.pipelines.index import (
    INDEX,
    compiled_from,
    component_class,
    dtypes_of,
    is_component,
    library_and_class,
    load_component,
    public_class,
)
from minidiff.pipelines.memory import MemorySavers
from minidiff.pipelines.single_file import SingleFilePipeline
from minidiff.registry import HOME

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

logger = logging.getLogger("minidiff")


class DiffusionPipeline(MemorySavers, SingleFilePipeline):
    """Base of every pipeline.

    A subclass adds ``__call__`` and a constructor: the components, those that a checkpoint may lack with a default,
    then settings. It calls this constructor and hands on both, see docs/own_pipeline.md::

        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(clip=clip)
    """

    _optional_components: ClassVar[Sequence[str]] = ()  # those that a checkpoint may have and the pipeline do without
    config_name: ClassVar[str] = INDEX
    hf_device_map: dict[str, torch.device] | None = None  # where ``device_map`` has put the networks
    _source: tuple[str, Path] | None = None  # what it was loaded from: the name and the folder
    model_cpu_offload_seq: ClassVar[str | None] = None  # of the reference; minidiff sees the order as networks run
    _exclude_from_cpu_offload: ClassVar[Sequence[str]] = ()  # likewise: a safety checker, too, comes when it is called

    def __init__(self) -> None:
        self._component_names: tuple[str, ...] = ()
        self._settings: dict[str, Any] = {}
        self._progress_bar_config: dict[str, Any] = {}

    def register_modules(self, **components: Any) -> None:
        """Make these the pipeline's components: attributes that are loaded, saved, moved and shared with it."""
        self._component_names = tuple(dict.fromkeys((*self._component_names, *components)))
        for name, component in components.items():
            setattr(self, name, component)

    def _set_up(self, kind: type["DiffusionPipeline"], arguments: Mapping[str, Any]) -> None:
        """Register what ``kind.__init__`` was called with, its ``locals()``: components, and settings."""
        DiffusionPipeline.__init__(self)
        components, settings = kind._signature()
        self.register_modules(**{name: arguments[name] for name in components})
        self.register_to_config(**{name: arguments[name] for name in settings if name != "add_watermarker"})

    def register_to_config(self, **settings: Any) -> None:
        """Make these the pipeline's settings: what ``config`` holds, and model_index.json, beside the components."""
        self._settings = {**self._settings, **settings}

    def __getattr__(self, name: str) -> Any:
        return field_as_attribute(self, self.__dict__.get("_settings", {}), name)

    # --- loading and saving ------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype | str | Mapping[str, torch.dtype | str] | None = None,
        dtype: torch.dtype | str | Mapping[str, torch.dtype | str] | None = None,
        variant: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        force_download: bool = False,
        use_safetensors: bool | None = None,
        device_map: Any = None,
        **overrides: Any,
    ) -> "DiffusionPipeline":
        """Load a pipeline from a folder in Hub layout or from the Hub; only the files that it uses are downloaded.

        ``DiffusionPipeline.from_pretrained`` makes the class that ``model_index.json`` names, a subclass makes itself.
        ``safety_checker=None`` loads a checkpoint without its safety checker.

        Args:
            pretrained_model_name_or_path: a folder, or a Hub id.
            torch_dtype: dtype of all networks, float32 by default, or ``{"unet": ..., "default": ...}``; ``dtype`` is
                another name of it.
            variant: which of several weight files to load, such as ``"fp16"``. It names files, not a dtype.
            revision: branch, tag or commit on the Hub. All files come from the one commit that it means at the start.
            device_map: the device that all networks are loaded to; "balanced" is the GPU where there is one.
            overrides: components to use instead of the checkpoint's, which are then not loaded (``scheduler=...``,
                ``text_encoder=None``), and settings of the pipeline's constructor.

        Raises:
            CheckpointNotFoundError: if the folder, repository or a file is not there.
            CheckpointError: if weights do not fit their configuration or components do not fit together.
            ConfigError: if the pipeline or a component is of a class that minidiff does not implement.
            TypeError: if an argument is unknown.
        """
        refuse_pickles(use_safetensors)
        device = device_of(device_map)
        source = pretrained_model_name_or_path
        repo = Repo(source, None, revision, cache_dir, bool(local_files_only), token, force_download)
        path = repo.file(INDEX)
        with unchanged(path), paused_collector():
            index = read_json(path)
            pipeline_class = cls._class_for(index, path)
            given = pipeline_class._check_overrides(refuse_unless_harmless(overrides))
            repo = repo.pinned(path)
            parts = pipeline_class._from_index(index, path, given)
            dtypes = dtypes_of(torch_dtype, dtype, parts)
            for name, value in parts.items():
                if name not in given and isinstance(value, type):
                    optional = name in pipeline_class._optional_components
                    parts[name] = load_component(value, repo, name, dtypes[name], variant, optional)
        pipe = pipeline_class(**parts)
        pipe._source = (str(source), path.parent)
        if device is not None:
            pipe.to(device)
            pipe.hf_device_map = {name: device for name, part in pipe._parts().items() if isinstance(part, nn.Module)}
        return pipe

    @classmethod
    def download(cls, pretrained_model_name: str | Path, **arguments: Any) -> str:
        """Fetch the files that ``from_pretrained`` would use into the cache; return the folder that they are in."""
        return str(cls.from_pretrained(pretrained_model_name, **arguments)._source[1])

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | Path, **where: Any) -> dict[str, Any]:
        """Return the content of ``model_index.json``; ``where`` are fields of ``Repo``, such as ``revision``."""
        return read_json(Repo(pretrained_model_name_or_path, **where).file(INDEX))

    @property
    def name_or_path(self) -> str | None:
        """The folder or Hub id that the pipeline was loaded from, None if it was made otherwise."""
        return None if self._source is None else self._source[0]

    def reset_device_map(self) -> None:
        """Forget a ``device_map``: all networks go back to the CPU."""
        self.remove_all_hooks()
        self.to("cpu")
        self.hf_device_map = None

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        **harmless: Any,
    ) -> None:
        """Write all components and ``model_index.json``, so that diffusers loads the folder too.

        Args: as in ``Model.save_pretrained``; ``variant`` and ``max_shard_size`` concern the networks.
        """
        if not safe_serialization:
            raise CheckpointError("safe_serialization=False asks for pickles; minidiff writes only safetensors")
        if unknown := refuse_unless_harmless(harmless):
            raise TypeError(f"save_pretrained has no argument {', '.join(unknown)}")
        folder = Path(save_directory)
        index = self._index()  # raises if a component cannot be saved, before anything is written
        with whole_folder(folder, INDEX) as place:
            for name, component in self._parts().items():
                component = compiled_from(component)
                if isinstance(component, Pretrained):
                    component.save_pretrained(place / name, variant=variant, max_shard_size=max_shard_size or "10GB")
                elif index[name] != (None, None):
                    component.save_pretrained(place / name)
            save_json(index, place / INDEX)

    @classmethod
    def from_pipe(
        cls,
        pipeline: "DiffusionPipeline",
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        **overrides: Any,
    ) -> "DiffusionPipeline":
        """Make a pipeline of this class from the components of another; both share them, so it costs no memory.

        Components and settings that this class has no place for are left out. A ``torch_dtype`` is given to the shared
        networks, that is, to both pipelines; without one they stay as they are, where the reference makes them float32.

        Raises:
            ConfigError: if the components do not fit this class.
            TypeError: if an argument is unknown.
            ValueError: if a component is missing.
        """
        if cls is DiffusionPipeline:
            raise TypeError("call from_pipe on the class that the new pipeline is to have, not on DiffusionPipeline")
        given = cls._check_overrides(overrides)
        components, settings = cls._signature()
        parts = {**pipeline.components, **pipeline._settings, **given}
        if missing := [name for name in components if name not in parts and name not in cls._optional_components]:
            raise ValueError(
                f"{type(pipeline).__name__} has no {', '.join(missing)}, which {cls.__name__} needs; pass "
                f"{missing[0]}=..."
            )
        made = cls(**{name: parts[name] for name in [*components, *settings] if name in parts})
        return made if torch_dtype is None and dtype is None else made.to(as_dtype(torch_dtype, dtype))

    @classmethod
    def _class_for(cls, index: Mapping[str, Any], path: Path) -> type["DiffusionPipeline"]:
        if cls is not DiffusionPipeline:
            return cls
        name = index.get("_class_name")
        if name is None:
            raise ConfigError(f"{path} has no _class_name: call from_pretrained on the class that it is for")
        found = public_class(name)
        if found is None or not issubclass(found, DiffusionPipeline) or found is DiffusionPipeline:
            known = [other for other in HOME if other.endswith("Pipeline") and other != "DiffusionPipeline"]
            raise ConfigError(
                f"{path} asks for {name}, which minidiff does not implement; it has {', '.join(known)}. If {name} is a "
                f"pipeline of your own, call {name}.from_pretrained"
            )
        return found

    @classmethod
    def _signature(cls) -> tuple[list[str], list[str]]:
        """Return the names of the constructor's components and settings."""
        parameters = [p for p in inspect.signature(cls.__init__).parameters.values() if p.name != "self"]
        is_component = {p.name: p.default is p.empty or p.name in cls._optional_components for p in parameters}
        return [name for name, yes in is_component.items() if yes], [
            name for name, yes in is_component.items() if not yes
        ]

    @classmethod
    def _check_overrides(cls, overrides: dict[str, Any]) -> dict[str, Any]:
        components, settings = cls._signature()
        if unknown := [name for name in overrides if name not in [*components, *settings]]:
            raise TypeError(
                f"{cls.__name__} got unknown arguments {', '.join(unknown)}; besides those that choose "
                f"files it takes the components {', '.join(components)} and the settings {', '.join(settings)}"
            )
        return overrides

    @classmethod
    def _from_index(cls, index: Mapping[str, Any], path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return what to call the constructor with, where a class stands for a component that is yet to be loaded."""
        components, settings = cls._signature()
        entries = {name: value for name, value in index.items() if not name.startswith("_")}
        foreign = [name for name in entries if name not in [*components, *settings] and entries[name] != [None, None]]
        builtin = public_class(cls.__name__) is cls
        if not builtin:  # whoever writes a pipeline says what it needs; other settings are none
            foreign = [name for name in foreign if is_component(entries[name])]
        if foreign:
            message = f"is for {index.get('_class_name')}: {cls.__name__} has no place for its {', '.join(foreign)}"
            if builtin:
                raise ConfigError(f"{path} {message}")
            logger.warning("%s %s; not loaded", path, message)
        components += [name for name in settings if is_component(entries.get(name))]
        settings = [name for name in settings if name not in components]
        parts = {name: entries[name] for name in settings if name in entries}
        for name in components:
            if name not in given and name not in entries and name not in cls._optional_components:
                raise ConfigError(f"{path} names no {name}, which {cls.__name__} needs; pass {name}=...")
            if name not in given:
                parts[name] = component_class(name, entries.get(name), name in cls._optional_components, path)
        return {**parts, **given}

    # --- what it is made of ------------------------------------------------------------------------------------------

    @property
    def components(self) -> dict[str, Any]:
        """The components by name, None for one that is absent: ``Other(**pipe.components)`` shares them."""
        return self._parts()

    @property
    def parameters(self) -> dict[str, Any]:
        """The settings that the constructor takes: ``Other(**pipe.components, **pipe.parameters)``."""
        taken = inspect.signature(type(self)).parameters
        return {name: value for name, value in self._settings.items() if name in taken}

    def _parts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._component_names}  # a pipeline may override `components`

    @property
    def _execution_device(self) -> torch.device:
        """The device that the networks compute on: ``device``, under the name that pipelines of the reference read."""
        return self.device

    @property
    def config(self) -> Config:
        """What ``model_index.json`` says besides the class: each component's library and class, and the settings.

        An optional component that cannot be saved, such as a function, stands there as an absent one.
        """
        parts = {
            name: library_and_class(name, compiled_from(component), name in self._optional_components)
            for name, component in self._parts().items()
        }
        return Config({**parts, **self._settings})

    def _index(self) -> dict[str, Any]:
        """Return the content of ``model_index.json``."""
        return {"_class_name": type(self).__name__, "_diffusers_version": REFERENCE_VERSION, **self.config}

    def _networks(self) -> list[nn.Module]:
        return [part for _, part in sorted(self._parts().items()) if isinstance(part, nn.Module)]

    def optimize(self) -> "DiffusionPipeline":
        """Make the UNet and the autoencoder faster in inference and return the pipeline itself.

        Weights, names and, beyond rounding, results stay the same; see ``minidiff.fast`` for what is done. On the CPU
        it takes memory for a second copy of the UNet's weights. Another pipeline with the same networks is faster too.
        It is for the device that the networks are on: call it after ``to``.
        """
        from minidiff.fast import optimize

        for network in self._networks():
            optimize(network)
        return self

    def unoptimize(self) -> "DiffusionPipeline":
        """Undo ``optimize`` and return the pipeline itself."""
        from minidiff.fast import restore

        for network in self._networks():
            restore(network)
        return self

    @staticmethod
    def numpy_to_pil(images: "np.ndarray") -> "list[Image.Image]":
        """Turn pixels (B, H, W, C) or (H, W, C) in [0, 1] into pictures."""
        from minidiff.images.tensors import as_pictures  # brings PIL

        return as_pictures(images)

    # --- progress ----------------------------------------------------------------------------------------------------

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> "tqdm[Any]":
        """Return a tqdm bar over ``iterable``, or one of ``total`` steps to be updated by hand."""
        from tqdm.auto import tqdm

        if iterable is None and total is None:
            raise ValueError("progress_bar needs an iterable or a total")
        return tqdm(iterable, total=total, **self._progress_bar_config)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Set tqdm's options for this pipeline, such as ``disable=True`` or ``leave=False``."""
        self._progress_bar_config = options
