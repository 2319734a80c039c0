"""Dense bit packing: n-bit integers and bitmasks as bytes, least significant bit first.

Value i of an n-bit stream occupies bits i*n .. i*n+n-1 of the stream; bit j of the stream is bit j%8 of byte j//8.
The last byte is padded with zeros, and a reader refuses anything else there.
"""

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
    if bits > 8:
        wide = values.reshape(-1).cpu().numpy().astype("<u2").view(np.uint8).reshape(-1, 2)
        table = np.unpackbits(wide, axis=1, count=bits, bitorder="little")
        return torch.from_numpy(np.packbits(table.reshape(-1), bitorder="little"))
    flat = values.reshape(-1).to(torch.uint8).cpu().numpy()
    if bits == 8:
        return torch.from_numpy(flat.copy())
    table = np.unpackbits(flat[:, None], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(table.reshape(-1), bitorder="little"))


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
    table = np.unpackbits(data, count=count * bits, bitorder="little").reshape(count, bits)
    if bits > 8:
        wide = np.packbits(np.pad(table, ((0, 0), (0, 16 - bits))), axis=1, bitorder="little")
        return torch.from_numpy(wide.view("<u2").reshape(count).astype(np.int32))
    return torch.from_numpy(np.packbits(table, axis=1, bitorder="little").reshape(count))
