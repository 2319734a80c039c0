"""Better masks by exchange: a removed weight comes back for a kept one that goes, while that lowers the loss.

Greedy removal never takes a step back, and ADMM stops near an optimum; neither mask is one that no exchange improves.
Every row's table is the Hessian H with the kept columns K swept (Goodnight, "A Tutorial on the SWEEP Operator", The
American Statistician 33, 1979; P the removed columns),

    T = [ -inv(H_KK)           inv(H_KK) H_KP               ]      x = [ v_K              ]
        [  H_PK inv(H_KK)      H_PP - H_PK inv(H_KK) H_KP   ]          [ (H (w - v))_P    ],

from which all is read off: to remove i costs x_i² / -T_ii, to bring back j gains x_j² / T_jj, and what i costs after j
came back needs T_ij alone. A pivot moves one column between K and P, cols² multiply-adds. The best pair of a row is
exchanged until none helps; then rows trade: the entry that gains most for the one that costs least elsewhere. The same
idea as local search in best-subset selection (1611.03267); the pairs are all looked at, not a sample.
"""

from typing import TypeGuard

import numpy as np
import torch
from numba import prange
from torch import Tensor

from featherweight.methods import patterns
from featherweight.methods._numba import compiled, parallel
from featherweight.methods.patterns import NM, Pattern, Unstructured
from featherweight.stats import LayerStats

PASSES = 4  # over the rows, at most, counting those that trade between them again
TINY = 1e-12  # of the energy of the output: what is no gain
SINGULAR = 1e-9  # of a unit diagonal: an entry that depends on the kept ones, up to rounding
TABLES = 1 << 28  # bytes of tables that are held at a time, of a row a thread at least


def possible(pattern: Pattern) -> TypeGuard[Unstructured | NM]:
    """Whether the pattern's pieces are single weights; others are left as they are."""
    return isinstance(pattern, Unstructured | NM)


def work(shape: tuple[int, int]) -> float:
    """Multiply-adds of matrix products that take as long: every row's table, once or a few times, and some pivots."""
    return 0.5 * shape[0] * shape[1] ** 3


