"""``AutoModel``: a network whose class its own configuration names. Checked against ``diffusers.AutoModel``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minidiff.checkpoints.model import Model
from minidiff.errors import ConfigError
from minidiff.registry import public


class AutoModel:
    """Stands for any network: ``AutoModel.from_pretrained(id, subfolder="unet")`` loads the class that it is."""

    load_config = Model.load_config

    def __init__(self) -> None:
        raise OSError("AutoModel stands for a network: call its from_pretrained or from_config")  # as theirs

    @classmethod
    def from_pretrained(
        cls, pretrained_model_or_path: str | Path, *, subfolder: str | None = None, **arguments: Any
    ) -> Model:
        """Load a network; the arguments are those of ``UNet2DConditionModel.from_pretrained``.

        Raises:
            ConfigError: if ``config.json`` names no network that minidiff has.
        """
        where = {"subfolder": subfolder, **arguments}
        fields, _ = cls.load_config(pretrained_model_or_path, return_unused_kwargs=True, **where)
        return _class_of(fields).from_pretrained(pretrained_model_or_path, subfolder=subfolder, **arguments)

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str | Path, **arguments: Any) -> Model:
        """Build a network with new weights from the fields of a configuration, a folder or a Hub id.

        Raises:
            ConfigError: if it names no network that minidiff has.
        """
        if config is None:
            raise ValueError("AutoModel.from_config needs a configuration, found None")
        if not isinstance(config, Mapping):
            config, arguments = cls.load_config(config, return_unused_kwargs=True, **arguments)
        return _class_of(config).from_config(config, **arguments)


def _class_of(fields: Mapping[str, Any]) -> type[Model]:
    """Return the class that a configuration names: diffusers and transformers write its name under different keys."""
    name = fields.get("_class_name") or next(iter(fields.get("architectures") or ()), None)
    found = public(name)
    if not (isinstance(found, type) and issubclass(found, Model)):
        networks = "AutoencoderKL, the encoders of CLIP, UNet2DConditionModel, UNet2DModel"
        raise ConfigError(f"the configuration is that of {name or 'no class'}; minidiff has {networks}")
    return found
