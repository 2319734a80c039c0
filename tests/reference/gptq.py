"""GPTQ on one row, by its meaning: fix one column after another, and after each solve for the others exactly."""

import numpy as np
from numpy import ndarray

from tests.reference.obs import nearest


def quantize_row(
    w: ndarray, h: ndarray, order: list[int], scale: ndarray, zero: ndarray, top: int, keep: ndarray | None = None
) -> ndarray:
    """Codes (cols,) of the row. Columns outside `keep` are fixed to zero; their codes are left at zero."""
    codes, fixed = np.zeros(len(w), int), np.zeros(len(w))
    now = w.copy()
    for i, p in enumerate(order):
        if keep is None or keep[p]:
            codes[p] = nearest(now[p], scale[p], zero[p], top)
            fixed[p] = scale[p] * (codes[p] - zero[p])
        done, rest = order[: i + 1], order[i + 1 :]
        if rest:  # where the loss, given the done columns, has no slope: h_rr (now - w)_r + h_rd (fixed - w)_d = 0
            pull = h[np.ix_(rest, done)] @ (fixed - w)[done]
            now[rest] = w[rest] - np.linalg.solve(h[np.ix_(rest, rest)], pull)
    return codes
