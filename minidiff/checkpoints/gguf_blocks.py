"""Quantised blocks of GGUF files, unpacked to float32.

A block is 32 or 256 values in a row: small integers q and what turns them into numbers, x = d q, x = d q + m, or in
"K-quants" x = (d s_j) q - (d_min m_j) for each part j of 16 or 32 values, where d, d_min and m are float16 and s_j, m_j
small integers too. The layouts are those of ggml (https://github.com/ggml-org/ggml, ``src/ggml-common.h``); bit for bit
what its Python package ``gguf`` unpacks.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def _numbers(raw: Tensor) -> Tensor:
    """Read float16: (n, 2 k) bytes -> (n, k)."""
    return raw.contiguous().view(torch.float16).float()


def _fields(raw: Tensor, group: int, bits: int) -> Tensor:
    """Cut bytes (n, B) into fields of so many bits: (n, 8 B / bits), of each group of bytes the lowest fields first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    return (raw.reshape(len(raw), -1, 1, group) >> shifts & 2**bits - 1).flatten(1)


def _q4_0(raw: Tensor) -> Tensor:
    d, q = raw.split([2, 16], 1)
    return _numbers(d) * (_fields(q, 16, 4).float() - 8)


def _q4_1(raw: Tensor) -> Tensor:
    d, m, q = raw.split([2, 2, 16], 1)
    return _numbers(d) * _fields(q, 16, 4).float() + _numbers(m)


def _q5_0(raw: Tensor) -> Tensor:
    d, high, q = raw.split([2, 4, 16], 1)
    return _numbers(d) * ((_fields(q, 16, 4) | _fields(high, 1, 1) << 4).float() - 16)


def _q5_1(raw: Tensor) -> Tensor:
    d, m, high, q = raw.split([2, 2, 4, 16], 1)
    return _numbers(d) * (_fields(q, 16, 4) | _fields(high, 1, 1) << 4).float() + _numbers(m)


def _q8_0(raw: Tensor) -> Tensor:
    d, q = raw.split([2, 32], 1)
    return _numbers(d) * q.view(torch.int8).float()


def _q2_k(raw: Tensor) -> Tensor:
    s, q, d, d_min = raw.split([16, 64, 2, 2], 1)
    scale, least = _numbers(d) * (s & 15).float(), _numbers(d_min) * (s >> 4).float()
    return scale[..., None] * _fields(q, 32, 2).view(-1, 16, 16).float() - least[..., None]


def _q3_k(raw: Tensor) -> Tensor:
    high, q, s, d = raw.split([32, 64, 12, 2], 1)
    s = (_fields(s[:, :8], 8, 4) | _fields(s[:, 8:], 4, 2) << 4).float() - 32
    q = (_fields(q, 32, 2) | _fields(high, 32, 1) << 2).view(-1, 16, 16).float() - 4
    return (_numbers(d) * s)[..., None] * q


def _scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack eight s_j and eight m_j of six bits each from 12 bytes: (n, 12) -> (n, 8), (n, 8)."""
    s, m, high = raw.split([4, 4, 4], 1)
    low = torch.cat([s & 63, high & 15 | s >> 2 & 48], 1), torch.cat([m & 63, high >> 4 | m >> 2 & 48], 1)
    return low[0].float(), low[1].float()


def _q4_k(raw: Tensor) -> Tensor:
    d, d_min, packed, q = raw.split([2, 2, 12, 128], 1)
    return _scaled(d, d_min, packed, _fields(q, 32, 4))


def _q5_k(raw: Tensor) -> Tensor:
    d, d_min, packed, high, q = raw.split([2, 2, 12, 32, 128], 1)
    return _scaled(d, d_min, packed, _fields(q, 32, 4) | _fields(high, 32, 1) << 4)


def _scaled(d: Tensor, d_min: Tensor, packed: Tensor, q: Tensor) -> Tensor:
    s, m = _scales(packed)
    return (_numbers(d) * s)[..., None] * q.view(-1, 8, 32).float() - (_numbers(d_min) * m)[..., None]


def _q6_k(raw: Tensor) -> Tensor:
    q, high, s, d = raw.split([128, 64, 16, 2], 1)
    q = (_fields(q, 64, 4) | _fields(high, 32, 2) << 4).view(-1, 16, 16).float() - 32
    return (_numbers(d) * s.view(torch.int8).float())[..., None] * q


class Block(NamedTuple):
    """One kind of block: its number in GGUF files, values, bytes, and what unpacks (n, bytes) to n times the values."""

    number: int
    values: int
    size: int
    unpack: Callable[[Tensor], Tensor]


BLOCKS = {
    "Q4_0": Block(2, 32, 18, _q4_0),
    "Q4_1": Block(3, 32, 20, _q4_1),
    "Q5_0": Block(6, 32, 22, _q5_0),
    "Q5_1": Block(7, 32, 24, _q5_1),
    "Q8_0": Block(8, 32, 34, _q8_0),
    "Q2_K": Block(10, 256, 84, _q2_k),
    "Q3_K": Block(11, 256, 110, _q3_k),
    "Q4_K": Block(12, 256, 144, _q4_k),
    "Q5_K": Block(13, 256, 176, _q5_k),
    "Q6_K": Block(14, 256, 210, _q6_k),
}
