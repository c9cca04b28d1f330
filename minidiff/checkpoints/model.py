"""``Model``: what every network can do besides computing: be loaded from a checkpoint in Hub layout, and be saved."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minidiff.atomic import unchanged, whole_folder
from minidiff.checkpoints.arguments import device_of, refuse_unless_harmless
from minidiff.checkpoints.casting import compute_dtype
from minidiff.checkpoints.config_file import ConfigFile
from minidiff.checkpoints.hub import WHY_NO_PICKLES, Repo
from minidiff.checkpoints.load import OnMeta, Opened, as_dtype, load_weights, paused_collector, read_headers
from minidiff.checkpoints.save import save_json, save_weights
from minidiff.compat.network import Named
from minidiff.config import REFERENCE_VERSION, Config, read_json
from minidiff.errors import CheckpointError, ConfigError
from minidiff.registry import published

_LOADING_INFO = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def refuse_pickles(use_safetensors: bool | None) -> None:
    """Raise ``CheckpointError`` if pickled weights are asked for with ``use_safetensors=False``."""
    if use_safetensors is False:
        raise CheckpointError(f"use_safetensors=False asks for pickled weights: {WHY_NO_PICKLES}")


class Pretrained(ConfigFile, nn.Module):
    """A network that is loaded and saved in Hub layout: ``config.json`` beside safetensors."""

    weights_stem: ClassVar[str] = "diffusion_pytorch_model"  # of the weight files: "model" for text encoders
    config_name = "config.json"
    _keep_in_fp32_modules: ClassVar[None] = None  # read by programs that choose a dtype: no part is kept in another
    _repeated_blocks: ClassVar[tuple[str, ...]] = ()  # classes of which a network has many, worth compiling alone
    config: Config

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        force_download: bool = False,
        use_safetensors: bool | None = None,
        device_map: str | int | torch.device | Mapping[str, Any] | None = None,
        output_loading_info: bool = False,
        **overrides: Any,
    ) -> Any:
        """Load a network from a folder in Hub layout or from the Hub; only its config and weights are downloaded.

        The network is in evaluation mode, and on the CPU if not asked otherwise. Weights that are stored in the wanted
        dtype are memory-mapped.

        Args:
            pretrained_model_name_or_path: a folder, or a Hub id such as ``"stabilityai/sd-vae-ft-mse"``.
            subfolder: where the network lies inside it, such as ``"unet"``.
            variant: which of several weight files, such as ``"fp16"``. It names a file, not a dtype.
            torch_dtype: dtype of the weights, float32 by default whatever is stored; ``dtype`` is another name of it.
            revision: branch, tag or commit on the Hub.
            device_map: the device to load to; "auto" is the GPU where there is one.
            output_loading_info: whether to return what did not fit too: nothing, since all of it raises.
            overrides: configuration fields to use instead of those in ``config.json``.

        Returns:
            The network, or with ``output_loading_info`` the network and a dict of empty lists.

        Raises:
            CheckpointNotFoundError: if the folder, repository or a file is not there.
            CheckpointError: if the tensors do not fit the configuration, or only pickled weights are asked for.
            ConfigError: if the configuration is not one that minidiff implements.
        """
        refuse_pickles(use_safetensors)
        overrides = refuse_unless_harmless(overrides)
        device = device_of(device_map)
        wanted = as_dtype(torch_dtype, dtype)
        source = pretrained_model_name_or_path
        repo = Repo(source, subfolder, revision, cache_dir, bool(local_files_only), token, force_download)
        path = repo.file("config.json")
        with unchanged(path):
            fields = read_json(path)
            kind = fields.get("_class_name", cls.__name__)
            if kind not in [base.__name__ for base in cls.__mro__]:
                raise ConfigError(f"{path} describes a {kind}, not a {cls.__name__}; is subfolder= right?")
            weights = repo.pinned(path).weights(cls.weights_stem, variant)
            stored = read_headers(weights)
        with paused_collector():
            model = cls._loaded(fields, overrides, (weights, stored), wanted)
        model.register_to_config(_name_or_path=str(source))
        model.eval().to(device)
        return (model, {name: [] for name in _LOADING_INFO}) if output_loading_info else model

    @classmethod
    def _loaded(cls, fields: Mapping[str, Any], overrides: dict[str, Any], weights: Opened, dtype: torch.dtype) -> Any:
        """Build a network of this configuration that has these weights."""
        raise NotImplementedError

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        *,
        save_function: Callable[..., None] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        **harmless: Any,
    ) -> None:
        """Write config and weights in Hub layout and spelling, so that diffusers and transformers load them too.

        Args:
            save_directory: made if it does not exist. Weights of the same variant in it are replaced.
            is_main_process: whether this process, of several that hold the same network, writes the weights.
            save_function: what would write pickles; for safetensors it has no part, in the reference neither.
            variant: goes into the file name, as in ``diffusion_pytorch_model.fp16.safetensors``.
            max_shard_size: in bytes, or a string such as ``"500MB"``; more than that is split into indexed shards.
        """
        if not safe_serialization:
            raise CheckpointError("safe_serialization=False asks for a pickle; minidiff writes only safetensors")
        if unknown := refuse_unless_harmless(harmless):
            raise TypeError(f"save_pretrained has no argument {', '.join(unknown)}")
        folder, tensors = Path(save_directory), self._weights()  # refused, if they are, before anything is written
        if not is_main_process or folder.is_file():
            return self.save_config(folder)
        with whole_folder(folder, self.config_name) as place:
            save_weights(tensors, place, self.weights_stem, variant, max_shard_size)
            self.save_config(place)

    def _weights(self) -> dict[str, Tensor]:
        """Return the weights under the names that they have in files."""
        return self.state_dict()

    @property
    def name_or_path(self) -> str:
        """The folder or Hub id that this was loaded from; "" for new weights."""
        return self.config.get("_name_or_path", "")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; where they are cast layer by layer, the one that the network computes in."""
        return getattr(self, "_compute_dtype", None) or compute_dtype(self._first_layer())

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self._first_layer().parameters(recurse=False)).device

    def _first_layer(self) -> nn.Module:
        return next(module for module in self.modules() if any(w is not None for w in module._parameters.values()))

    def compile_repeated_blocks(self, *args: Any, **options: Any) -> None:
        """Compile the blocks that occur many times, each by ``torch.compile(block, ...)``, instead of the network.

        Raises:
            ValueError: if this network has none that are worth it.
        """
        blocks = [module for module in self.modules() if type(module).__name__ in self._repeated_blocks]
        if not blocks:
            raise ValueError(f"{type(self).__name__} has no blocks that repeat; compile it as a whole: .compile()")
        for block in blocks:
            block.compile(*args, **options)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes of the weights and, unless told otherwise, of the buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count the weights; optionally only those with a gradient, or without those of embedding tables."""
        tables = {id(module.weight) for module in self.modules() if isinstance(module, nn.Embedding)}
        return sum(
            parameter.numel()
            for parameter in self.parameters()
            if (parameter.requires_grad or not only_trainable) and not (exclude_embeddings and id(parameter) in tables)
        )


class Model(Named, Pretrained):
    """Base of every network here. A subclass says how it is configured and how its weights are called on the Hub."""

    single_file_parts: ClassVar[tuple[str, ...]] = ()  # which components of an original single file it may be

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str | Path, **overrides: Any) -> "Model":
        """Build a network with new weights from a configuration.

        Args:
            config: the fields of a Hub config. A path or Hub id is read with ``load_config``, as the reference still
                does with a warning.
            overrides: fields to use instead; with a path also the arguments of ``load_config``.
        """
        if not isinstance(config, Mapping):
            warnings.warn(f"give {cls.__name__}.load_config({str(config)!r}) to from_config", FutureWarning, 2)
            config, overrides = cls.load_config(config, return_unused_kwargs=True, **overrides)
        return cls._of_fields(config, **overrides)

    @classmethod
    def _of_fields(cls, fields: Mapping[str, Any], **overrides: Any) -> "Model":
        return cls(**{**fields, **overrides})

    @classmethod
    def _loaded(cls, fields: Mapping[str, Any], overrides: dict[str, Any], weights: Opened, dtype: torch.dtype) -> Any:
        with OnMeta():
            model = cls.from_config(fields, **overrides)
        load_weights(model, *weights, dtype)
        return model

    def _weights(self) -> dict[str, Tensor]:
        """Return the weights in the Hub's spelling; raise ``CheckpointError`` if there are others than the table's."""
        tensors = self.state_dict()
        expected = {name for row in self.rows() for name in row.hub}
        if wrong := sorted(tensors.keys() ^ expected):
            raise CheckpointError(
                f"{type(self).__name__} cannot be saved as it is: {len(wrong)} weights are not those of its "
                f"configuration, such as {', '.join(wrong[:3])}; take out what was added to the network"
            )
        return tensors

    def save_config(self, save_directory: str | Path, **harmless: Any) -> None:
        """Write ``config.json`` only."""
        if unknown := refuse_unless_harmless(harmless):
            raise TypeError(f"save_config has no argument {', '.join(unknown)}")
        folder = Path(save_directory)
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file; save_pretrained needs a folder")
        folder.mkdir(parents=True, exist_ok=True)
        save_json(self.config_to_save(), folder / self.config_name)

    def config_to_save(self) -> dict[str, Any]:
        """Return the fields of ``config.json``, in the manner of diffusers; text encoders have that of transformers."""
        fields = {name: value for name, value in self.config.items() if not name.startswith("_")}
        kind = published(type(self)) or type(self)  # so that whoever reads the index of a pipeline finds what it says
        return {"_class_name": kind.__name__, "_diffusers_version": REFERENCE_VERSION, **fields}

    def register_to_config(self, **changes: Any) -> None:
        """Change what the configuration says. The network stays as it was built."""
        self.config = Config({**self.config, **changes})
