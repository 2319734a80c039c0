"""The greedy removal of ExactOBS for a GPU: all rows of a layer at once, a few tensor operations a step.

The same algorithm as the loop for the CPU (_kernels.py, where the formulas are), with the thin factor U and the inverse
that all rows share; columns that are gone stay in place, as moving them would cost more than they do.
"""

import torch
from torch import Tensor

MEMORY = 1 << 30  # bytes of thin factors that are held at a time, on a CPU


def removals(
    w: Tensor, inverse: Tensor, steps: int, bucket: Tensor, quota: Tensor, memory: int | None = None
) -> tuple[Tensor, Tensor]:
    """(order (rows, steps) int32, losses (rows, steps)), on the device of the arguments.

    Args:
        w: (rows, cols). inverse: (cols, cols). bucket: (cols,) of each column. quota: (buckets,) removals in each.
        memory: bytes of thin factors that are held at a time, of a row at least; half of what a GPU has free.
    """
    if memory is None:
        memory = torch.cuda.mem_get_info(w.device)[0] // 2 if w.is_cuda else MEMORY
    rows, cols = w.shape
    order = torch.empty(rows, steps, dtype=torch.int32, device=w.device)
    losses = torch.empty(rows, steps, dtype=w.dtype, device=w.device)
    height = max(memory // max(steps * cols * w.element_size(), 1), 1)
    for first in range(0, rows, height):
        part = slice(first, first + height)
        value = w[part].clone()
        every = torch.arange(len(value), device=w.device)
        diag, left = inverse.diagonal().repeat(len(value), 1), quota.repeat(len(value), 1)
        closed = torch.where(left[:, bucket] > 0, 0.0, torch.inf).to(w.dtype)
        factor = torch.empty(len(value), steps, cols, dtype=w.dtype, device=w.device)
        for step in range(steps):
            score = value * value / diag + closed
            p = score.argmin(dim=1)
            order[part, step], losses[part, step] = p.int(), score[every, p] / 2
            before = factor[:, :step]
            row = inverse[p] - (before[every, :, p][:, None] @ before)[:, 0]
            inverse_root = row[every, p].rsqrt()
            row = row * inverse_root[:, None]
            factor[:, step] = row
            diag -= row * row
            value -= row * (value[every, p] * inverse_root)[:, None]
            left[every, bucket[p]] -= 1
            full = (left[every, bucket[p]] == 0)[:, None] & (bucket == bucket[p][:, None])
            closed[full] = torch.inf
            closed[every, p], value[every, p], diag[every, p] = torch.inf, 0, 1
    return order, losses
