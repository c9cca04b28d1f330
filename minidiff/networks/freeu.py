"""FreeU: on the way up of a UNet, louder what comes from below, and quieter the low frequencies of the skips.

    x[:, : C/2] <- b x[:, : C/2],      skip <- ifft(mask · fft(skip)),   mask = s at the four lowest frequencies, else 1

with s1, b1 at the coarsest level and s2, b2 at the next. It costs no training and changes no weights. Si et al. 2023
(https://arxiv.org/abs/2309.11497), section 3.2. Checked against ``enable_freeu`` of ``diffusers.UNet2DConditionModel``,
which scales half of the channels by a number, as the first version of the paper does.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class FreeU(NamedTuple):
    """How much the skips are attenuated and the rest is amplified, at the coarsest level (1) and the next (2)."""

    s1: float
    s2: float
    b1: float
    b2: float

    def __call__(self, i: int, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Return what comes from below and the skip, (B, C, H, W) each, as level i on the way up is to see them."""
        if i > 1:
            return x, skip
        s, b = ((self.s1, self.b1), (self.s2, self.b2))[i]
        half = x.shape[1] // 2
        louder = torch.cat([x[:, :half] * b, x[:, half:]], dim=1)
        if skip is x:  # without a middle the first skip is what comes from below, which the reference changes in place
            skip = louder
        return louder, scale_low_frequencies(skip, s)


def scale_low_frequencies(x: Tensor, s: float) -> Tensor:
    """Scale the frequencies 0 and -1 along height and width by ``s``; computed in float32, as in the reference."""
    waves = torch.fft.fftshift(torch.fft.fftn(x.float(), dim=(-2, -1)), dim=(-2, -1))
    mask = torch.ones(x.shape, device=x.device)
    H, W = x.shape[-2] // 2, x.shape[-1] // 2  # where the shift puts frequency 0
    mask[..., H - 1 : H + 1, W - 1 : W + 1] = s
    return torch.fft.ifftn(torch.fft.ifftshift(waves * mask, dim=(-2, -1)), dim=(-2, -1)).real.to(x.dtype)
