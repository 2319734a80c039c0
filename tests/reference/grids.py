"""Uniform grids by exhaustive search: scales, codes and coordinate descent, in plain loops over float64 values."""

from itertools import product

import numpy as np
from numpy import ndarray

from tests.reference.obs import loss


def search_scale(
    values: list[float], counts: list[float], bits: int, symmetric: bool, dtype: type = np.float16
) -> tuple[float, float]:
    """(scale, zero) of one group: of 80 shrinks of the range the one whose rounding error, weighted by `counts`, is
    smallest. Scales are rounded to `dtype` before they are tried."""
    top = 2**bits - 1
    low, high = min([*values, 0.0]), max([*values, 0.0])
    if symmetric:
        high = max(high, -low)
        low = -high
    best, found = np.inf, (0.0, 0.0)
    for i in range(80):
        shrink = 1 - i / 100
        scale = float(dtype((high - low) * shrink / top))
        if symmetric:
            zero = 0.5 if bits == 1 else 2.0 ** (bits - 1)
        else:
            zero = min(max(float(np.rint(-low * shrink / scale)), 0.0), float(top))
        lost = 0.0
        for value, count in zip(values, counts, strict=True):
            code = min(max(float(np.rint(value / scale + zero)), 0.0), float(top))
            lost += count * (scale * (code - zero) - value) ** 2
        if lost < best:
            best, found = lost, (scale, zero)
    return found


def decode(codes: ndarray, scale: ndarray, zero: ndarray) -> ndarray:
    return scale * (codes - zero)


def best_codes_loss(w: ndarray, h: ndarray, scale: ndarray, zero: ndarray, top: int) -> float:
    """The smallest loss of any codes for the row w. Tries all of them."""
    codes = product(range(top + 1), repeat=len(w))
    return min(loss(w, h, decode(np.array(c), scale, zero)) for c in codes)


def descend(
    w: ndarray, h: ndarray, scale: ndarray, zero: ndarray, top: int, codes: ndarray, keep: ndarray, sweeps: int
) -> ndarray:
    """Column after column, try every code and keep the best, until a sweep changes nothing."""
    codes = codes.copy()

    def lost(c: ndarray) -> float:
        return loss(w, h, np.where(keep, decode(c, scale, zero), 0.0))

    for _ in range(sweeps):
        before = codes.copy()
        for i in np.flatnonzero(keep):
            tried = []
            for code in range(top + 1):
                other = codes.copy()
                other[i] = code
                tried.append(lost(other))
            if min(tried) < lost(codes) * (1 - 1e-12):
                codes[i] = int(np.argmin(tried))
        if (codes == before).all():
            break
    return codes


def best_scale(w: ndarray, h: ndarray, steps: ndarray) -> float:
    """The s that minimises the loss of s * steps for rows w (rows, cols): least squares on the square root of h."""
    values, vectors = np.linalg.eigh(h)
    root = (vectors * np.sqrt(values)).T
    column = np.concatenate([root @ row for row in steps])
    wanted = np.concatenate([root @ row for row in w])
    return float(np.linalg.lstsq(column[:, None], wanted, rcond=None)[0][0])
