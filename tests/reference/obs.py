"""Optimal Brain Compression on one row at a time, straight from the paper: every inverse is computed from scratch.

A row w (cols,) and a Hessian h (cols, cols), float64 numpy arrays. The loss of changing w to v is (v - w) h (v - w).
"""

from itertools import product

import numpy as np
from numpy import ndarray


def loss(w: ndarray, h: ndarray, v: ndarray) -> float:
    return float((v - w) @ h @ (v - w))


def prune_row(w: ndarray, h: ndarray, steps: int) -> tuple[list[int], list[float], ndarray]:
    """ExactOBS: (columns in the order of removal, half the loss that each step adds, weights at the end)."""
    w, active = w.copy(), list(range(len(w)))
    order, losses = [], []
    for _ in range(steps):
        inverse = np.linalg.inv(h[np.ix_(active, active)])
        scores = [w[p] ** 2 / inverse[i, i] for i, p in enumerate(active)]
        i = int(np.argmin(scores))
        order.append(active[i])
        losses.append(scores[i] / 2)
        w[active] -= w[active[i]] / inverse[i, i] * inverse[:, i]
        w[active[i]] = 0
        del active[i]
    return order, losses, w


def cheapest(losses: list[list[float]], count: int) -> list[int]:
    """How many steps each row takes when the cheapest next step over all rows is taken `count` times."""
    taken = [0] * len(losses)
    for _ in range(count):
        following = {r: losses[r][taken[r]] for r in range(len(losses)) if taken[r] < len(losses[r])}
        taken[min(following, key=following.__getitem__)] += 1
    return taken


def refit_row(w: ndarray, h: ndarray, keep: ndarray) -> ndarray:
    """The best weights that are zero outside `keep`: the derivative of the loss is zero on `keep`."""
    v = np.zeros_like(w)
    if keep.any():
        v[keep] = np.linalg.solve(h[np.ix_(keep, keep)], (h @ w)[keep])
    return v


def best_losses(w: ndarray, h: ndarray) -> list[float]:
    """Entry k: the smallest loss of any choice of k removals over all rows of w (rows, cols). Tries every mask."""
    rows, cols = w.shape
    masks = list(product((False, True), repeat=cols))
    table = [[(m.count(False), loss(row, h, refit_row(row, h, np.array(m)))) for m in masks] for row in w]
    best = [np.inf] * (rows * cols + 1)
    for choice in product(*table):
        removed, lost = sum(n for n, _ in choice), sum(e for _, e in choice)
        best[removed] = min(best[removed], lost)
    return best


def nearest(value: float, scale: float, zero: float, top: int) -> int:
    return int(min(max(np.rint(value / scale + zero), 0), top))


def quantize_row(w: ndarray, h: ndarray, scale: ndarray, zero: ndarray, top: int) -> ndarray:
    """OBQ: the codes of a row. A weight that lies more than half a step from its grid goes first, the furthest first;
    otherwise the one that costs least."""
    w, active = w.copy(), list(range(len(w)))
    codes = np.zeros(len(w), int)
    while active:
        inverse = np.linalg.inv(h[np.ix_(active, active)])
        code = [nearest(w[p], scale[p], zero[p], top) for p in active]
        residual = [w[p] - scale[p] * (c - zero[p]) for p, c in zip(active, code, strict=True)]
        outside = [i for i, p in enumerate(active) if abs(residual[i]) > scale[p] / 2 * (1 + 1e-6)]
        if outside:
            i = max(outside, key=lambda i: abs(residual[i]))
        else:
            i = min(range(len(active)), key=lambda i: residual[i] ** 2 / inverse[i, i])
        codes[active[i]] = code[i]
        w[active] -= residual[i] / inverse[i, i] * inverse[:, i]
        del active[i]
    return codes


