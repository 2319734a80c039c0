"""Floats to the last bit: sign, exponent and the upper bits of the mantissa by adaptive models, the rest as it is.

Numbers of a network have few exponents, and lower bits that are all zero where they were rounded. The exponent is a
symbol of a binary tree; the first HEAD bits of the mantissa are one for every exponent; every bit below has a model of
its own, but for whole bytes at the end that look like noise, which are written down beside.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from torch import Tensor

from featherweight.coding._coder import EVEN, RATES, Array, decoder, encoder, exhausted, finish, model_bit, overrun
from featherweight.errors import FormatError

HEAD = 3  # bits of the mantissa that depend on the exponent
NOISE = 0.02  # a bit that is 1 more or less often than half of the time by this much is coded
FEWEST = 1 << 12  # floats from which on bits are taken for noise


@dataclass(frozen=True, slots=True)
class _Kind:
    exponent: int
    mantissa: int
    view: torch.dtype


KINDS = {
    torch.float16: _Kind(5, 10, torch.int16),
    torch.bfloat16: _Kind(8, 7, torch.int16),
    torch.float32: _Kind(8, 23, torch.int32),
    torch.float64: _Kind(11, 52, torch.int64),
}


def encode_floats(values: Tensor) -> Tensor | None:
    """The bytes of a vector of floats, or None where they are no fewer than it has. The first one says how many bytes
    of every number are written beside, at the end."""
    if not values.numel():
        return None
    kind = KINDS[values.dtype]
    given = _whole(values, kind)
    noise = _noise(given, kind)
    beside = _beside(given, noise)
    state, room = encoder(values.numel() * values.element_size() - 2 - len(beside))
    _walk(given, kind.exponent, kind.mantissa, 8 * noise, state, room, *_fresh(kind), RATES)
    found = finish(state, room)
    if found is None:
        return None
    return torch.from_numpy(np.concatenate([np.array([noise], np.uint8), found, beside]))


def decode_floats(data: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The floats, (count,).

    Raises:
        FormatError: the bytes are no code of so many.
    """
    kind, given = KINDS[dtype], data.numpy()
    noise = int(given[0]) if len(given) else 8
    beside = count * noise
    if 8 * noise > kind.mantissa - HEAD or len(given) < 1 + beside:
        raise FormatError("damaged: coded floats are too short")
    found = np.zeros(count, np.int64)
    state, coded = decoder(given[1 : len(given) - beside])
    _walk(found, kind.exponent, kind.mantissa, 8 * noise, state, coded, *_fresh(kind), RATES)
    if not exhausted(state, coded):
        raise FormatError("damaged: coded floats end before or behind their last byte")
    if noise:
        found |= _joined(given[len(given) - beside :], noise)
    whole = torch.from_numpy(found)
    return whole.to(kind.view).view(dtype) if kind.view != torch.int64 else whole.view(dtype)


def _whole(values: Tensor, kind: _Kind) -> Array:
    """The bits of every float as a number, int64, a copy; that of a float64 may be negative."""
    bits = values.reshape(-1).contiguous().view(kind.view).to(torch.int64, copy=True)
    return (bits if kind.view == torch.int64 else bits & ((1 << (1 + kind.exponent + kind.mantissa)) - 1)).numpy()


def _noise(given: Array, kind: _Kind) -> int:
    """How many bytes at the end look like noise."""
    if len(given) < FEWEST:
        return 0
    sample = given[:: max(len(given) // (1 << 16), 1)]
    ones = [float(((sample >> i) & 1).mean()) for i in range(kind.mantissa - HEAD)]
    coded = [i for i, share in enumerate(ones) if abs(share - 0.5) > NOISE]
    return (coded[0] if coded else kind.mantissa - HEAD) // 8


def _fresh(kind: _Kind) -> tuple[Array, Array]:
    """Models: the sign, the tree of exponents, HEAD bits for every exponent, the other bits."""
    count = 1 + (1 << kind.exponent) + (1 << (kind.exponent + HEAD)) + kind.mantissa
    return np.full(count, EVEN, np.int64), np.full(count, 2, np.int64)


def _beside(values: Array, count: int) -> Array:
    """The last `count` bytes of every number, little-endian, number after number."""
    return np.ascontiguousarray(values.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :count]).reshape(-1)


def _joined(data: Array, each: int) -> Array:
    """The inverse, int64."""
    whole = np.zeros((len(data) // max(each, 1), 8), np.uint8)
    whole[:, :each] = data.reshape(-1, max(each, 1))
    return whole.reshape(-1).view("<i8")


@njit(cache=True, nogil=True)
def _walk(values, exponent_bits, mantissa_bits, noise, state, buffer, p, n, rates):  # pragma: no cover - compiled
    tree = 1
    heads = tree + (1 << exponent_bits)
    lower = heads + (8 << exponent_bits)
    for i in range(len(values)):
        if overrun(state, buffer):
            return
        value = values[i]
        found = model_bit(state, buffer, (value >> (exponent_bits + mantissa_bits)) & 1, p, n, 0, rates)
        node = 1
        for j in range(exponent_bits - 1, -1, -1):
            bit = (value >> (mantissa_bits + j)) & 1
            node = 2 * node + model_bit(state, buffer, bit, p, n, tree + node, rates)
        exponent = node - (1 << exponent_bits)
        found = (found << exponent_bits) | exponent
        node = 1
        for j in range(mantissa_bits - 1, noise - 1, -1):
            bit = (value >> j) & 1
            if j >= mantissa_bits - 3:
                bit = model_bit(state, buffer, bit, p, n, heads + 8 * exponent + node, rates)
                node = 2 * node + bit
            else:
                bit = model_bit(state, buffer, bit, p, n, lower + j, rates)
            found = (found << 1) | bit
        values[i] = found << noise
