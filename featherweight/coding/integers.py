"""Matrices of small integers, most of them near 0: codes of grids, masks.

Every magnitude is coded in a context: how large its neighbours are that are known already, in a weighted mean of the
two to its left, the row so far and the column so far. Neither the entry above nor the same tap of the channel before
says more (tried on the codes of three networks), and all contexts together save 1 to 3 %. Models start from a geometric
distribution of the context's mean, so that small matrices need not learn what is known. A context's models: is it more
than 0, than 1, than 3, than 7, ...; then the bits below the leading one.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from featherweight.coding._coder import (
    LEAST,
    RATES,
    Array,
    decoder,
    encoder,
    even_bit,
    exhausted,
    finish,
    model_bit,
    overrun,
)
from featherweight.coding._coder import MOST as SUREST
from featherweight.errors import FormatError, require

MOST = 255  # magnitude
CONTEXTS, CLASSES = 36, 9
PER = 2 * CLASSES  # models of a context
SHARED = CONTEXTS * PER  # the first of those that all contexts share: two a class
SIGN = SHARED + 2 * CLASSES
MODELS = SIGN + 1
SEEN, FRESH = 4, 2  # bits that a model counts as having seen at the beginning, in a context and elsewhere


# Between contexts, in 256ths of a mean magnitude: ceil(64 (2^(k/4) - 1)), k = 1 to 35.
# fmt: off
THRESHOLDS = np.array(
    [
        13, 27, 44, 64, 89, 118, 152, 192, 241, 299, 367, 448, 545, 661, 798,
        960, 1154, 1385, 1659, 1984, 2372, 2833, 3381, 4032, 4807, 5729, 6825, 8128, 9678, 11522,
        13714, 16320, 19420, 23107, 27491,
    ],
    np.int64,
)
# fmt: on


def _start() -> tuple[Array, Array]:
    """(probabilities, counts) of all models: those of a geometric distribution in every context."""
    p, n = np.full(MODELS, 32768, np.int64), np.full(MODELS, FRESH, np.int64)
    ends = [0, *THRESHOLDS.tolist(), 2 * int(THRESHOLDS[-1])]
    for x in range(CONTEXTS):
        mean = (ends[x] + ends[x + 1]) // 2
        more = (65536 * mean) // (256 + mean)  # that it is at least k + 1, where it is at least k
        for k in range(CLASSES):
            p[x * PER + k] = min(max(more, LEAST), SUREST)
            if k + 2 < CLASSES:
                p[x * PER + CLASSES + k + 2] = min(max((more << 16) // (65536 + more), LEAST), SUREST)
            if k:
                more = (more * more) >> 16
        n[x * PER : (x + 1) * PER] = SEEN
    return p, n


START = _start()


def encode_integers(values: Tensor, most: int, keep: Tensor | None = None, signed: bool = True) -> Tensor | None:
    """The bytes of a (rows, cols) matrix, uint8, or None where they are no fewer than one for every entry.

    Args:
        values: of magnitude up to `most`, 1 to 255; not negative where they are not `signed`.
        keep: (rows, cols) bool: the other entries are zero and not stored.
    """
    require(1 <= most <= MOST, f"magnitudes must be at most 1 to {MOST}", most)
    given = values.to(torch.int16).contiguous().numpy().copy()
    kept = _kept(given.shape, keep)
    state, room = encoder(given.size - 1)
    p, n = (t.copy() for t in START)
    _walk(given, kept, most, signed, state, room, p, n, THRESHOLDS, RATES)
    found = finish(state, room)
    return None if found is None else torch.from_numpy(found)


def decode_integers(
    data: Tensor, shape: tuple[int, int], most: int, keep: Tensor | None = None, signed: bool = True
) -> Tensor:
    """The matrix, int16. Arguments as they were encoded with.

    Raises:
        FormatError: the bytes are no code of such a matrix.
    """
    found = np.zeros(shape, np.int16)
    state, given = decoder(data.numpy())
    p, n = (t.copy() for t in START)
    _walk(found, _kept(shape, keep), most, signed, state, given, p, n, THRESHOLDS, RATES)
    if not exhausted(state, given):
        raise FormatError("damaged: coded integers end before or behind their last byte")
    if np.abs(found).max(initial=0) > most:
        raise FormatError(f"damaged: coded integers are larger than {most}")
    return torch.from_numpy(found)


def _kept(shape: tuple[int, ...], keep: Tensor | None) -> Array:
    """One entry stands for all where all are kept."""
    return np.ones((1, 1), np.bool_) if keep is None else np.ascontiguousarray(keep.numpy().reshape(shape))


def contexts(values: Tensor) -> Tensor:
    """The context of every entry of a (rows, cols) matrix, int64: 0 to CONTEXTS - 1."""
    return torch.from_numpy(_contexts(values.to(torch.int16).contiguous().numpy(), THRESHOLDS))


def costs(values: Tensor, where: Tensor, most: int) -> Tensor:
    """(CONTEXTS, most + 1) float64: about how many bits a magnitude takes in a context, with its sign, if the other
    entries are `values`, in the contexts `where`. Models as the coder would have them at the end."""
    classes = CLASSES + 1
    sizes = values.abs().to(torch.int64).reshape(-1)
    kind = torch.searchsorted(2 ** torch.arange(classes), sizes, right=True)  # bits of the magnitude
    seen = torch.bincount(where.reshape(-1) * (classes + 1) + kind, minlength=CONTEXTS * (classes + 1))
    seen = seen.reshape(CONTEXTS, classes + 1).double()
    reached = seen.flip(1).cumsum(1).flip(1)  # of at least that class
    start = torch.from_numpy(START[0][:SHARED]).reshape(CONTEXTS, PER)[:, :CLASSES].double() / 65536
    more = (SEEN * start + reached[:, 1 : CLASSES + 1]) / (SEEN + reached[:, :CLASSES])
    up, stop = -torch.log2(more), -torch.log2(1 - more)
    size = torch.arange(most + 1)
    own = torch.searchsorted(2 ** torch.arange(classes), size, right=True)
    climbed = torch.cat([torch.zeros(CONTEXTS, 1, dtype=torch.float64), up.cumsum(1)], dim=1)
    top = int(most).bit_length()
    last = torch.where(own < top, stop[:, own.clamp(max=CLASSES - 1)], 0.0)
    return climbed[:, own] + last + own.double()  # a sign, and all but the leading one of its bits


@njit(cache=True, nogil=True, inline="always")
def _context(values, r, c, row, column, thresholds):  # pragma: no cover - compiled
    """row, column: sums of the magnitudes to the left and above."""
    total, weight = 0, 0
    if c >= 1:
        by_row = min(c, 16)
        total = 320 * abs(values[r, c - 1]) + 32 * by_row * row // c
        weight = 20 + 2 * by_row
    if c >= 2:
        total += 160 * abs(values[r, c - 2])
        weight += 10
    if r >= 1:
        by_column = min(r, 8)
        total += 80 * by_column * column // r
        weight += 5 * by_column
    mean = 16 * total // weight if weight > 0 else 64
    x = 0
    while x < len(thresholds) and mean >= thresholds[x]:
        x += 1
    return x


@njit(cache=True, nogil=True)
def _walk(values, kept, most, signed, state, buffer, p, n, thresholds, rates):  # pragma: no cover - compiled
    rows, cols = values.shape
    sparse = kept.size != 1 or values.size == 1
    column = np.zeros(cols, np.int64)
    top = 0
    while (1 << top) <= most:
        top += 1
    for r in range(rows):
        row = 0
        for c in range(cols):
            if sparse and not kept[r, c]:
                continue
            if overrun(state, buffer):
                return
            x = _context(values, r, c, row, column[c], thresholds)
            size = abs(values[r, c])
            k = 0
            while k < top and model_bit(state, buffer, int(size >= (1 << k)), p, n, 18 * x + k, rates):
                k += 1
            if k == 0:
                continue
            found = 1
            for j in range(k - 2, -1, -1):
                bit = (size >> j) & 1
                if j == k - 2:
                    bit = model_bit(state, buffer, bit, p, n, 18 * x + 9 + k, rates)
                elif j == k - 3:
                    bit = model_bit(state, buffer, bit, p, n, 648 + 2 * k + (found & 1), rates)
                else:
                    bit = even_bit(state, buffer, bit)
                found = 2 * found + bit
            negative = 0
            if signed:
                negative = model_bit(state, buffer, int(values[r, c] < 0), p, n, 666, rates)
            values[r, c] = -found if negative else found
            row += found
            column[c] += found


@njit(cache=True, nogil=True)
def _contexts(values, thresholds):  # pragma: no cover - compiled
    rows, cols = values.shape
    found = np.zeros((rows, cols), np.int64)
    column = np.zeros(cols, np.int64)
    for r in range(rows):
        row = 0
        for c in range(cols):
            found[r, c] = _context(values, r, c, row, column[c], thresholds)
            row += abs(values[r, c])
            column[c] += abs(values[r, c])
    return found
