"""3x3 convolutions in float32 with 4/9 of the multiplications: Winograd's minimal filtering, F(2x2, 3x3).

In one dimension, two neighbouring outputs of a kernel (g0, g1, g2) over the inputs d0 ... d3 need four products
instead of six:

    t = (d0 - d2, d1 + d2, d2 - d1, d1 - d3)
    u = (g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2)
    m = t u
    y0 = m0 + m1 + m2,  y1 = m1 - m2 - m3

Done along the columns of what was done along the rows, a tile of 2x2 outputs needs 16 products instead of 36. Over all
tiles and channels each product is one of matrices, (tiles, C_in) (C_in, C_out). Where the map is a small one with each
pixel doubled (``Upsample``), t2 is zero and a tile is left with 9 products.

Lavin & Gray 2016 (https://arxiv.org/abs/1509.09308), section 4.1. Sums and differences add to the rounding error: over
512 channels it is 7e-7 of the result (root mean square), 2.4e-7 the usual way. bfloat16, whose products are rounded to
three digits before they are added up, is left alone.
"""

import torch
from torch import Tensor

from minidiff.fast.packed import pack_matrix, product

G = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))  # u = G g
G_DOUBLED = ((1, 0, 0), (1, 1, 1), (0, 0, 1))  # of a doubled map, where t1 = 2 d1 and t2 = 0
LEAST_TILES, LEAST_CHANNELS = 256, 64  # below, the products are too small to be fast

Matrices = list[list[Tensor]]  # packed, one for each row and column of a tile of products


def pays(W: Tensor, x: Tensor) -> bool:
    """Return whether a 3x3 convolution of x (B, C_in, H, W) with stride and padding 1 is faster this way."""
    B, _, H, width = x.shape
    fits = x.dtype != torch.bfloat16 and W.shape[2:] == (3, 3) and H % 2 == width % 2 == 0
    return fits and min(W.shape[:2]) >= LEAST_CHANNELS and B * H * width // 4 >= LEAST_TILES


def pays_doubled(W: Tensor, x: Tensor) -> bool:
    """Return whether doubling x (B, C, H, W) and convolving it is faster this way."""
    return x.dtype != torch.bfloat16 and len(W) >= LEAST_CHANNELS and x.numel() // x.shape[1] >= LEAST_TILES


def pack(W: Tensor, tiles: int, G: tuple[tuple[float, ...], ...] = G) -> Matrices:
    """Turn a kernel (C_out, C_in, 3, 3) into the matrices that the products are taken with: u = G g G^T."""
    g = torch.tensor(G, dtype=W.dtype)
    u = torch.einsum("ir, js, ocrs -> ijoc", g, g, W)
    return [[pack_matrix(matrix, tiles) for matrix in row] for row in u]


def conv3x3(d: Tensor, u: Matrices, bias: Tensor | None, out: Tensor) -> None:
    """Convolve d (B, C_in, 2n + 2, 2m + 2), which has its border, into ``out`` (B, C_out, 2n, 2m)."""
    d, out = pixels(d), pixels(out)
    (B, H, W, _), C = out.shape, d.shape[-1]
    rows, tiles = d.new_empty(B, H // 2, W + 2, C), d.new_empty(B, H // 2, W // 2, C)
    done = []
    for i in range(4):
        _transform(d, 1, i, rows)
        m = []
        for j in range(4):
            _transform(rows, 2, j, tiles)
            # The product in the middle is in all four outputs, with a plus.
            m.append(product(tiles, u[i][j], bias if i == j == 1 else None))
        done.append((m[0].add_(m[1]).add_(m[2]), m[1].sub_(m[2]).sub_(m[3])))
    for j in range(2):
        m = [pair[j] for pair in done]
        torch.add(m[0].add_(m[1]), m[2], out=out[:, 0::2, j::2])
        torch.sub(m[1].sub_(m[2]), m[3], out=out[:, 1::2, j::2])


def conv3x3_doubled(d: Tensor, u: Matrices, bias: Tensor | None, out: Tensor) -> None:
    """Double each pixel of d (B, C_in, n + 2, m + 2), which has its border, and convolve into ``out`` (.., 2n, 2m).

    Along one axis the inputs of a tile are a, b, b, c: t0 = a - b, t1 = 2 b, t3 = b - c, and t3 is the t0 of the next.
    The factor 2 has gone into u.
    """
    d, out = pixels(d), pixels(out)
    n, m = out.shape[1] // 2, out.shape[2] // 2
    step = d[:, :-1] - d[:, 1:]
    for i, rows in enumerate((step[:, :n], d[:, 1:-1], step[:, 1:])):
        across = rows[:, :, :-1] - rows[:, :, 1:]
        ts = across[:, :, :m], rows[:, :, 1:-1], across[:, :, 1:]
        m0, m1, m2 = (product(t.contiguous(), u[i][j], bias if i == j == 1 else None) for j, t in enumerate(ts))
        for j, y in enumerate((m0 + m1, m1 - m2)):
            if i == 0:
                out[:, 0::2, j::2] = y
            elif i == 1:
                out[:, 0::2, j::2] += y
                out[:, 1::2, j::2] = y
            else:
                out[:, 1::2, j::2] -= y


def pixels(x: Tensor) -> Tensor:
    """Look at a map (B, C, H, W) as (B, H, W, C)."""
    return x.permute(0, 2, 3, 1)


def _transform(d: Tensor, axis: int, k: int, out: Tensor) -> None:
    """Write t_k of all tiles along an axis of d, each beginning two pixels after the last."""
    a, b, operation = ((0, 2, torch.sub), (1, 2, torch.add), (2, 1, torch.sub), (1, 3, torch.sub))[k]
    reach = 2 * out.shape[axis] - 1
    operation(*(d[(slice(None),) * axis + (slice(k, k + reach, 2),)] for k in (a, b)), out=out)
