"""The order in which Optimal Brain Compression removes the weights of every row, and what each removal costs.

A trace is all that pruning to any sparsity needs: the weights on a support are one exact solve (see pruning.py), which
is where the removals arrive anyway. Nothing else of the loop is kept: a layer of 512 x 4608 has 28 MB of trace, and
would have 43 GB of float32 weights along the way.
"""

from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from featherweight.methods._kernels import compact, prune_block_steps, prune_steps

Array: TypeAlias = np.ndarray

WIDE = 900  # columns from which every row gets an inverse of its own, brought up to date every CHUNK columns
CHUNK = 256
PANEL = 256  # columns of that update at a time: it is symmetric, so what lies above the diagonal can be left out
TILE = 1 << 25  # bytes of thin factors that are held at a time
SAFE = 1e-7  # relative damping a column from which float32 is enough: it bounds the entries of the inverse


def precision(damp: float, cols: int) -> torch.dtype:
    """In which type a greedy loop may choose: what it chooses is solved again in float64, so a near tie may fall either
    way, but no sum may lose all its digits."""
    return torch.float32 if damp >= SAFE * cols else torch.float64


@final
@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """order: (rows, steps) int32, the columns, or the numbers of the blocks, in the order of their removal. losses:
    (rows, steps) float64, half of what each removal adds to (v - w) H (v - w)ᵀ."""

    order: Tensor
    losses: Tensor


def trace(w: Tensor, inverse: Tensor, steps: int, bucket: Tensor | None = None, quota: Tensor | None = None) -> Trace:
    """ExactOBS (2208.11580, algorithm 1) on all rows, single weights, in the precision of the arguments.

    Args:
        w: (rows, cols). inverse: (cols, cols), of the damped Hessian. steps: removals a row.
        bucket: (cols,) the bucket of each column, and quota: (buckets,) how many removals it takes, for N:M patterns.
    """
    rows, cols = w.shape
    of = np.zeros(cols, np.int32) if bucket is None else bucket.numpy().astype(np.int32)
    room = np.full(1, steps, np.int32) if quota is None else quota.numpy().astype(np.int32)
    order, losses = np.empty((rows, steps), np.int32), np.empty((rows, steps), w.numpy().dtype)
    for part, state, base in _tiles(w.numpy(), inverse.numpy(), steps):
        left = np.repeat(room[None], len(state.value), axis=0)
        closed = np.where(room[of] > 0, 0.0, np.inf).astype(state.value.dtype)
        closed = np.repeat(closed[None], len(state.value), axis=0)
        keys = np.empty(state.value.shape, np.int32 if state.value.itemsize == 4 else np.int64)
        done = 0
        while done < steps:
            now = min(state.length, steps - done)
            moments = state.where, state.factor, state.index, state.value, state.diag
            prune_steps(base, *moments, keys, closed, left, of, done, now, order[part], losses[part])
            done += now
            base = state.updated(base, now, cols - done) if done < steps else base
    return Trace(torch.from_numpy(order), torch.from_numpy(losses).double())


def block_trace(w: Tensor, inverse: Tensor, size: int, steps: int) -> Trace:
    """Like `trace` for blocks of `size` columns side by side, removed whole. cols must be a multiple of size; steps
    counts blocks."""
    rows, cols = w.shape
    if size == 1:
        return trace(w, inverse, steps)
    order, losses = np.empty((rows, steps), np.int32), np.empty((rows, steps), w.numpy().dtype)
    count = cols // size
    own = inverse.reshape(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).numpy()
    for part, state, base in _tiles(w.numpy(), inverse.numpy(), steps * size, size):
        blocks = np.repeat(own[None], len(state.value), axis=0)
        done = 0
        while done < steps:
            now = min(state.length // size, steps - done)
            moments = state.where, state.factor, state.index, state.value, state.diag
            prune_block_steps(base, *moments, blocks, done, now, order[part], losses[part])
            done += now
            base = state.updated(base, now * size, cols - done * size) if done < steps else base
    return Trace(torch.from_numpy(order), torch.from_numpy(losses).double())


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Where the loops of some rows stand, active columns in front (see prune_steps). length: steps that the factor
    holds."""

    where: Array
    index: Array
    value: Array
    diag: Array
    factor: Array
    length: int

    def updated(self, base: Array, steps: int, active: int) -> Array:
        """The inverse of every row, (rows, cols, cols) below the diagonal, with the factor's `steps` taken off."""
        if len(base) == 1:
            base = np.repeat(base, len(self.value), axis=0)
        compact(base, self.where, active)
        for r in range(len(base)):
            own, factor = torch.from_numpy(base[r]), torch.from_numpy(self.factor[r, :active, :steps])
            for first in range(0, active, PANEL):
                last = min(first + PANEL, active)
                own[first:active, first:last].addmm_(factor[first:], factor[first:last].T, alpha=-1)
        return base


def _tiles(w: Array, inverse: Array, steps: int, size: int = 1):
    """(rows, their state, the inverse (1, cols, cols)): of a wide layer as many rows at a time as TILE allows, else
    all."""
    rows, cols = w.shape
    inverse = np.ascontiguousarray(inverse)
    threads, wide = torch.get_num_threads(), cols >= WIDE and steps > CHUNK
    length = max(CHUNK // size, 1) * size if wide else steps
    height = min(max(TILE // (4 * cols * (length + cols)), threads), rows) if wide else rows
    factor = np.empty((height if wide else min(threads, rows), cols, length), w.dtype)
    for first in range(0, rows, height):
        part = slice(first, min(first + height, rows))
        count = part.stop - part.start
        columns = np.repeat(np.arange(cols, dtype=np.int32)[None], count, axis=0)
        diag = np.repeat(inverse.diagonal()[None], count, axis=0)
        yield part, _Rows(columns, columns.copy(), w[part].copy(), diag, factor[:count], length), inverse[None]


def channel_trace(w: Tensor, inverse: Tensor, taps: int) -> Trace:
    """The same for whole input channels, `taps` columns side by side, removed from all rows at once: one row of trace,
    score sum over rows of w_P inv(D_PP) w_Pᵀ. Written with explicit inverses: there is one for all rows."""
    rows, cols = w.shape
    channels = cols // taps
    w, inverse = w.double().clone(), inverse.double().clone()
    alive = torch.ones(channels, dtype=torch.bool)
    eye = torch.eye(taps, dtype=torch.float64)
    order, losses = torch.empty(1, channels, dtype=torch.int32), torch.empty(1, channels, dtype=torch.float64)
    for step in range(channels):
        own = inverse.reshape(channels, taps, channels, taps).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        solved = torch.linalg.inv(torch.where(alive[:, None, None], own, eye))
        parts = w.reshape(rows, channels, taps).transpose(0, 1)
        score = ((parts @ solved) * parts).sum(dim=(1, 2))
        p = int(torch.where(alive, score, torch.inf).argmin())
        order[0, step], losses[0, step] = p, score[p] / 2
        alive[p] = False
        columns = slice(p * taps, (p + 1) * taps)
        pulled = solved[p] @ inverse[columns]
        w -= w[:, columns] @ pulled
        inverse -= inverse[:, columns] @ pulled
        w[:, columns], inverse[columns], inverse[:, columns] = 0, 0, 0
    return Trace(order, losses)
