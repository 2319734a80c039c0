"""Dictionary pairs by turns of updates, from the formulas of Gao et al. (ICDM 2021, KAIS 2023) and of the projective
dictionary pair learning that they use (Gu, Zhang, Zuo, Feng: NIPS 2014). Slow and plain, numpy float64.

    min |X - D A|² + tau |P X - A|²   over D, P, A with |d_j| <= 1,   what is stored being D and P X
"""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

TAU, GAMMA, RHO, RATE = 0.05, 1e-4, 1.0, 1.2
OUTER, INNER, STILL = 20, 100, 1e-8


def partition(w: Matrix, size: int = 0) -> list[Matrix]:
    """X = Wᵀ of a matrix (outputs, columns), cut into chunks of `size` rows; 0 is one chunk."""
    x = w.T
    size = size or len(x)
    assert len(x) % size == 0
    return [x[i : i + size] for i in range(0, len(x), size)]


def coefficients(x: Matrix, d: Matrix, p: Matrix) -> Matrix:
    """A = (DᵀD + tau I)^-1 (DᵀX + tau P X)."""
    return np.linalg.solve(d.T @ d + TAU * np.eye(d.shape[1]), d.T @ x + TAU * p @ x)


def projection(x: Matrix, a: Matrix, inverse: Matrix) -> Matrix:
    """P = tau A Xᵀ (tau X Xᵀ + gamma I)^-1, the inverse given."""
    return TAU * a @ x.T @ inverse


def dictionary(x: Matrix, a: Matrix, d: Matrix) -> Matrix:
    """The D of min |X - D A|² with |d_j| <= 1 by ADMM: D = S, T the scaled dual variable, rho growing."""
    s, t, rho = d.copy(), np.zeros_like(d), RHO
    for _ in range(INNER):
        before = d
        d = np.linalg.solve(rho * np.eye(len(a)) + a @ a.T, (rho * (s - t) + x @ a.T).T).T
        s = (d + t) / np.maximum(1.0, np.linalg.norm(d + t, axis=0))
        t = t + d - s
        rho *= RATE
        if np.mean((d - before) ** 2) <= STILL:
            break
    return s


def learned(x: Matrix, k: int, seed: int = 0, outer: int = OUTER) -> tuple[Matrix, Matrix]:
    """D (rows of x, k) and C = P X (k, columns of x) of one chunk."""
    random = np.random.default_rng(seed)
    d = random.random((len(x), k))
    d /= np.linalg.norm(d, axis=0)
    p = random.random((k, len(x)))
    p /= np.linalg.norm(p, axis=1, keepdims=True)
    inverse = np.linalg.inv(TAU * x @ x.T + GAMMA * np.eye(len(x)))
    a = coefficients(x, d, p)
    for _ in range(outer):
        p = projection(x, a, inverse)
        d = dictionary(x, a, d)
        a = coefficients(x, d, p)
    return d, p @ x


def compressed(w: Matrix, k: int, size: int = 0, seed: int = 0) -> Matrix:
    """The matrix (outputs, columns) that pairs of k atoms for every chunk stand for."""
    return np.concatenate([(d @ c).T for d, c in (learned(x, k, seed) for x in partition(w, size))], axis=1)


def best_error(w: Matrix, k: int, size: int = 0) -> float:
    """The squared error of the optimum: what singular values beyond the k-th of every chunk leave."""
    return float(sum((np.linalg.svd(x, compute_uv=False)[k:] ** 2).sum() for x in partition(w, size)))