def exchange(w: Tensor, hessian: Tensor, keep: Tensor, pattern: Unstructured | NM, stats: LayerStats) -> Tensor:
    """A mask of the same pattern with as many kept entries, whose best weights lose no more, up to rounding: where the
    Hessian is nearly singular, compare the losses.

    Args:
        w: (rows, cols) float64. hessian: (blocks, cols, cols), positive definite. keep: (rows, cols) bool.
    """
    rows, cols = w.shape
    norm = hessian.diagonal(dim1=1, dim2=2).sqrt()
    unit = hessian / norm[:, :, None] / norm[:, None, :]
    share = torch.ones(rows) if stats.row_share is None else stats.row_share
    scaled = w * norm.repeat_interleave(rows // len(unit), dim=0) * share.double().sqrt()[:, None]
    parts = scaled.reshape(len(unit), -1, cols)
    pulled = (parts @ unit).reshape(rows, cols)
    energy = (pulled * scaled).sum().clamp(min=1e-300)
    pulled = pulled / energy.sqrt()
    group = patterns.quota(pattern, cols, stats.taps)[0] if isinstance(pattern, NM) else torch.zeros(cols).long()
    keep, gain, cost = keep.clone(), np.zeros(rows), np.full(rows, np.inf)
    entry, leaves = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    height = max(TABLES // (8 * cols**2), torch.get_num_threads())
    todo, seen = torch.arange(rows), 0
    while len(todo) and seen + len(todo) <= PASSES * rows:
        seen += len(todo)
        for some in todo.split(height):
            tables, x = _swept(unit, pulled, keep, some)
            kept = keep[some].numpy()
            found = exchange_rows(tables, x, kept, group.numpy(), TINY)
            keep[some], at = torch.from_numpy(kept), some.numpy()
            gain[at], entry[at], cost[at], leaves[at] = found
        pairs = [] if isinstance(pattern, NM) else trades(gain, cost)
        for to, source in pairs:
            keep[to, entry[to]], keep[source, leaves[source]] = True, False
        todo = torch.tensor(sorted(r for pair in pairs for r in pair), dtype=torch.int64)
    return keep


def trades(gain: np.ndarray, cost: np.ndarray) -> list[tuple[int, int]]:
    """(row that gets an entry, row that gives one), every row once at most: the largest gain against the smallest
    cost, while that lowers the loss."""
    givers = np.argsort(cost, kind="stable")
    pairs: list[tuple[int, int]] = []
    taken: set[int] = set()
    first = 0  # of the givers that are left
    for to in np.argsort(-gain, kind="stable"):
        while first < len(givers) and givers[first] in taken:
            first += 1
        if first == len(givers) or gain[to] - cost[givers[first]] <= TINY:
            break
        source = next((s for s in givers[first:] if s != to and s not in taken), None)
        if to in taken or source is None or gain[to] - cost[source] <= TINY:
            continue  # the cheapest giver was this row itself
        pairs.append((int(to), int(source)))
        taken |= {to, source}
    return pairs


def _swept(unit: Tensor, pulled: Tensor, keep: Tensor, some: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(tables (rows, cols, cols), x (rows, cols)) of some rows, pulled their w H."""
    cols, each = unit.shape[1], len(keep) // len(unit)
    tables, x = torch.empty(len(some), cols, cols, dtype=torch.float64), torch.empty(len(some), cols).double()
    for n, r in enumerate(some.tolist()):
        order = keep[r].int().argsort(descending=True, stable=True)  # kept first
        back, count = order.argsort(), int(keep[r].sum())
        h, own, target = unit[r // each][order][:, order], torch.empty_like(unit[0]), pulled[r, order]
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(h[:count, :count]))
        across = inverse @ h[:count, count:]
        own[:count, :count], own[:count, count:], own[count:, :count] = -inverse, across, across.T
        own[count:, count:] = h[count:, count:] - h[count:, :count] @ across
        tables[n] = own[back][:, back]
        kept, gone = inverse @ target[:count], target[count:] - across.T @ target[:count]
        x[n] = torch.cat([kept, gone])[back]
    return tables.numpy(), x.numpy()


@compiled()
def _pivot(t, x, j, sign):  # pragma: no cover - compiled
    """Column j changes sides: it comes back (sign 1) or goes (sign -1)."""
    d, n = t[j, j], len(x)
    column, move = t[j].copy(), x[j] / d
    for a in range(n):
        if a != j:
            own, factor = t[a], column[a] / d
            for b in range(n):
                own[b] -= factor * column[b]
            x[a] -= column[a] * move
    for a in range(n):
        t[a, j] = t[j, a] = sign * column[a] / d
    t[j, j], x[j] = -1 / d, sign * move


@parallel()
def exchange_rows(tables, xs, keep, group, tiny):  # pragma: no cover - compiled
    """Exchange the best pair of every row, both of one group, until none gains more than `tiny`; tables, xs and keep
    are changed in place. Returns what the best entry to bring back would gain, which one, what the best one to remove
    would cost, and which, for every row."""
    rows, n = xs.shape
    gain, entry = np.zeros(rows), np.zeros(rows, np.int64)
    cost, leaves = np.full(rows, np.inf), np.zeros(rows, np.int64)
    for r in prange(rows):
        t, x, kept = tables[r], xs[r], keep[r]
        for _ in range(4 * n):  # rounding errors might go round in circles
            best, out, back = -tiny, -1, -1
            for j in range(n):
                d, own = t[j, j], t[j]
                if kept[j] or d <= SINGULAR or x[j] * x[j] / d <= -best:
                    continue
                g, q = x[j] * x[j] / d, x[j] / d
                for i in range(n):
                    if kept[i] and group[i] == group[j]:
                        y = x[i] - own[i] * q
                        change = y * y / (own[i] * own[i] / d - t[i, i]) - g
                        if change < best:
                            best, out, back = change, i, j
            if out < 0:
                break
            _pivot(t, x, back, 1.0)
            _pivot(t, x, out, -1.0)
            kept[back], kept[out] = True, False
        for i in range(n):
            value = x[i] * x[i] / abs(t[i, i])
            if kept[i]:
                if value < cost[r]:
                    cost[r], leaves[r] = value, i
            elif t[i, i] > SINGULAR and value > gain[r]:
                gain[r], entry[r] = value, i
    return gain, entry, cost, leaves
