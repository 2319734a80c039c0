"""The inner loops of entropy-constrained quantization, compiled. Rows run in parallel; the result of one depends
neither on the others nor on the number of threads."""

import numpy as np
from numba import prange

from featherweight.methods._numba import compiled, parallel


@compiled(inline="always")
def cheapest(target, weight, costs, most):  # pragma: no cover - compiled
    """The code with the least weight * (code - target)² + costs[|code|], of the two nearest on either side, and 0."""
    target = min(max(target, -float(most)), float(most))
    low = int(np.floor(target))
    best, code = np.inf, 0
    for k in range(-1, 4):
        tried = low + k if k < 3 else 0
        if abs(tried) <= most:
            cost = weight * (tried - target) ** 2 + costs[abs(tried)]
            if cost < best:
                best, code = cost, tried
    return code


@parallel()
def feedback(w, upper, step, power, costs, contexts, most):  # pragma: no cover - compiled
    """Choose the codes of columns one after another, moving each error onto the columns behind.

    w: (blocks, rows, cols), overwritten. upper: (blocks, cols, cols), U with H^-1 = Uᵀ U. power: (blocks, rows), what
    the squared error of a row counts, over lambda. costs: (contexts, magnitudes), bits. contexts: (blocks, rows, cols).
    Returns codes (blocks, rows, cols) int16, and each error divided by the diagonal of U.
    """
    blocks, rows, cols = w.shape
    codes = np.zeros((blocks, rows, cols), np.int16)
    errors = np.empty_like(w)
    for task in prange(blocks * rows):
        b, r = task // rows, task % rows
        row = w[b, r]
        for i in range(cols):
            factor = upper[b, i]
            weight = power[b, r] * (step / factor[i]) ** 2
            code = cheapest(row[i] / step, weight, costs[contexts[b, r, i]], most)
            codes[b, r, i] = code
            error = (row[i] - step * code) / factor[i]
            errors[b, r, i] = error
            for j in range(i + 1, cols):
                row[j] -= error * factor[j]
    return codes, errors


@parallel()
def polish(gradient, hessian, step, power, costs, contexts, codes, most, sweeps):  # pragma: no cover - compiled
    """Coordinate descent on the codes of every row, in place: column after column the best code with all others fixed,
    until a sweep changes nothing (at most `sweeps`). Error and bits together never rise.

    gradient: (blocks, rows, cols), of half the squared error in the values; overwritten. Others as `feedback`.
    """
    blocks, rows, cols = codes.shape
    for task in prange(blocks * rows):
        b, r = task // rows, task % rows
        slope = gradient[b, r]
        for _ in range(sweeps):
            changed = False
            for i in range(cols):
                own = hessian[b, i, i]
                if own <= 0:
                    continue
                now = int(codes[b, r, i])
                target = now - slope[i] / (own * step)
                weight = power[b, r] * own * step * step
                table = costs[contexts[b, r, i]]
                code = cheapest(target, weight, table, most)
                gain = weight * ((now - target) ** 2 - (code - target) ** 2) + table[abs(now)] - table[abs(code)]
                if code != now and gain > 1e-9:
                    moved = step * (code - now)
                    for j in range(cols):
                        slope[j] += moved * hessian[b, i, j]
                    codes[b, r, i] = code
                    changed = True
            if not changed:
                break
