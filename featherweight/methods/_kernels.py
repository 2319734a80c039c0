"""The inner loops of the solvers, compiled by numba for the CPU.

Rows (or groups) run in parallel; the result of one depends neither on the others nor on the number of threads.

The greedy loops of Optimal Brain Compression remove one column of the active set M at a time and need, for the removed
column p, row p of the inverse of the Hessian restricted to M. The paper keeps that inverse and subtracts a rank-one
matrix from it at each step, which moves cols² numbers. Here the inverse of the full Hessian is shared by all rows and
never written; a row's corrections are kept as a thin factor U (steps, active columns), so that row p is

    inv(H_M)[p, :] = inv(H)[p, :] - U[:, p]ᵀ U[:, :]

The active columns are kept compact: the removed one swaps places with the last. The work of a full trace is cols³ / 6
multiply-adds a row. The factor lies in memory column by column, so that a step reads it in long runs, as dot products;
its last RECENT rows lie row by row beside it, and are moved over together, so that it is also written in runs. On wide
layers it outgrows the cache; there every row gets a base of its own, from which the factor is subtracted as one matrix
product whenever it has grown to some hundred steps (see traces.py).
"""

import numpy as np
from numba import prange

from featherweight.methods._numba import compiled, parallel

RECENT = 32  # rows of the factor that are kept row by row


@compiled()
def _inverse_row(base, whole, where, factor, recent, step, active, p, row):  # pragma: no cover - compiled
    """Put row p of inv(H_M) into row[:active], after `step` removals.

    base: the inverse before the first of them; where: each active column's place in it. whole: whether base is filled
    on both sides of its diagonal or only below it. factor: (cols, steps), recent: (RECENT, cols), see _drop.
    """
    own = where[p]
    source = base[own]
    if whole:
        for i in range(active):
            row[i] = source[where[i]]
    else:
        for i in range(active):
            row[i] = source[where[i]] if where[i] <= own else base[where[i], own]
    old = step - step % RECENT
    if old > 0:
        c = factor[p]
        i = 0
        while i + 8 <= active:  # eight columns at a time share what is read of column p
            f0, f1, f2, f3 = factor[i], factor[i + 1], factor[i + 2], factor[i + 3]
            f4, f5, f6, f7 = factor[i + 4], factor[i + 5], factor[i + 6], factor[i + 7]
            s0, s1, s2, s3 = row[i], row[i + 1], row[i + 2], row[i + 3]
            s4, s5, s6, s7 = row[i + 4], row[i + 5], row[i + 6], row[i + 7]
            for s in range(old):
                x = c[s]
                s0 -= x * f0[s]
                s1 -= x * f1[s]
                s2 -= x * f2[s]
                s3 -= x * f3[s]
                s4 -= x * f4[s]
                s5 -= x * f5[s]
                s6 -= x * f6[s]
                s7 -= x * f7[s]
            row[i], row[i + 1], row[i + 2], row[i + 3] = s0, s1, s2, s3
            row[i + 4], row[i + 5], row[i + 6], row[i + 7] = s4, s5, s6, s7
            i += 8
        while i < active:
            f0, s0 = factor[i], row[i]
            for s in range(old):
                s0 -= c[s] * f0[s]
            row[i] = s0
            i += 1
    s = 0
    while s + 4 <= step - old:
        a, b, c, d = recent[s, p], recent[s + 1, p], recent[s + 2, p], recent[s + 3, p]
        f0, f1, f2, f3 = recent[s], recent[s + 1], recent[s + 2], recent[s + 3]
        for i in range(active):
            row[i] -= a * f0[i] + b * f1[i] + c * f2[i] + d * f3[i]
        s += 4
    while s < step - old:
        a, f0 = recent[s, p], recent[s]
        for i in range(active):
            row[i] -= a * f0[i]
        s += 1


@compiled()
def _drop(factor, recent, step, active, p):  # pragma: no cover - compiled
    """Column p leaves, the last active one takes its place. recent[step % RECENT] holds the factor's row `step` by now:
    row p of the inverse by the root of its diagonal entry."""
    last, now = active - 1, step % RECENT
    if p != last:
        own, other = factor[p], factor[last]
        for s in range(step - now):
            own[s] = other[s]
        for s in range(now + 1):
            recent[s, p] = recent[s, last]
    if now == RECENT - 1:
        _settle(factor, recent, step - now, RECENT, last)


@compiled()
def _settle(factor, recent, first, count, active):  # pragma: no cover - compiled
    """Move `count` recent rows to the columns of the factor, from row `first` on."""
    for i in range(active):
        own = factor[i]
        for s in range(count):
            own[first + s] = recent[s, i]


