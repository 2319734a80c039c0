"""The inner loops of additive quantization, compiled by numba for the CPU. A row of a matrix is cut into vectors of d
entries; each is stored as the sum of one word of every book, times the row's scale. Rows run in parallel; the result of
one depends neither on the others nor on the number of threads.

Words of all books lie side by side in `words` (d, words); book m has those from starts[m] to starts[m + 1]. `norms`
(…, words) holds cᵀ A c of every word c, for the metric A of a vector.
"""

import numpy as np
from numba import prange

from featherweight.methods._numba import compiled, parallel

TIE = 1e-12  # a word takes another's place only if it is better by this share of the vector's energy


@compiled()
def _expand(linear, norms, words, first, last, values):  # pragma: no cover - compiled
    """values[c] = linear . c + norms[c] for the words of one book."""
    for c in range(first, last):
        values[c - first] = norms[c]
    for i in range(words.shape[0]):
        factor = linear[i]
        for c in range(first, last):
            values[c - first] += factor * words[i, c]


@compiled()
def _insert(costs, count, cost):  # pragma: no cover - compiled
    """The place of a new cost, lower than the last where the list is full, in the rising list of the `count` best;
    those behind it move (costs only)."""
    place = min(count, len(costs) - 1)
    while place > 0 and costs[place - 1] > cost:
        costs[place] = costs[place - 1]
        place -= 1
    costs[place] = cost
    return place


@compiled()
def _choose(metric, norms, pull, scale, words, starts, base, parent, found):  # pragma: no cover - compiled
    """Add to the list `found` = (costs, parents, codes, sums, count) the sums x of a word of every book with small
    base + s² xᵀ A x - 2 s x . pull: the best of each stage are expanded by the words of the next book."""
    costs, parents, codes, sums, count = found
    width, d = sums.shape
    books = len(starts) - 1
    part_cost, part_code, part_sum = np.empty(width), np.zeros((width, books), np.int32), np.zeros((width, d))
    next_cost, next_code, next_sum = np.empty(width), np.zeros((width, books), np.int32), np.zeros((width, d))
    part_cost[0], parts = base, 1
    linear = np.empty(d)
    largest = 0
    for m in range(books):
        largest = max(largest, starts[m + 1] - starts[m])
    values = np.empty(largest)
    for m in range(books):
        first, last = starts[m], starts[m + 1]
        final = m == books - 1
        following = 0
        for p in range(parts):
            for i in range(d):
                linear[i] = -2.0 * scale * pull[i]
                for j in range(d):
                    linear[i] += 2.0 * scale * scale * metric[i, j] * part_sum[p, j]
            for i in range(d):
                linear[i] /= scale * scale
            _expand(linear, norms, words, first, last, values)
            for c in range(last - first):
                cost = part_cost[p] + scale * scale * values[c]
                if final:
                    if count[0] == width and cost >= costs[width - 1]:
                        continue
                    place = _insert(costs, count[0], cost)
                    for q in range(min(count[0], width - 1), place, -1):
                        parents[q] = parents[q - 1]
                        codes[q] = codes[q - 1]
                        sums[q] = sums[q - 1]
                    count[0] = min(count[0] + 1, width)
                    parents[place] = parent
                    codes[place] = part_code[p]
                    codes[place, m] = c
                    for i in range(d):
                        sums[place, i] = part_sum[p, i] + words[i, first + c]
                else:
                    if following == width and cost >= next_cost[width - 1]:
                        continue
                    place = _insert(next_cost, following, cost)
                    for q in range(min(following, width - 1), place, -1):
                        next_code[q] = next_code[q - 1]
                        next_sum[q] = next_sum[q - 1]
                    following = min(following + 1, width)
                    next_code[place] = part_code[p]
                    next_code[place, m] = c
                    for i in range(d):
                        next_sum[place, i] = part_sum[p, i] + words[i, first + c]
        if not final:
            part_cost, next_cost = next_cost, part_cost
            part_code, next_code = next_code, part_code
            part_sum, next_sum = next_sum, part_sum
            parts = following


@parallel()
def feedback_vectors(w, upper, metrics, norms, inverses, scale, words, starts, width):  # pragma: no cover - compiled
    """Choose words vector after vector, moving each error onto the entries behind it as in GPTQ, and keep the `width`
    best beginnings of a row instead of one.

    Args:
        w: (blocks, rows, n), n = vectors * d. upper: (blocks, n, n), U with H^-1 = Uᵀ U. metrics: (blocks, vectors, d,
            d), what an error of a vector costs when the entries behind it answer: (U_bbᵀ U_bb)^-1. norms: (blocks,
            vectors, words). inverses: (blocks, vectors, d, d), U_bb^-1. scale: (blocks, rows, vectors).

    Returns:
        codes (blocks, rows, vectors, books) int32.
    """
    blocks, rows, n = w.shape
    vectors, d, books = metrics.shape[1], metrics.shape[2], len(starts) - 1
    out = np.zeros((blocks, rows, vectors, books), np.int32)
    for task in prange(blocks * rows):
        b, r = task // rows, task % rows
        rest, other = np.empty((width, n)), np.empty((width, n))
        rest[0] = w[b, r]
        total = np.zeros(width)
        kept = 1
        history = np.zeros((vectors, width, books), np.int32)
        origin = np.zeros((vectors, width), np.int32)
        costs, parents = np.empty(width), np.zeros(width, np.int32)
        codes, sums = np.zeros((width, books), np.int32), np.zeros((width, d))
        count = np.zeros(1, np.int64)
        pull, error = np.empty(d), np.empty(d)
        for v in range(vectors):
            first = v * d
            metric, s = metrics[b, v], scale[b, r, v]
            count[0] = 0
            for h in range(kept):
                base = total[h]
                for i in range(d):
                    pull[i] = 0.0
                    for j in range(d):
                        pull[i] += metric[i, j] * rest[h, first + j]
                    base += pull[i] * rest[h, first + i]
                _choose(metric, norms[b, v], pull, s, words, starts, base, h, (costs, parents, codes, sums, count))
            kept = count[0]
            for h in range(kept):
                p = parents[h]
                total[h] = costs[h]
                history[v, h] = codes[h]
                origin[v, h] = p
                for i in range(d):
                    error[i] = 0.0
                    for j in range(d):
                        error[i] += (rest[p, first + j] - s * sums[h, j]) * inverses[b, v, j, i]
                for j in range(first + d, n):
                    other[h, j] = rest[p, j]
                for i in range(d):
                    e = error[i]
                    factor = upper[b, first + i]
                    for j in range(first + d, n):
                        other[h, j] -= e * factor[j]
            rest, other = other, rest
        h = 0
        for v in range(vectors - 1, -1, -1):
            out[b, r, v] = history[v, h]
            h = origin[v, h]
    return out


