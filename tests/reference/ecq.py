"""Entropy-constrained quantization, slowly: one code after another in plain Python, from the definitions."""

import math

import numpy as np


def cheapest(target, weight, costs, most):
    """Of the two nearest codes on either side, and 0, the one with the least weight * (code - target)² + costs[|code|];
    of equal ones the first."""
    target = min(max(target, -most), most)
    low = math.floor(target)
    tried = [k for k in (low - 1, low, low + 1, low + 2, 0) if abs(k) <= most]
    return min(tried, key=lambda k: weight * (k - target) ** 2 + costs[abs(k)])


def feedback(w, hessian, step, power, costs, contexts, most):
    """Codes of (rows, cols) in the order of the columns, each column's rounding error taken up by the best change of
    all columns behind it: the minimum of the quadratic over these, found by solving, not by a factor."""
    rows, cols = w.shape
    codes = np.zeros((rows, cols), int)
    for r in range(rows):
        left = w[r].copy()
        for i in range(cols):
            inverse = np.linalg.inv(hessian[i:, i:])
            pivot = inverse[0, 0]  # 1 over what a change of this entry costs, the ones behind it following
            codes[r, i] = cheapest(left[i] / step, power[r] * step**2 / pivot, costs[contexts[r, i]], most)
            error = left[i] - step * codes[r, i]
            left[i:] -= error * inverse[0] / pivot
    return codes


def objective(codes, w, hessian, step, power, costs, contexts):
    """Error and bits of every row together, (rows,)."""
    change = step * codes - w
    error = np.einsum("ri,ij,rj->r", change, hessian, change)
    bits = np.take_along_axis(costs[contexts], abs(codes)[:, :, None], axis=2)[:, :, 0]
    return power * error + bits.sum(axis=1)