@parallel()
def prune_steps(base, where, factor, index, value, diag, keys, closed, quota, bucket, first, steps, order, losses):
    """`steps` removals of ExactOBS in every row, single columns: always the one that costs least, w² / (2 diag), in a
    bucket that may still lose some.

    base: (1, n, n), the inverse, in the first call; later (rows, n, n), filled on and below the diagonal. The state of
    every row, its active columns in front, is changed in place: where, index, value, diag, closed (rows, cols), the
    last 0, or inf in a full bucket. factor: (workers, cols, steps), of this call: one for each row where it is needed
    afterwards; else a worker uses one for all its rows, and it stays in the cache. keys: (rows, cols), scratch,
    integers as wide as a value: those of floats above zero are in the same order, and the smallest is found without a
    branch. quota: (rows, buckets) int32, how many removals each bucket still takes; bucket: (cols,) of each column.
    first: removals before this call. order, losses: (rows, total), filled from `first` on.
    """
    rows, cols = value.shape  # pragma: no cover - compiled
    for worker in prange(len(factor)):
        for r in range(worker, rows, len(factor)):
            own = base[0] if first == 0 else base[r]
            row = np.empty(cols, value.dtype)
            recent = np.empty((RECENT, cols), value.dtype)
            v, d, shut, key = value[r], diag[r], closed[r], keys[r]
            score = key.view(value.dtype)
            active = cols - first
            for i in range(active):
                score[i] = v[i] * v[i] / d[i] + shut[i]
            for step in range(steps):
                least = key[0]
                for i in range(1, active):
                    least = min(least, key[i])
                p = cols
                for i in range(active):  # the first of the smallest; vectorised, as a loop that breaks would not be
                    p = min(p, i if key[i] == least else cols)
                order[r, first + step] = index[r, p]
                losses[r, first + step] = score[p] / 2
                full = bucket[index[r, p]]
                quota[r, full] -= 1
                if quota[r, full] == 0:
                    for i in range(active):
                        if bucket[index[r, i]] == full:
                            shut[i] = np.inf
                _inverse_row(own, first == 0, where[r], factor[worker], recent, step, active, p, row)
                inverse = 1 / np.sqrt(row[p])  # float64: rounded, it would scale the whole row of the factor
                move = v[p] * inverse
                new = recent[step % RECENT]
                for i in range(active):
                    x = row[i] * inverse
                    new[i] = x
                    d[i] -= x * x
                    v[i] -= x * move
                    score[i] = v[i] * v[i] / d[i] + shut[i]
                _drop(factor[worker], recent, step, active, p)
                active -= 1
                where[r, p], index[r, p] = where[r, active], index[r, active]
                v[p], d[p], shut[p], score[p] = v[active], d[active], shut[active], score[active]
            _settle(factor[worker], recent, steps - steps % RECENT, steps % RECENT, active)


@compiled()
def _block_score(value, block, size):  # pragma: no cover - compiled
    """w inv(D) wᵀ for a block of weights and its block D of the inverse Hessian, by the Cholesky factor of D."""
    factor = np.empty((size, size), value.dtype)
    solved = np.empty(size, value.dtype)
    score = 0.0
    for i in range(size):
        for j in range(i + 1):
            total = block[i, j]
            for k in range(j):
                total -= factor[i, k] * factor[j, k]
            factor[i, j] = np.sqrt(total) if i == j else total / factor[j, j]
        total = value[i]
        for k in range(i):
            total -= factor[i, k] * solved[k]
        solved[i] = total / factor[i, i]
        score += solved[i] * solved[i]
    return score


