"""How a UNet is told a class: what a picture shows, or how noisy the small picture is that an upscaler enlarges.

======================  ===========================================================  =============
kind                    embedding (B, E) of the labels                               labels
======================  ===========================================================  =============
``table``               the row of that number in a table                            (B,) integers
``timestep``            as a time: sines and cosines, then two linear layers         (B,)
``identity``            the labels themselves                                        (B, E)
``projection``          two linear layers of the labels                              (B, width)
``simple_projection``   one linear layer of the labels                               (B, width)
======================  ===========================================================  =============

It is added to the embedding of the time, or put beside it. In a configuration ``class_embed_type`` names the kind, and
``num_class_embeds`` without it is the size of a table. Dhariwal & Nichol 2021 (ADM,
https://arxiv.org/abs/2105.05233), section 3; Ho et al. 2021 (cascades, https://arxiv.org/abs/2106.15282), section 4,
for the noise that a small picture was given.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minidiff.networks.layers import TimeMLP
from minidiff.networks.specs import UNetSpec


class Classes:
    """What a UNet does about classes."""

    spec: UNetSpec
    class_embed: nn.Module | None
    _encode_times: Callable[[Tensor], Tensor]

    def _make_classes(self) -> nn.Module | None:
        """Make what embeds the labels."""
        spec, width = self.spec, self.spec.class_width
        kinds: dict[str | None, Callable[[], nn.Module | None]] = {
            None: lambda: None,
            "table": lambda: nn.Embedding(width, spec.E),
            "timestep": lambda: TimeMLP(spec.time_features, spec.E),
            "identity": nn.Identity,
            "projection": lambda: TimeMLP(width, spec.E),
            "simple_projection": lambda: nn.Linear(width, spec.E),
        }
        return kinds[spec.class_embed]()

    def _tell_class(self, temb: Tensor, labels: Tensor | None) -> Tensor:
        """Return the embedding (B, E) of the time with that of the class added, or beside it: (B, 2 E)."""
        if self.class_embed is None:
            if labels is not None:
                raise ValueError("class_labels given to a network without classes (num_class_embeds, class_embed_type)")
            return temb
        if labels is None:
            raise ValueError(
                "class_labels should be provided when num_class_embeds > 0 or there is a class_embed_type: this "
                f"network knows classes ({self.spec.class_embed}); call unet(..., class_labels=...)"
            )
        embedded = self.class_embed(self._class_input(temb, labels)).to(temb.dtype)
        return torch.cat([temb, embedded.expand_as(temb)], dim=1) if self.spec.class_concat else temb + embedded

    def _class_input(self, temb: Tensor, labels: Tensor) -> Tensor:
        """Return what is embedded of the labels. Raises ``ValueError`` or ``TypeError`` if they do not fit."""
        kind, B = self.spec.class_embed, len(temb)
        rest = () if kind in ("table", "timestep") else (self.spec.class_width or self.spec.E,)
        if not isinstance(labels, Tensor):
            raise TypeError(f"class_labels should be a tensor {(B, *rest)}, found {labels!r}")
        if labels.shape not in ((1, *rest), (B, *rest)):
            raise ValueError(f"class_labels should be {(B, *rest)}, found {tuple(labels.shape)}")
        if kind == "table":
            check_indices("class_labels", labels, self.spec.class_width)
            return labels
        return (self._encode_times(labels) if kind == "timestep" else labels).to(temb.dtype)


def check_indices(name: str, values: Tensor, count: int) -> None:
    """Raise if ``values`` are not row numbers of a table with ``count`` rows."""
    if values.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} should be integers from 0 to {count - 1}, found {values.dtype}")
    looks = values.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere one would wait
    if looks and not bool(((values >= 0) & (values < count)).all()):
        raise ValueError(f"{name} should be from 0 to {count - 1}, found {values.tolist()}")
