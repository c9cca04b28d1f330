"""Gaussian draws whose number and order are the reference's, so that a seed means the same picture.

Checked against ``diffusers.utils.torch_utils.randn_tensor``.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor


def randn(
    shape: Sequence[int],
    generator: Generator | Sequence[Generator] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw a standard normal tensor of ``shape`` (B, ...) on ``device``.

    One generator (or none: torch's global one) draws the whole batch at once. A list of B generators draws one
    (1, ...) tensor each, so picture k does not depend on the batch it is in; a list of one is that one generator.
    A CPU generator draws on the CPU and the result is moved, so its numbers are the same on every device.

    Raises TypeError for anything but generators, ValueError for a list whose length is not B and for a generator
    that lives on another accelerator.
    """
    device = torch.device("cpu" if device is None else device)
    if generator is None or isinstance(generator, Generator):
        return _draw(shape, generator, device, dtype)
    if not isinstance(generator, (list, tuple)) or not all(isinstance(one, Generator) for one in generator):
        raise TypeError(f"generator should be a torch.Generator or a list of them, found {generator!r}")
    if len(generator) == 1:
        return _draw(shape, generator[0], device, dtype)
    if len(generator) != shape[0]:
        raise ValueError(
            f"a list of {len(generator)} generators for a batch of {shape[0]}: give one generator per picture, or one"
        )
    return torch.cat([_draw((1, *shape[1:]), one, device, dtype) for one in generator])


def _draw(shape: Sequence[int], generator: Generator | None, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    source = device if generator is None else generator.device
    if source.type not in ("cpu", device.type):
        raise ValueError(f"a generator on {source} cannot draw for {device}: make it on 'cpu' or on {device.type!r}")
    # A generator on the same kind of device draws on the tensor's own device; only a CPU one draws elsewhere.
    where = device if source.type == device.type else source
    return torch.randn(tuple(shape), generator=generator, device=where, dtype=dtype).to(device)