@parallel()
def prune_block_steps(base, where, factor, index, value, diag, blocks, first, steps, order, losses):
    """Like prune_steps for blocks of `size` columns that lie side by side, removed whole, score w_P inv(D_PP) w_Pᵀ.

    blocks: (rows, count, size, size), each active block's own part of the inverse, changed in place. order holds the
    number of the block, index[., start] // size. A block is removed as `size` single columns, which comes to the same.
    """
    rows, cols = value.shape  # pragma: no cover - compiled
    size = blocks.shape[2]
    for worker in prange(len(factor)):
        for r in range(worker, rows, len(factor)):
            own = base[0] if first == 0 else base[r]
            row = np.empty(cols, value.dtype)
            recent = np.empty((RECENT, cols), value.dtype)
            count = cols // size - first
            scores = np.empty(count, value.dtype)
            for b in range(count):
                scores[b] = _block_score(value[r, b * size : (b + 1) * size], blocks[r, b], size)
            for step in range(steps):
                chosen, best = 0, np.inf
                for b in range(count):
                    if scores[b] < best:
                        chosen, best = b, scores[b]
                order[r, first + step] = index[r, chosen * size] // size
                losses[r, first + step] = max(best, 0.0) / 2
                last = count - 1
                if chosen != last:  # bring the block to the end
                    now = step * size % RECENT
                    for k in range(size):
                        a, b = chosen * size + k, last * size + k
                        where[r, a], where[r, b] = where[r, b], where[r, a]
                        index[r, a], index[r, b] = index[r, b], index[r, a]
                        value[r, a], value[r, b] = value[r, b], value[r, a]
                        diag[r, a], diag[r, b] = diag[r, b], diag[r, a]
                        for s in range(step * size - now):
                            factor[worker, a, s], factor[worker, b, s] = factor[worker, b, s], factor[worker, a, s]
                        for s in range(now):
                            recent[s, a], recent[s, b] = recent[s, b], recent[s, a]
                    blocks[r, chosen] = blocks[r, last]
                for k in range(size):
                    active, now = count * size - k, step * size + k
                    p = active - 1
                    _inverse_row(own, first == 0, where[r], factor[worker], recent, now, active, p, row)
                    inverse = 1 / np.sqrt(row[p])  # float64: rounded, it would scale the whole row of the factor
                    move = value[r, p] * inverse
                    new = recent[now % RECENT]
                    for i in range(active):
                        row[i] *= inverse
                        new[i] = row[i]
                        diag[r, i] -= row[i] * row[i]
                        value[r, i] -= row[i] * move
                    _drop(factor[worker], recent, now, active, p)
                    for b in range(last):
                        for i in range(size):
                            for j in range(size):
                                blocks[r, b, i, j] -= row[b * size + i] * row[b * size + j]
                count -= 1
                for b in range(count):
                    scores[b] = _block_score(value[r, b * size : (b + 1) * size], blocks[r, b], size)
            done = steps * size
            _settle(factor[worker], recent, done - done % RECENT, done % RECENT, count * size)


@parallel()
def spread(inverse, base, where, active):
    """The active columns' entries of the inverse, on and below the diagonal, to the first `active` places of every
    row's own base, in the order of `where`, (rows, cols), which then counts up."""
    for r in prange(len(where)):  # pragma: no cover - compiled
        own, place = base[r], where[r]
        for p in range(active):
            source, target = inverse[place[p]], own[p]
            for i in range(p + 1):
                target[i] = source[place[i]]
        for p in range(active):
            place[p] = p


@parallel()
def compact(base, where, active):
    """Bring the active columns' entries of every row's base to its first `active` places, likewise. Columns beyond
    `active` never replace each other: a place in front holds its own column, or one from behind that took the place of
    a removed one."""
    for r in prange(len(where)):  # pragma: no cover - compiled
        own, place = base[r], where[r]
        for p in range(active):
            q = place[p]
            if q == p:
                continue
            for i in range(active):
                j = place[i]
                taken = own[q, j] if j <= q else own[j, q]
                if i <= p:
                    own[p, i] = taken
                else:
                    own[i, p] = taken
        for p in range(active):
            place[p] = p


@compiled()
def _quantize_row(
    base, whole, where, factor, index, value, diag, scale, zero, near, far, top, first, steps, codes
):  # pragma: no cover - compiled
    """`steps` roundings of OBQ with the outlier rule in one row. near, far: (cols,), scratch, integers as wide as a
    value (see prune_steps). The rest as in quantize_steps."""
    cols = len(value)
    score, outside = near.view(value.dtype), far.view(value.dtype)
    recent = np.empty((RECENT, cols), value.dtype)
    row = np.empty(cols, value.dtype)
    none = top - top  # a literal would make float64 of float32
    edge = np.full(1, 0.5001, value.dtype)[0]  # rounding noise is no outlier
    active = cols - first
    for step in range(steps):
        for i in range(active):
            code = min(max(np.rint(value[i] / scale[i] + zero[i]), none), top)
            error = abs(value[i] - scale[i] * (code - zero[i]))
            score[i] = error * error / diag[i]
            outside[i] = error if error > edge * scale[i] else none
        least, furthest = near[0], far[0]
        for i in range(1, active):
            least = min(least, near[i])
            furthest = max(furthest, far[i])
        p = cols
        if furthest > 0:
            for i in range(active):
                p = min(p, i if far[i] == furthest else cols)
        else:
            for i in range(active):
                p = min(p, i if near[i] == least else cols)
        code = min(max(np.rint(value[p] / scale[p] + zero[p]), none), top)
        codes[index[p]] = np.uint8(code)
        residual = value[p] - scale[p] * (code - zero[p])
        _inverse_row(base, whole, where, factor, recent, step, active, p, row)
        inverse = 1 / np.sqrt(row[p])  # float64: rounded, it would scale the whole row of the factor
        move = residual * inverse
        new = recent[step % RECENT]
        for i in range(active):
            x = row[i] * inverse
            new[i] = x
            diag[i] -= x * x
            value[i] -= x * move
        _drop(factor, recent, step, active, p)
        active -= 1
        where[p], index[p], value[p], diag[p] = where[active], index[active], value[active], diag[active]
        scale[p], zero[p] = scale[active], zero[active]
    _settle(factor, recent, steps - steps % RECENT, steps % RECENT, active)


