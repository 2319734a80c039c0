"""Training by ADMM, written out: one matrix, gradient descent, float64."""

from collections.abc import Callable

import torch
from torch import Tensor


def admm(
    w: Tensor,
    gradient: Callable[[Tensor], Tensor],
    project: Callable[[Tensor], Tensor],
    rho: float,
    rate: float,
    epochs: int,
    steps: int,
    share: float,
    growth: float,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(W, Z, U) after every epoch, of `steps` steps each, from w. gradient: of the loss alone. rho: as it is, not
    relative. share: of W - Z, that U takes up."""
    w, u, found = w.clone(), torch.zeros_like(w), []
    for epoch in range(epochs):
        z = project(w + u)
        if epoch > 0:
            u = u + share * (w - z)
            u, rho = u / growth, rho * growth
        for _ in range(steps):
            w = w - rate * (gradient(w) + rho * (w - z + u))
        found.append((w.clone(), z.clone(), u.clone()))
    return found


def best_low_rank(a: Tensor, h: Tensor, rank: int) -> Tensor:
    """The W of that rank with the smallest tr((W - A) H (W - A)ᵀ): A H^(1/2), truncated, times H^(-1/2)."""
    values, vectors = torch.linalg.eigh(h)
    root = (vectors * values.sqrt()) @ vectors.T
    left, s, right = torch.linalg.svd(a @ root, full_matrices=False)
    return (left[:, :rank] * s[:rank]) @ right[:rank] @ torch.linalg.inv(root)


def largest_of_every(w: Tensor, n: int, m: int) -> Tensor:
    """w with all but the n largest of every m entries of a row set to zero."""
    out = torch.zeros_like(w)
    for r in range(w.shape[0]):
        for first in range(0, w.shape[1], m):
            group = sorted(range(first, first + m), key=lambda c: -abs(float(w[r, c])))
            for c in group[:n]:
                out[r, c] = w[r, c]
    return out
