"""The binary range coder and its adaptive probabilities, compiled; all in whole numbers, so that every machine gives
the same bytes.

An interval [low, high] of 32-bit numbers is cut in two for every bit, in proportion to the bit's probability, and the
part of the bit that comes is kept; leading bytes that both ends share are done (a carry-less range coder, in the manner
of Mahoney's lpaq). A probability is that of a 1, in 65536ths; each bit moves it by 2 / (2 n + 3) of the way, n how many
it has seen, at most LIMIT. The same code encodes and decodes: where it decodes, the bit is what it finds.
"""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

LIMIT = 255  # bits after which a probability moves no more slowly
LEAST, MOST = 32, 65504  # of a probability, so that no bit costs more than 11
EVEN = 32768
RATES = np.array([131072 // (2 * n + 3) for n in range(LIMIT + 1)], np.int64)
LOW, HIGH, PLACE, CODE, ENCODING = range(5)  # of the coder's state
MASK = 0xFFFFFFFF
PAST = 4  # bytes behind the end that a decoder may look at: they count as 0

Array = NDArray[Any]


def encoder(capacity: int) -> tuple[Array, Array]:
    """(state, room for `capacity` bytes)."""
    return np.array([0, MASK, 0, 0, 1], np.int64), np.zeros(max(capacity, 0), np.uint8)


def decoder(data: Array) -> tuple[Array, Array]:
    """(state, the bytes)."""
    first = np.zeros(4, np.int64)
    first[: min(len(data), 4)] = data[:4]
    code = int(first[0] << 24 | first[1] << 16 | first[2] << 8 | first[3])
    return np.array([0, MASK, 4, code, 0], np.int64), np.ascontiguousarray(data)


def finish(state: Array, room: Array) -> Array | None:
    """The bytes of an encoder, or None where they are more than there is room for. Behind those that are done, as few
    as say which interval it is: a decoder takes what is missing as zeros."""
    low, high, place = (int(state[i]) for i in (LOW, HIGH, PLACE))
    if place > len(room):
        return None
    left = next(n for n in range(5) if (high >> (32 - 8 * n) << (32 - 8 * n)) >= low)
    last = high >> (32 - 8 * left) << (32 - 8 * left)
    data = np.concatenate([room[:place], np.frombuffer(last.to_bytes(4, "big")[:left], np.uint8)])
    return data if len(data) <= len(room) else None


def exhausted(state: Array, data: Array) -> bool:
    """Whether a decoder has read all of its bytes, and not more than can be: else they are no code of what it found."""
    return len(data) <= int(state[PLACE]) <= len(data) + PAST


@njit(cache=True, nogil=True)
def overrun(state, buffer):  # pragma: no cover - compiled
    """Whether no further bit can make it right: there is no room for it, or it would be read from behind the end. A
    bit may be worth a thousandth of a byte, so that few bytes would take long to read as many numbers."""
    return state[2] > len(buffer) + 4


@njit(cache=True, nogil=True, inline="always")
def _cut(state, buffer, bit, p):  # pragma: no cover - compiled
    """The bit of probability p (of a 1, in 65536ths): the one given, or the one found."""
    low, high = state[0], state[1]
    mid = low + (((high - low) * p) >> 16)
    if state[4] == 0:
        bit = 1 if state[3] <= mid else 0
    if bit:
        high = mid
    else:
        low = mid + 1
    while (low ^ high) >> 24 == 0:
        place = state[2]
        if state[4] == 0:
            state[3] = ((state[3] << 8) & 0xFFFFFFFF) | (buffer[place] if place < len(buffer) else 0)
        elif place < len(buffer):
            buffer[place] = high >> 24
        state[2] = place + 1
        low = (low << 8) & 0xFFFFFFFF
        high = ((high << 8) & 0xFFFFFFFF) | 255
    state[0], state[1] = low, high
    return bit


@njit(cache=True, nogil=True)
def even_bit(state, buffer, bit):  # pragma: no cover - compiled
    """A bit that is as often 0 as 1."""
    return _cut(state, buffer, bit, 32768)


@njit(cache=True, nogil=True)
def model_bit(state, buffer, bit, p, n, i, rates):  # pragma: no cover - compiled
    """A bit of model i; p, n: (models,) int64, probabilities and how many bits each has seen."""
    chance = p[i]
    bit = _cut(state, buffer, bit, chance)
    rate = rates[n[i]]
    if bit:
        chance += ((65536 - chance) * rate) >> 16
        p[i] = min(chance, 65504)
    else:
        chance -= (chance * rate) >> 16
        p[i] = max(chance, 32)
    if n[i] < 255:
        n[i] += 1
    return bit
