"""Gaussian draws whose number and order are the reference's, so that a seed means the same picture.

Checked against ``diffusers.utils.torch_utils.randn_tensor``.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import Protocol

import torch
from torch import Generator, Tensor

Generators = Generator | Sequence[Generator] | None  # one for the batch, one for each picture, or torch's own


class DrawsNoise(Protocol):
    """What a request must say for its noise to be drawn."""

    count: int  # of pictures
    generator: Generators
    seed: int | None
    seeds: Sequence[int] | None


def make_generators(request: DrawsNoise) -> tuple[Generators, list[int] | None]:
    """Return what draws the noise of the pictures, and their seeds if they have some.

    Seeds give every picture a CPU generator of its own, so picture k depends neither on the rest of the batch nor on
    the device; ``seed=s`` stands for ``seeds=[s, s + 1, ...]``. A ``generator`` is used as the reference uses it.
    """
    generator, seed, seeds, count = request.generator, request.seed, request.seeds, request.count
    if sum(one is not None for one in (generator, seed, seeds)) > 1:
        raise ValueError("give one of generator=, seed= and seeds=")
    if seed is not None:
        seeds = [_checked_seed(seed) + k for k in range(count)]
    if seeds is None:
        if isinstance(generator, (list, tuple)) and len(generator) != count:
            raise ValueError(f"generator is a list of {len(generator)} for {count} pictures: give one each, or one")
        return generator, None
    if isinstance(seeds, str) or not isinstance(seeds, Sequence) or len(seeds) != count:
        raise ValueError(f"seeds should be a list of {count} integers, one per picture; found {seeds!r}")
    seeds = [_checked_seed(s) for s in seeds]
    return [Generator("cpu").manual_seed(s) for s in seeds], seeds


def _checked_seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"a seed should be an integer, found {seed!r}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"a seed should be an integer from -2^63 to 2^64 - 1, found one of {seed.bit_length()} bits")
    return int(seed)


def initial_latents(
    shape: tuple[int, ...], latents: Tensor | None, generator: Generators, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the given latents, checked, or draw standard normal ones; not yet scaled to the scheduler's sigma."""
    if latents is None:
        return randn(shape, generator, device=device, dtype=dtype)
    if not isinstance(latents, Tensor):
        raise TypeError(f"latents should be a tensor, found {type(latents).__name__}")
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents should be {shape} for this batch and size, found {tuple(latents.shape)}")
    if not latents.is_floating_point() or not (latents.is_meta or latents.isfinite().all()):
        kind = "NaN or infinity" if latents.is_floating_point() else str(latents.dtype)
        raise ValueError(f"latents should be finite floating-point numbers, found {kind}")
    return latents.to(device, dtype)


def randn(
    shape: Sequence[int],
    generator: Generators = None,
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
