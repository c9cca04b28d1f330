"""``Model``: what every network can do besides computing: be loaded from a checkpoint in Hub layout, and be saved."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from minidiff.checkpoints.hub import WHY_NO_PICKLES, Repo
from minidiff.checkpoints.load import OnMeta, as_dtype, load_weights, paused_collector
from minidiff.checkpoints.remap import Row, translate
from minidiff.checkpoints.save import save_json, save_weights
from minidiff.config import Config, read_json
from minidiff.errors import CheckpointError, ConfigError

REFERENCE_VERSION = "0.42.1"  # of diffusers, whose layout our files follow; it treats files of old versions specially

# Arguments of the reference that choose how it loads. These values ask for nothing that minidiff would have to do.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "low_cpu_mem_usage": (True, False, None),  # memory use is always low
    "device_map": (None,),
    "ignore_mismatched_sizes": (False,),
    "output_loading_info": (False,),
    "trust_remote_code": (False, None),
}


def refuse_unless_harmless(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return ``arguments`` without the reference's loading options; raise ``TypeError`` if one asks for something."""
    for name, values in HARMLESS.items():
        if name in arguments and arguments[name] not in values:
            raise TypeError(f"{name}={arguments[name]!r} is not implemented; load on the CPU, then call .to(device)")
    return {name: value for name, value in arguments.items() if name not in HARMLESS}


def refuse_pickles(use_safetensors: bool | None) -> None:
    """Raise ``CheckpointError`` if pickled weights are asked for with ``use_safetensors=False``."""
    if use_safetensors is False:
        raise CheckpointError(f"use_safetensors=False asks for pickled weights: {WHY_NO_PICKLES}")


class Model(nn.Module):
    """Base of every network. A subclass says how it is configured and how its weights are called on the Hub."""

    weights_stem: ClassVar[str] = "diffusion_pytorch_model"  # of the weight files: "model" for text encoders
    config: Config

    @classmethod
    def from_config(cls, fields: Mapping[str, Any], **overrides: Any) -> "Model":
        """Build a network with new weights from the fields of a Hub config."""
        raise NotImplementedError

    def rows(self) -> list[Row]:
        """Return the rows of the name table that belong to this configuration."""
        raise NotImplementedError

    @classmethod
    def canonical_hub_name(cls, name: str) -> str | None:
        """Return the modern Hub spelling of a stored name, or None for a tensor that is left out on purpose."""
        return name

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
        **overrides: Any,
    ) -> "Model":
        """Load a network from a folder in Hub layout or from the Hub; only its config and weights are downloaded.

        The network is on the CPU and in evaluation mode. Weights that are stored in the wanted dtype are memory-mapped.

        Args:
            pretrained_model_name_or_path: a folder, or a Hub id such as ``"stabilityai/sd-vae-ft-mse"``.
            subfolder: where the network lies inside it, such as ``"unet"``.
            variant: which of several weight files, such as ``"fp16"``. It names a file, not a dtype.
            torch_dtype: dtype of the weights, float32 by default whatever is stored; ``dtype`` is another name of it.
            revision: branch, tag or commit on the Hub.
            overrides: configuration fields to use instead of those in ``config.json``.

        Raises:
            CheckpointNotFoundError: if the folder, repository or a file is not there.
            CheckpointError: if the tensors do not fit the configuration, or only pickled weights are asked for.
            ConfigError: if the configuration is not one that minidiff implements.
        """
        refuse_pickles(use_safetensors)
        overrides = refuse_unless_harmless(overrides)
        wanted = as_dtype(torch_dtype, dtype)
        source = pretrained_model_name_or_path
        repo = Repo(source, subfolder, revision, cache_dir, bool(local_files_only), token, force_download)
        path = repo.file("config.json")
        fields = read_json(path)
        if fields.get("_class_name", cls.__name__) != cls.__name__:
            raise ConfigError(f"{path} describes a {fields['_class_name']}, not a {cls.__name__}; is subfolder= right?")
        weights = repo.pinned(path).weights(cls.weights_stem, variant)
        with paused_collector():
            with OnMeta():
                model = cls.from_config(fields, **overrides)
            load_weights(model, weights, wanted)
        return model.eval()

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        """Write config and weights in Hub layout and spelling, so that diffusers and transformers load them too.

        Args:
            save_directory: made if it does not exist. Weights of the same variant in it are replaced.
            variant: goes into the file name, as in ``diffusion_pytorch_model.fp16.safetensors``.
            max_shard_size: in bytes, or a string such as ``"500MB"``; more than that is split into indexed shards.
        """
        if not safe_serialization:
            raise CheckpointError("safe_serialization=False asks for a pickle; minidiff writes only safetensors")
        folder = Path(save_directory)
        self.save_config(folder)
        tensors = translate(self.state_dict(), self.rows(), "ours", "hub")
        save_weights(tensors, folder, self.weights_stem, variant, max_shard_size)

    def save_config(self, save_directory: str | Path) -> None:
        """Write ``config.json`` only."""
        folder = Path(save_directory)
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file; save_pretrained needs a folder")
        folder.mkdir(parents=True, exist_ok=True)
        save_json(self.config_to_save(), folder / "config.json")

    def config_to_save(self) -> dict[str, Any]:
        """Return the fields of ``config.json``, in the manner of diffusers; text encoders have that of transformers."""
        fields = {name: value for name, value in self.config.items() if not name.startswith("_")}
        return {"_class_name": type(self).__name__, "_diffusers_version": REFERENCE_VERSION, **fields}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count the weights; optionally only those with a gradient, or without those of embedding tables."""
        tables = {id(module.weight) for module in self.modules() if isinstance(module, nn.Embedding)}
        return sum(
            parameter.numel()
            for parameter in self.parameters()
            if (parameter.requires_grad or not only_trainable) and not (exclude_embeddings and id(parameter) in tables)
        )
