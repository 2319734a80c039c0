"""The inner loops of rounding to a grid, compiled by numba for the CPU. Rows (or groups) run in parallel; the result of
one depends neither on the others nor on the number of threads."""

import numpy as np
from numba import prange

from featherweight.methods._numba import parallel


@parallel()
def polish_rows(w, hessian, scale, zero, keep, codes, top, sweeps):  # pragma: no cover - compiled
    """Coordinate descent on the codes of every row, in place: column after column, the best code with all others fixed,
    until a sweep changes nothing (at most `sweeps`). (v - w) H (v - w)ᵀ never rises."""
    rows, cols = w.shape
    for r in prange(rows):
        gradient = np.zeros(cols, w.dtype)
        for i in range(cols):
            d = (scale[r, i] * (codes[r, i] - zero[r, i]) if keep[r, i] else 0.0) - w[r, i]
            if d != 0.0:
                for j in range(cols):
                    gradient[j] += d * hessian[i, j]
        for _ in range(sweeps):
            changed = False
            for i in range(cols):
                if not keep[r, i]:
                    continue
                now = float(codes[r, i])
                target = now - gradient[i] / (hessian[i, i] * scale[r, i])
                code = min(max(np.rint(target), 0.0), top)
                if code != now and abs(code - target) < abs(now - target) - 1e-9:
                    step = scale[r, i] * (code - now)
                    for j in range(cols):
                        gradient[j] += step * hessian[i, j]
                    codes[r, i] = np.uint8(code)
                    changed = True
            if not changed:
                break


TILE = 8  # rows that go through a Hessian factor together, so that it is read from memory once for all of them


@parallel()
def feedback_rows(w, upper, scale, zero, keep, top):  # pragma: no cover - compiled
    """GPTQ: round column after column, moving each error onto the columns behind it.

    w, scale, zero, keep: (blocks, rows, cols); w is overwritten. upper: (blocks, cols, cols), U with H^-1 = Uᵀ U.
    Returns codes (blocks, rows, cols) uint8, and each rounding error divided by the diagonal of U.
    """
    blocks, rows, cols = w.shape
    codes = np.zeros((blocks, rows, cols), np.uint8)
    errors = np.empty_like(w)
    tiles = (rows + TILE - 1) // TILE
    for task in prange(blocks * tiles):
        b, first = task // tiles, task % tiles * TILE
        last = min(first + TILE, rows)
        for i in range(cols):
            factor = upper[b, i]
            for r in range(first, last):
                row = w[b, r]
                code = min(max(np.rint(row[i] / scale[b, r, i] + zero[b, r, i]), 0.0), top)
                codes[b, r, i] = np.uint8(code)
                rounded = scale[b, r, i] * (code - zero[b, r, i]) if keep[b, r, i] else 0.0
                error = (row[i] - rounded) / factor[i]
                errors[b, r, i] = error
                for j in range(i + 1, cols):
                    row[j] -= error * factor[j]
    return codes, errors


@parallel()
def best_grid(w, importance, scales, zeros, top):  # pragma: no cover - compiled
    """Which of the candidate grids rounds each group with the smallest weighted squared error, (groups,).

    w, importance: (groups, entries). scales, zeros: (groups, candidates).
    """
    groups, entries = w.shape
    best = np.zeros(groups, np.int64)
    for g in prange(groups):
        least = np.inf
        for k in range(scales.shape[1]):
            scale, zero, lost = scales[g, k], zeros[g, k], 0.0
            for i in range(entries):
                code = min(max(np.rint(w[g, i] / scale + zero), 0.0), top)
                error = scale * (code - zero) - w[g, i]
                lost += importance[g, i] * error * error
            if lost < least:
                best[g], least = k, lost
    return best
