"""Additive quantization the slow way: everything is tried, everything is solved anew."""

from itertools import product

import numpy as np


def error(v, w, hessian):
    """(v - w) H (v - w)ᵀ."""
    d = np.asarray(v) - w
    return float(d @ hessian @ d)


def sums(books):
    """(codes, sum of the words) of every choice of one word of each book."""
    return [
        (codes, sum(b[c] for b, c in zip(books, codes, strict=True))) for codes in product(*map(range, map(len, books)))
    ]


def decoded(codes, scale, books, cols):
    """A row: scale times the sums of the words, what goes beyond the columns left out."""
    vectors = [sum(b[c] for b, c in zip(books, own, strict=True)) for own in codes]
    return scale * np.concatenate(vectors)[:cols]


def best_row(w, hessian, scale, books):
    """The smallest error of any codes of a row, and the codes."""
    d = books[0].shape[1]
    every = [codes for codes, _ in sums(books)]
    rows = product(every, repeat=-(-len(w) // d))
    return min((error(decoded(row, scale, books, len(w)), w, hessian), row) for row in rows)


def feedback_row(w, hessian, scale, books):
    """The codes of error feedback: each vector gets the words with which the row, all entries behind it solved for
    exactly, comes out best."""
    d, codes = books[0].shape[1], []
    fixed = np.zeros(0)
    while len(fixed) < len(w):
        tried = []
        for own, entries in sums(books):
            head = np.concatenate([fixed, scale * entries])[: len(w)]
            n = len(head)
            change = head - w[:n]
            rest = w[n:] - np.linalg.solve(hessian[n:, n:], hessian[n:, :n] @ change) if n < len(w) else w[:0]
            tried.append((error(np.concatenate([head, rest]), w, hessian), own))
        codes.append(min(tried)[1])
        fixed = np.concatenate([fixed, scale * sum(b[c] for b, c in zip(books, codes[-1], strict=True))])
    assert d > 0
    return codes


def best_words(layers, books):
    """The words of least squares for given codes, by the normal equations of every entry of every word, with the least
    norm where they leave one free. layers: (w (rows, cols), hessian, scale (rows,), codes (rows, vectors, books),
    weight) each."""
    sizes, d = [len(b) for b in books], books[0].shape[1]
    first = np.cumsum([0, *sizes])
    a, b = np.zeros((first[-1] * d, first[-1] * d)), np.zeros(first[-1] * d)
    for w, hessian, scale, codes, weight in layers:
        for r in range(len(w)):
            made = np.zeros((w.shape[1], first[-1] * d))  # the row is made @ words
            for v, own in enumerate(codes[r]):
                for m, c in enumerate(own):
                    for i in range(min(d, w.shape[1] - v * d)):
                        made[v * d + i, (first[m] + c) * d + i] += scale[r]
            a += weight * made.T @ hessian @ made
            b += weight * made.T @ hessian @ w[r]
    return np.linalg.lstsq(a, b, rcond=1e-12)[0].reshape(-1, d), a, b
