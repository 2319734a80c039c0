"""Optimal Brain Compression as its public scripts do it, in our own words: the baseline of bench/obs.py.

One full inverse Hessian for every row, 32 rows at a time, and a rank-one update of each at every step: what a reader of
the paper (2208.11580, algorithm 1 and section 5) writes first in torch. float32, like the scripts.
"""

import torch
from torch import Tensor

BATCH = 32  # rows whose inverses are held at a time


def prune_trace(w: Tensor, inverse: Tensor, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    """ExactOBS to the end: order (rows, cols) int64 and losses (rows, cols), half of score each. The script keeps every
    intermediate weight as well; this does not."""
    orders, losses = [], []
    for part in w.split(batch):
        part = part.clone()
        rows, cols = part.shape
        every = torch.arange(rows)
        own = inverse.repeat(rows, 1, 1)
        gone = torch.zeros(rows, cols, dtype=torch.bool)
        order, loss = torch.empty(rows, cols, dtype=torch.int64), torch.empty(rows, cols)
        for step in range(cols):
            diag = own.diagonal(dim1=1, dim2=2)
            score = torch.where(gone, torch.inf, part**2 / diag)
            lowest, p = score.min(dim=1)
            order[:, step], loss[:, step] = p, lowest / 2
            row, pivot = own[every, p], diag[every, p]
            part -= row * (part[every, p] / pivot)[:, None]
            gone[every, p] = True
            part[gone] = 0
            row = row / pivot.sqrt()[:, None]
            own -= row[:, :, None] * row[:, None, :]
        orders.append(order)
        losses.append(loss)
    return torch.cat(orders), torch.cat(losses)


def quantize(w: Tensor, inverse: Tensor, scale: Tensor, zero: Tensor, top: int, batch: int = BATCH) -> Tensor:
    """OBQ with the outlier rule: the rounded weights. scale, zero: (rows, 1)."""
    found = []
    for first in range(0, len(w), batch):
        part, s, z = (t[first : first + batch].clone() for t in (w, scale, zero))
        rows, cols = part.shape
        every = torch.arange(rows)
        own = inverse.repeat(rows, 1, 1)
        done = torch.zeros(rows, cols, dtype=torch.bool)
        out = torch.zeros_like(part)
        for _ in range(cols):
            rounded = s * (torch.clamp(torch.round(part / s + z), 0, top) - z)
            error = torch.where(done, 0, (part - rounded).abs())
            diag = own.diagonal(dim1=1, dim2=2)
            p = torch.where(done, torch.inf, error**2 / diag).argmin(dim=1)
            worst, outlier = error.max(dim=1)
            p = torch.where(worst > s[:, 0] * 0.5001, outlier, p)
            row, pivot = own[every, p], diag[every, p]
            out[every, p] = rounded[every, p]
            part -= row * ((part[every, p] - rounded[every, p]) / pivot)[:, None]
            done[every, p] = True
            row = row / pivot.sqrt()[:, None]
            own -= row[:, :, None] * row[:, None, :]
        found.append(out)
    return torch.cat(found)
