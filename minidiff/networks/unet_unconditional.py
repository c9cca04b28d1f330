"""The unconditional UNet: predicts the noise in a picture (B, C, H, W), given the time and, if it knows any, a class.

The body is that of ``minidiff.networks.unet``: residual blocks down, a middle, residual blocks up, with
self-attention over the pixels at some levels. This face adds the ways in which time and
class come in; their embeddings are summed.

Papers: Ho et al. 2020 (DDPM, https://arxiv.org/abs/2006.11239), appendix B; Song et al. 2021 (score SDE,
https://arxiv.org/abs/2011.13456), appendix H, for Fourier features of the time; Dhariwal & Nichol 2021 (ADM,
https://arxiv.org/abs/2105.05233), for residual blocks that change the resolution, and classes.
Checked against ``diffusers.UNet2DModel``.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from minidiff.checkpoints.names import canonical_vae_name, unconditional_unet_rows
from minidiff.checkpoints.remap import Row
from minidiff.networks.classes import check_indices
from minidiff.networks.layers import FourierFeatures
from minidiff.networks.specs.fields import show_fields
from minidiff.networks.specs.unet_unconditional import unconditional_unet_config, unconditional_unet_spec
from minidiff.networks.unet import UNet
from minidiff.outputs import Output


@dataclass
class UNet2DOutput(Output):
    """What the UNet returns: its prediction (B, out_channels, H, W)."""

    sample: Tensor


class UNet2DModel(UNet):
    """Predict noise (or v, or x0, as the checkpoint was trained) from a noisy picture and the time.

    Keyword arguments are the fields of the Hub's ``config.json``, with the reference's defaults.

    Raises:
        ConfigError: naming each field that is unknown or has a value that is not implemented.
    """

    canonical_hub_name = staticmethod(canonical_vae_name)

    def __init__(self, **fields: Any) -> None:
        config = unconditional_unet_config(fields)
        super().__init__(config, unconditional_unet_spec(config))

    def _make_embeddings(self) -> None:
        config, C = self.config, self.config.block_out_channels[0]
        self.time_proj = None
        if config.time_embedding_type == "fourier":
            self.time_proj = FourierFeatures(C)
        elif config.time_embedding_type == "learned":
            self.time_proj = nn.Embedding(config.num_train_timesteps, C)
        super()._make_embeddings()

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict from a noisy picture.

        Args:
            sample: noisy pictures, (B, in_channels, H, W), any H and W.
            timestep: one time for all, or (B,) times; 0 is nearly clean, 999 nearly pure noise. A network with Fourier
                features is told noise levels, above 0, and its prediction is divided by them.
            class_labels: one class for all, or (B,) classes, see ``Classes``. Only for networks that have classes, and
                needed by them.
            return_dict: whether to return a record or a tuple.

        Raises:
            ValueError: on a shape or a time that does not fit, and if labels are missing or have no place.
        """
        self._check_sample(sample)
        t = self._times(sample, timestep)
        temb = self.time_embed(self._encode_times(t).to(sample.dtype))
        x = self._body(sample, self._tell_class(temb, class_labels))
        if self.config.time_embedding_type == "fourier":
            x = (x / t.reshape(-1, 1, 1, 1)).to(x.dtype)  # score = -eps / sigma: t is the noise level in such networks
        return UNet2DOutput(x) if return_dict else (x,)

    def _times(self, sample: Tensor, timestep: Tensor | float | int) -> Tensor:
        """Return one time per sample, (B,), on its device."""
        if isinstance(timestep, float):
            if not timestep.is_integer():
                raise ValueError(
                    f"timestep {timestep}: UNet2DModel of the reference drops the fraction of a Python number; pass "
                    f"torch.tensor({timestep}) to keep it, or int({timestep}) to drop it"
                )
            timestep = int(timestep)
        return super()._times(sample, timestep)

    def _encode_times(self, t: Tensor) -> Tensor:
        """Encode times (B,) as features (B, time_features)."""
        if self.time_proj is None:
            return super()._encode_times(t)
        if self.config.time_embedding_type == "learned":
            check_indices("timestep", t, self.config.num_train_timesteps)
        elif t.device.type == "cpu" and not bool((t > 0).all()):  # elsewhere, looking would wait for the device
            raise ValueError(f"Fourier features need times above 0, because they use the logarithm: found {t.tolist()}")
        return self.time_proj(t)

    def rows(self) -> list[Row]:
        """Return the name table of this configuration: ours, Hub, and the Hub's again for single files."""
        return list(unconditional_unet_rows(self.spec, self.config))


show_fields(UNet2DModel.__init__, unconditional_unet_config({}))
