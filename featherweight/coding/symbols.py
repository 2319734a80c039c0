"""Symbols of a fixed number of bits that have no order, such as the numbers of words in a book.

The bits of a symbol are coded from the highest, each by a model of its own for every beginning: a binary tree.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from featherweight.coding._coder import EVEN, RATES, decoder, encoder, exhausted, finish, model_bit, overrun
from featherweight.errors import FormatError, require

WIDEST = 16  # bits


def encode_symbols(values: Tensor, bits: int) -> Tensor | None:
    """The bytes of symbols from 0 to 2**bits - 1, any shape, row-major, or None where they are no fewer than the
    symbols take without coding."""
    require(1 <= bits <= WIDEST, f"bits must be 1 to {WIDEST}", bits)
    given = values.reshape(-1).to(torch.int64).numpy().copy()
    state, room = encoder((len(given) * bits + 7) // 8 - 1)
    _walk(given, bits, state, room, *_fresh(bits), RATES)
    found = finish(state, room)
    return None if found is None else torch.from_numpy(found)


def decode_symbols(data: Tensor, count: int, bits: int) -> Tensor:
    """The symbols, (count,) int64.

    Raises:
        FormatError: the bytes are no code of so many.
    """
    found = np.zeros(count, np.int64)
    state, given = decoder(data.numpy())
    _walk(found, bits, state, given, *_fresh(bits), RATES)
    if not exhausted(state, given):
        raise FormatError("damaged: coded symbols end before or behind their last byte")
    return torch.from_numpy(found)


def _fresh(bits: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(1 << bits, EVEN, np.int64), np.full(1 << bits, 2, np.int64)


@njit(cache=True, nogil=True)
def _walk(values, bits, state, buffer, p, n, rates):  # pragma: no cover - compiled
    for i in range(len(values)):
        if overrun(state, buffer):
            return
        node = 1
        for j in range(bits - 1, -1, -1):
            node = 2 * node + model_bit(state, buffer, (values[i] >> j) & 1, p, n, node, rates)
        values[i] = node - (1 << bits)
