"""Dense linear algebra that several solvers share. Tensors in, tensors out, float64; leading dimensions are batches."""

import torch
from torch import Tensor

from featherweight.errors import SolveError

LADDER = 8  # damping is raised tenfold at most this many times
NOISE = 1e-10  # a Cholesky pivot below this share of its diagonal entry is rounding noise: the column depends on others


def damped(gram: Tensor, damp: float) -> Tensor:
    """gram + damp * mean(diag(gram)) * I per matrix; the identity where a matrix is all zero (no input was ever
    non-zero there, so every choice is as good as any other)."""
    level = gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    shift = torch.where(level > 0, damp * level, 1.0)
    out = gram.clone()
    out.diagonal(dim1=-2, dim2=-1).add_(shift[..., None])
    return out


def damped_cholesky(gram: Tensor, damp: float) -> tuple[Tensor, Tensor, float]:
    """(damped gram, its lower Cholesky factor, the relative damping that was needed).

    Tries `damp`, then 1e-8 or ten times more until every matrix of the batch is positive definite beyond rounding.

    Raises:
        SolveError: gram has NaN, or stays indefinite at every step of the ladder.
    """
    tried = damp
    for _ in range(LADDER):
        hessian = damped(gram, tried)
        factor, info = torch.linalg.cholesky_ex(hessian)
        diag = hessian.diagonal(dim1=-2, dim2=-1)
        if not info.any() and (factor.diagonal(dim1=-2, dim2=-1) ** 2 > NOISE * diag).all():  # NaN compares false
            return hessian, factor, tried
        tried = max(tried * 10, 1e-8)
    raise SolveError(f"the Hessian is not positive definite even with relative damping {tried / 10:g}")


def inverse_factor(factor: Tensor) -> tuple[Tensor, Tensor]:
    """(H^-1, U) from the lower Cholesky factor of H, where U is upper triangular and H^-1 = Uᵀ U."""
    inverse = torch.cholesky_inverse(factor)
    return inverse, torch.linalg.cholesky(inverse, upper=True)