@parallel()
def descend_vectors(w, hessian, place, scale, words, starts, codes, sweeps, width):  # pragma: no cover - compiled
    """Coordinate descent on the codes of every row, in place: vector after vector, the best words with all others
    fixed, until a sweep changes nothing. (v - w) H (v - w)ᵀ never rises.

    Args:
        w: (blocks, rows, cols). hessian: (blocks, cols, cols). place: (blocks, rows or 1, n) int32, the column of every
            entry of the vectors, -1 where there is none. scale: (blocks, rows, vectors). codes: (blocks, rows, vectors,
            books) int32. width: of the search for the words of one vector.
    """
    blocks, rows, cols = w.shape
    vectors, books, d = codes.shape[2], codes.shape[3], words.shape[0]
    shared = place.shape[1] == 1
    norms = np.zeros((blocks, vectors if shared else 0, words.shape[1]))
    if shared:
        for task in prange(blocks * vectors):
            b, v = task // vectors, task % vectors
            metric = np.zeros((d, d))
            _metric(hessian[b], place[b, 0, v * d : v * d + d], metric)
            _norms(metric, words, norms[b, v])
    for task in prange(blocks * rows):
        b, r = task // rows, task % rows
        columns = place[b, 0 if shared else r]
        gradient = np.zeros(cols)
        change = -w[b, r].copy()
        for v in range(vectors):
            for i in range(d):
                column = columns[v * d + i]
                if column >= 0:
                    for m in range(books):
                        change[column] += scale[b, r, v] * words[i, starts[m] + codes[b, r, v, m]]
        for i in range(cols):
            if change[i] != 0.0:
                for j in range(cols):
                    gradient[j] += change[i] * hessian[b, i, j]
        metric, own, now, pull = np.zeros((d, d)), np.zeros(words.shape[1]), np.zeros(d), np.zeros(d)
        costs, parents = np.empty(width), np.zeros(width, np.int32)
        found, sums = np.zeros((width, books), np.int32), np.zeros((width, d))
        count = np.zeros(1, np.int64)
        for _ in range(sweeps):
            changed = False
            for v in range(vectors):
                first, s = v * d, scale[b, r, v]
                if s == 0.0 or columns[first] < 0:
                    continue
                _metric(hessian[b], columns[first : first + d], metric)
                for i in range(d):
                    now[i] = 0.0
                    for m in range(books):
                        now[i] += words[i, starts[m] + codes[b, r, v, m]]
                cost, energy = 0.0, 0.0
                for i in range(d):
                    column = columns[first + i]
                    bent = 0.0
                    for j in range(d):
                        bent += metric[i, j] * now[j]
                    pull[i] = s * bent - (gradient[column] if column >= 0 else 0.0)
                    cost += s * now[i] * (s * bent - 2.0 * pull[i])
                    energy += s * s * now[i] * bent + abs(s * now[i] * pull[i])
                if shared:
                    own = norms[b, v]
                else:
                    _norms(metric, words, own)
                count[0] = 0
                _choose(metric, own, pull, s, words, starts, 0.0, 0, (costs, parents, found, sums, count))
                if costs[0] < cost - TIE * energy:
                    changed = True
                    codes[b, r, v] = found[0]
                    for i in range(d):
                        column = columns[first + i]
                        step = s * (sums[0, i] - now[i])
                        if column >= 0 and step != 0.0:
                            factor = hessian[b, column]
                            for j in range(cols):
                                gradient[j] += step * factor[j]
            if not changed:
                break


@compiled()
def _metric(hessian, columns, metric):  # pragma: no cover - compiled
    """The part of a Hessian that belongs to one vector; zero where an entry has no column."""
    d = len(columns)
    for i in range(d):
        for j in range(d):
            both = columns[i] >= 0 and columns[j] >= 0
            metric[i, j] = hessian[columns[i], columns[j]] if both else 0.0


@compiled()
def _norms(metric, words, norms):  # pragma: no cover - compiled
    d = words.shape[0]
    for c in range(words.shape[1]):
        norms[c] = 0.0
    for i in range(d):
        for j in range(d):
            for c in range(words.shape[1]):
                norms[c] += words[i, c] * metric[i, j] * words[j, c]