@parallel()
def quantize_steps(
    base, where, factor, index, value, diag, scale, zero, near, far, top, first, steps, codes
):  # pragma: no cover - compiled
    """`steps` roundings of OBQ with the outlier rule in every row: the weight furthest outside its grid, or else the
    one whose rounding costs least.

    base, where, factor, index, value, diag, first: see prune_steps. scale, zero: (rows, cols), in the order of the
    active columns. top: largest code, of the type of the values. codes: (rows, cols) uint8, filled.
    """
    for worker in prange(len(factor)):
        for r in range(worker, len(value), len(factor)):
            own = base[0] if first == 0 else base[r]
            state = where[r], factor[worker], index[r], value[r], diag[r], scale[r], zero[r], near[r], far[r]
            _quantize_row(own, first == 0, *state, top, first, steps, codes[r])


@compiled()
def _kept_cholesky(hessian, kept):  # pragma: no cover - compiled
    """Lower Cholesky factor of H restricted to the columns `kept`."""
    n = len(kept)
    factor = np.zeros((n, n), hessian.dtype)
    for i in range(n):
        source = hessian[kept[i]]
        own = factor[i]
        for j in range(i + 1):
            other = factor[j]
            total = source[kept[j]]
            for k in range(j):
                total -= own[k] * other[k]
            own[j] = np.sqrt(total) if i == j else total / other[j]
    return factor


@compiled()
def _inverse(factor):  # pragma: no cover - compiled
    """inv(L Lᵀ) = inv(L)ᵀ inv(L) from the lower factor L."""
    n = len(factor)
    low = np.zeros_like(factor)  # inv(L), row by row: L[i, :i] inv(L)[:i] + L[i, i] inv(L)[i] = e_i
    for i in range(n):
        own = low[i]
        for k in range(i):
            a, other = factor[i, k], low[k]
            for j in range(k + 1):
                own[j] -= a * other[j]
        for j in range(i):
            own[j] /= factor[i, i]
        own[i] = 1.0 / factor[i, i]
    out = np.zeros_like(factor)
    for k in range(n):
        own = low[k]
        for i in range(k + 1):
            a, target = own[i], out[i]
            for j in range(i + 1):
                target[j] += a * own[j]
    for i in range(n):
        for j in range(i):
            out[j, i] = out[i, j]
    return out


@parallel()
def quantize_kept_rows(w, hessian, scale, zero, keep, top):  # pragma: no cover - compiled
    """OBQ with the outlier rule, every row on its own support: only entries where `keep` (rows, cols) is true get codes
    and absorb errors, with the inverse of the Hessian restricted to them. float64."""
    rows, cols = w.shape
    codes = np.zeros((rows, cols), np.uint8)
    for r in prange(rows):
        kept = np.nonzero(keep[r])[0]
        n = len(kept)
        if n:
            hinv = _inverse(_kept_cholesky(hessian, kept))
            own, where, index = np.zeros(n, np.uint8), np.arange(n, dtype=np.int32), np.arange(n, dtype=np.int32)
            diag, near, far = np.diag(hinv).copy(), np.empty(n, np.int64), np.empty(n, np.int64)
            state = where, np.empty((n, n), w.dtype), index, w[r][kept], diag, scale[r][kept], zero[r][kept], near, far
            _quantize_row(hinv, True, *state, top, 0, n, own)
            for i in range(n):
                codes[r, kept[i]] = own[i]
    return codes


@parallel()
def refit_rows(w, hessian, keep):  # pragma: no cover - compiled
    """Least-squares optimal weights on a given support: argmin over v of (v - w) H (v - w)ᵀ, v zero where `keep` is
    false, row by row: v_K = w_K + inv(H_KK) H_KP w_P with P the removed entries.

    w: (rows, cols). hessian: (cols, cols), positive definite. keep: (rows, cols) bool.
    """
    rows, cols = w.shape
    out = np.zeros_like(w)
    for r in prange(rows):
        kept = np.nonzero(keep[r])[0]
        n = len(kept)
        change = np.zeros(n, w.dtype)
        if 0 < n < cols:
            factor = _kept_cholesky(hessian, kept)
            for i in range(n):
                source = hessian[kept[i]]
                total = 0.0
                for p in range(cols):
                    if not keep[r, p]:
                        total += source[p] * w[r, p]
                for k in range(i):
                    total -= factor[i, k] * change[k]
                change[i] = total / factor[i, i]
            for i in range(n - 1, -1, -1):
                change[i] /= factor[i, i]
                for k in range(i):
                    change[k] -= factor[i, k] * change[i]
        for i in range(n):
            out[r, kept[i]] = w[r, kept[i]] + change[i]
    return out
