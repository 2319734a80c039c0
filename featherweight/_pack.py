"""Dense bit packing: n-bit integers and bitmasks as bytes, least significant bit first.

Value i of an n-bit stream occupies bits i*n .. i*n+n-1 of the stream; bit j of the stream is bit j%8 of byte j//8.
The last byte is padded with zeros, and a reader refuses anything else there.
"""

from math import gcd

import numpy as np
import torch
from torch import Tensor


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` values of `bits` bits take.

    >>> packed_size(5, 3)
    2
    """
    return (count * bits + 7) // 8


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack integers 0 .. 2**bits - 1 (any shape, row-major, at most 16 bits) into a uint8 vector.

    >>> pack(torch.tensor([1, 2, 3, 0, 1]), bits=2)
    tensor([57,  1], dtype=torch.uint8)
    """
    flat = values.reshape(-1).to(torch.uint8 if bits <= 8 else torch.int32).cpu().numpy()
    if bits == 8:
        return torch.from_numpy(flat.copy())
    period, width = _period(bits)
    groups = -(-len(flat) // period)
    given = np.zeros(groups * period, flat.dtype)
    given[: len(flat)] = flat
    columns, rows = given.reshape(groups, period), np.zeros((groups, width), np.uint8)
    for i in range(period):
        byte, shift = divmod(i * bits, 8)
        value = (columns[:, i].astype(np.uint32) & (2**bits - 1)) << shift
        for k in range((shift + bits + 7) // 8):
            rows[:, byte + k] |= (value >> (8 * k)).astype(np.uint8)
    return torch.from_numpy(rows.reshape(-1)[: packed_size(len(flat), bits)].copy())


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` values of a stream written by `pack`, as a uint8 vector, or int32 above 8 bits.

    Raises:
        ValueError: the stream has another length, or its padding is not zero.
    """
    data = packed.cpu().numpy()
    if data.size != packed_size(count, bits):
        raise ValueError(f"{count} values of {bits} bits take {packed_size(count, bits)} bytes, got {data.size}")
    spare = 8 * data.size - count * bits
    if spare and data[-1] >> (8 - spare):
        raise ValueError("the padding bits of a packed tensor are not zero")
    if bits == 8:
        return torch.from_numpy(data.copy())
    period, width = _period(bits)
    groups = -(-count // period)
    given = np.zeros(groups * width, np.uint8)
    given[: data.size] = data
    rows = given.reshape(groups, width)
    found = np.empty((groups, period), np.uint8 if bits < 8 else np.int32)
    for i in range(period):
        byte, shift = divmod(i * bits, 8)
        value = rows[:, byte].astype(np.uint16 if bits < 8 else np.int32)
        for k in range(1, (shift + bits + 7) // 8):
            value |= rows[:, byte + k].astype(value.dtype) << (8 * k)
        found[:, i] = (value >> shift) & (2**bits - 1)
    return torch.from_numpy(found.reshape(-1)[:count].copy())


def _period(bits: int) -> tuple[int, int]:
    """After how many values the places in bytes are the same again, and how many bytes these take."""
    values = 8 // gcd(bits, 8)
    return values, values * bits // 8
