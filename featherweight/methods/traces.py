"""The order in which Optimal Brain Compression removes the weights of every row, and what each removal costs.

A trace is all that pruning to any sparsity needs: the weights on a support are one exact solve (see pruning.py), which
is where the removals arrive anyway. Nothing else of the loop is kept: a layer of 512 x 4608 has 28 MB of trace, and
would have 43 GB of float32 weights along the way.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from featherweight.methods import batched
from featherweight.methods._kernels import compact, prune_block_steps, prune_steps, spread

Array: TypeAlias = np.ndarray

WIDE = 900  # columns from which every row gets an inverse of its own, brought up to date every CHUNK columns
CHUNK = 256
PANEL = 256  # columns of that update at a time: it is symmetric, so what lies above the diagonal can be left out
TILE = 1 << 25  # bytes of inverses and thin factors that are held at a time, or more: of a row a thread,
MOST = 1 << 32  # but no more than this, or of a single row
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
        w: (rows, cols), inverse: (cols, cols), of the damped Hessian, both on the CPU or on a GPU. steps: removals a
            row.
        bucket: (cols,) the bucket of each column, and quota: (buckets,) how many removals it takes, for N:M patterns.
    """
    rows, cols = w.shape
    bucket = torch.zeros(cols, dtype=torch.int64) if bucket is None else bucket
    quota = torch.tensor([steps]) if quota is None else quota
    if w.is_cuda:
        found = batched.removals(w, inverse, steps, bucket.to(w.device), quota.to(w.device))
        return Trace(found[0].cpu(), found[1].cpu().double())
    of, room = bucket.numpy().astype(np.int32), quota.numpy().astype(np.int32)
    order, losses = np.empty((rows, steps), np.int32), np.empty((rows, steps), w.numpy().dtype)
    left = np.repeat(room[None], rows, axis=0)
    closed = np.repeat(np.where(room[of] > 0, 0.0, np.inf).astype(losses.dtype)[None], rows, axis=0)
    keys = integers(w.numpy())
    for part, state, base, done, now in stages(w.numpy(), inverse.numpy(), steps):
        prune_steps(base, *state.rows, keys[part], closed[part], left[part], of, done, now, order[part], losses[part])
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
    blocks = np.repeat(own[None], rows, axis=0)
    for part, state, base, done, now in stages(w.numpy(), inverse.numpy(), steps, size):
        prune_block_steps(base, *state.rows, blocks[part], done, now, order[part], losses[part])
    return Trace(torch.from_numpy(order), torch.from_numpy(losses).double())


def integers(values: Array) -> Array:
    """Scratch of the kernels: integers as wide as the values."""
    return np.empty(values.shape, np.int32 if values.itemsize == 4 else np.int64)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Active:
    """Where the loops of some rows stand, active columns in front (see prune_steps)."""

    where: Array
    index: Array
    value: Array
    diag: Array
    factor: Array

    @property
    def rows(self) -> tuple[Array, ...]:
        """As the kernels take them."""
        return self.where, self.factor, self.index, self.value, self.diag

    def update(self, base: Array, steps: int, active: int) -> None:
        """Take the factor's `steps` off the inverse of every row, which holds the active columns in front already."""
        for r in range(len(self.value)):
            own, factor = torch.from_numpy(base[r]), torch.from_numpy(self.factor[r, :active, :steps])
            for first in range(0, active, PANEL):
                last = min(first + PANEL, active)
                own[first:active, first:last].addmm_(factor[first:], factor[first:last].T, alpha=-1)


def stages(w: Array, inverse: Array, steps: int, size: int = 1) -> Iterator[tuple[slice, Active, Array, int, int]]:
    """The calls of a kernel that make `steps` removals of `size` columns in all rows: which rows, their state, the
    inverse (rows or 1, cols, cols), removals before, and removals now.

    Of a wide layer as many rows at a time as TILE allows, each with an inverse that is brought up to date every CHUNK
    columns; else all rows at once.
    """
    rows, cols = w.shape
    inverse = np.ascontiguousarray(inverse)
    threads, wide = torch.get_num_threads(), cols >= WIDE and steps * size > CHUNK
    length = max(CHUNK // size, 1) if wide else max(steps, 1)
    each = w.itemsize * cols * (length * size + cols)
    height = min(max(TILE // each // threads, 1) * threads, max(MOST // each, 1), rows) if wide else rows
    factor = np.empty((height if wide else min(threads, rows), cols, length * size), w.dtype)
    owned = np.empty((height, cols, cols) if wide else 0, w.dtype)
    for first in range(0, rows, height):
        part = slice(first, min(first + height, rows))
        count = part.stop - part.start
        columns = np.repeat(np.arange(cols, dtype=np.int32)[None], count, axis=0)
        diag = np.repeat(inverse.diagonal()[None], count, axis=0)
        state, base = Active(columns, columns.copy(), w[part].copy(), diag, factor[:count]), inverse[None]
        for done in range(0, steps, length):
            if done:
                active = cols - done * size
                compact(owned, state.where, active) if done > length else spread(inverse, owned, state.where, active)
                base = owned[:count]
                state.update(base, length * size, active)
            yield part, state, base, done, min(length, steps - done)


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
