"""Run a network over overlapping tiles of a large input, one at a time, and blend the results into one.

Along each axis a tile of ``size`` begins every ``stride``, and its result, of ``out`` for a whole tile, is blended into
that of the tile before over the n = ``blend`` positions that the two share:

    y[k] = (1 - k / n) · before[k] + (k / n) · after[k],   k = 0 ... n - 1

Checked against ``tiled_encode`` and ``tiled_decode`` of ``diffusers.AutoencoderKL``; ``laid_over``, which blends in
another way, against ``diffusers.AutoencoderTiny``.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class SavesMemory:
    """What an autoencoder can do about its memory."""

    use_slicing = use_tiling = False
    tile_sample_min_size: int  # side of a tile, in pixels
    tile_latent_min_size: int  # and in latents
    tile_overlap_factor: float  # the part of a tile that it shares with the next

    def enable_slicing(self) -> None:
        """Encode and decode the pictures of a batch one after the other. The pictures stay the same."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode a batch at once."""
        self.use_slicing = False

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Encode and decode what is larger than a tile in overlapping tiles; each sees no further than its own edge.

        Change ``tile_sample_min_size``, ``tile_latent_min_size`` and ``tile_overlap_factor`` for other tiles.
        """
        self.use_tiling = use_tiling

    def disable_tiling(self) -> None:
        """Encode and decode pictures of any size at once."""
        self.use_tiling = False

    def _one_by_one(self, run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        """Return ``run(batch)``, computed one sample at a time if slicing is on."""
        return torch.cat([run(one) for one in batch.split(1)]) if self.use_slicing and len(batch) > 1 else run(batch)

    def _tiles(self, size: int, out: int, f: int) -> "Tiles":
        """Return tiles of ``size`` whose results have ``out``, where f pixels along each side are a latent."""
        if self.tile_sample_min_size != f * self.tile_latent_min_size:
            raise ValueError(
                f"tile_sample_min_size should be {f} times tile_latent_min_size, as pixels are to latents; "
                f"found {self.tile_sample_min_size} and {self.tile_latent_min_size}"
            )
        return Tiles.of(size, out, self.tile_overlap_factor)


class Tiles(NamedTuple):
    """How an axis is cut; ``size`` and ``stride`` count positions of the input, the others those of the result."""

    size: int
    stride: int
    out: int
    blend: int

    @classmethod
    def of(cls, size: int, out: int, overlap: float) -> "Tiles":
        """Return tiles of ``size`` whose results have ``out``, which share about the part ``overlap`` with the next.

        Raises:
            ValueError: if ``overlap`` is not in [0, 1), or the tiles of the result would not lie where those of the
                input do, so that the picture would come out with another size. The reference makes such pictures.
        """
        if not 0 <= overlap < 1:
            raise ValueError(f"tile_overlap_factor should be at least 0 and below 1, found {overlap}")
        tiles = cls(size, int(size * (1 - overlap)), out, int(out * overlap))
        if tiles.stride < 1 or tiles.stride * out != (out - tiles.blend) * size:
            raise ValueError(
                f"tile_overlap_factor={overlap} cuts tiles of {size} and of {out} at different places, {tiles.stride} "
                f"of the one and {out - tiles.blend} of the other; 0.25, with tiles of a power of two, fits"
            )
        return tiles

    def starts(self, length: int) -> range:
        """Return where tiles begin along an axis; but the first, none too small for a single position of the result."""
        least = max(self.size // self.out, 1)
        return range(0, max(length - least, 0) + 1, self.stride)


def in_tiles(network: Callable[[Tensor], Tensor], x: Tensor, tiles: Tiles) -> Tensor:
    """Return what ``network`` makes of ``x`` (B, C, H, W), computed tile by tile."""
    keep = tiles.out - tiles.blend
    above: list[Tensor] = []
    rows = []
    for top in tiles.starts(x.shape[2]):
        row: list[Tensor] = []
        for j, left in enumerate(tiles.starts(x.shape[3])):
            tile = network(x[:, :, top : top + tiles.size, left : left + tiles.size])
            if above:
                tile = _blended(above[j], tile, tiles.blend, dim=2)
            if row:
                tile = _blended(row[-1], tile, tiles.blend, dim=3)
            row.append(tile)
        rows.append(torch.cat([tile[:, :, :keep, :keep] for tile in row], dim=3))
        above = row
    return torch.cat(rows, dim=2)


def _blended(before: Tensor, after: Tensor, n: int, dim: int) -> Tensor:
    """Return ``after`` with its first n positions along ``dim`` blended with the last n of ``before``."""
    n = min(before.shape[dim], after.shape[dim], n)
    if n == 0:
        return after
    k = torch.arange(n, dtype=torch.float64, device="cpu")
    w = torch.stack([1 - k / n, k / n]).to(after.device, torch.promote_types(after.dtype, torch.float32))
    w = w.reshape(2, -1, *[1] * (3 - dim))  # along dim
    old, new = before.narrow(dim, before.shape[dim] - n, n), after.narrow(dim, 0, n)
    mixed = (old * w[0]).to(after.dtype) + (new * w[1]).to(after.dtype)
    return torch.cat([mixed, after.narrow(dim, n, after.shape[dim] - n)], dim=dim)


def laid_over(network: Callable[[Tensor], Tensor], x: Tensor, tiles: Tiles) -> Tensor:
    """Return what ``network`` makes of ``x`` (B, C, H, W), each tile laid over those above it and on its left.

    y <- m · tile + (1 - m) · y,   m[i, j] = w[i] w[j],   w[k] = min(k / (n - 1), 1), 1 along an edge of the picture
    """
    H, W = (-(-side * tiles.out // tiles.size) for side in x.shape[2:])
    y = None
    for top, left in itertools.product(tiles.starts(x.shape[2]), tiles.starts(x.shape[3])):
        tile = network(x[:, :, top : top + tiles.size, left : left + tiles.size])
        if y is None:
            y = tile.new_zeros(*tile.shape[:2], H, W, dtype=torch.promote_types(tile.dtype, torch.float32))
        i, j = (start * tiles.out // tiles.size for start in (top, left))
        h, w = tile.shape[2:]
        m = _ramp(i, h, tiles.blend, y)[:, None] * _ramp(j, w, tiles.blend, y)
        here = y[:, :, i : i + h, j : j + w]
        here.copy_(m * tile + (1 - m) * here)
    return y.to(x.dtype)


def _ramp(start: int, length: int, n: int, like: Tensor) -> Tensor:
    """Return the weights w (length,) of a tile along an axis on which it begins at ``start``."""
    k = torch.arange(length, dtype=like.dtype, device=like.device)
    return (k / max(n - 1, 1)).clamp(max=1) if start and n else torch.ones_like(k)
