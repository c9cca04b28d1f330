"""``ModelMixin``: a network of one's own that is configured, loaded and saved as those of the Hub are.

    class Denoiser(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, width: int = 64) -> None:
            super().__init__()
            self.layer = nn.Linear(width, width)

Its weights have the names of its attributes, in Python and in the file. Checked against ``diffusers.ModelMixin``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from minidiff.checkpoints.casting import LayerwiseCasting
from minidiff.checkpoints.load import Opened
from minidiff.checkpoints.model import Pretrained
from minidiff.configured import ConfigMixin


class ModelMixin(ConfigMixin, LayerwiseCasting, Pretrained):
    """Base of networks of one's own: an ``nn.Module`` with ``from_pretrained`` and ``save_pretrained``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            return ConfigMixin.__getattr__(self, name)  # which warns

    @classmethod
    def _loaded(cls, fields: Mapping[str, Any], overrides: dict[str, Any], weights: Opened, dtype: torch.dtype) -> Any:
        """Build it as its constructor says, since that may compute more than weights, then take the file's over."""
        model = cls.from_config(fields, **overrides)
        model.load_state_dict({tensor.name: tensor.mapped for tensor in weights[1]})
        return model.to(dtype)