def prune_groups(w: ndarray, h: ndarray, groups: list[list[int]], room: list[int] | None = None, steps: int = 0):
    """ExactOBS of whole groups of columns, (rows, cols) at once: the group with the smallest sum over rows of
    w_P inv(inv(H)_PP) w_P goes next, as far as `room` allows for single columns. Returns (numbers of the groups in the
    order of removal, half the loss of each step, weights)."""
    w, active = w.copy(), list(range(w.shape[1]))
    left = list(range(len(groups)))
    order, losses = [], []
    for _ in range(steps or len(groups)):
        inverse = np.zeros_like(h)
        inverse[np.ix_(active, active)] = np.linalg.inv(h[np.ix_(active, active)])
        score = {}
        for g in left:
            if room is None or room[g] > 0:
                own = groups[g]
                score[g] = float(np.trace(w[:, own] @ np.linalg.inv(inverse[np.ix_(own, own)]) @ w[:, own].T))
        g = min(score, key=score.__getitem__)
        own = groups[g]
        w[:, active] -= (w[:, own] @ np.linalg.inv(inverse[np.ix_(own, own)]) @ inverse[own])[:, active]
        active = [c for c in active if c not in own]
        w[:, own] = 0
        left.remove(g)
        order.append(g)
        losses.append(score[g] / 2)
    return order, losses, w


def prune_nm(w: ndarray, h: ndarray, buckets: list[list[int]], n: int) -> tuple[list[int], list[float]]:
    """ExactOBS of one row where at most n of each bucket stay: columns in the order of removal, half their losses."""
    w, active = w.copy(), list(range(len(w)))
    room = {c: (b, len(b) - n) for b in map(tuple, buckets) for c in b}
    taken = dict.fromkeys(map(tuple, buckets), 0)
    order, losses = [], []
    for _ in range(sum(max(len(b) - n, 0) for b in buckets)):
        inverse = np.linalg.inv(h[np.ix_(active, active)])
        score = {p: w[p] ** 2 / inverse[i, i] for i, p in enumerate(active) if taken[room[p][0]] < room[p][1]}
        p = min(score, key=score.__getitem__)
        i = active.index(p)
        w[active] -= w[p] / inverse[i, i] * inverse[:, i]
        w[p] = 0
        taken[room[p][0]] += 1
        active.remove(p)
        order.append(p)
        losses.append(score[p] / 2)
    return order, losses


def best_of_masks(w: ndarray, h: ndarray, masks: list[ndarray]) -> float:
    """The smallest loss of any of the masks (rows, cols), each with its best weights. Rows do not depend on each other,
    so each row's few supports are solved once."""
    known: dict[tuple[int, bytes], float] = {}

    def of(r: int, keep: ndarray) -> float:
        key = r, keep.tobytes()
        if key not in known:
            known[key] = loss(w[r], h, refit_row(w[r], h, keep))
        return known[key]

    return min(sum(of(r, keep) for r, keep in enumerate(mask)) for mask in masks)


def neighbours(w: ndarray, h: list[ndarray], keep: ndarray, group: list[int] | None) -> list[float]:
    """The losses of all masks that differ from `keep` (rows, cols) by one kept and one removed entry: of one row and
    group where groups are given, else anywhere. h: each row's Hessian."""
    rows, cols = keep.shape

    def row_loss(r: int, kept: ndarray) -> float:
        return loss(w[r], h[r], refit_row(w[r], h[r], kept))

    def flipped(r: int, *columns: int) -> ndarray:
        kept = keep[r].copy()
        kept[list(columns)] ^= True
        return kept

    now = [row_loss(r, keep[r]) for r in range(rows)]
    single = {(r, c): row_loss(r, flipped(r, c)) - now[r] for r in range(rows) for c in range(cols)}
    found = []
    for r, i in single:
        for s, j in single:
            if not keep[r, i] or keep[s, j] or (group is not None and (r != s or group[i] != group[j])):
                continue
            change = row_loss(r, flipped(r, i, j)) - now[r] if r == s else single[r, i] + single[s, j]
            found.append(sum(now) + change)
    return found
