"""How many singular values of a matrix stand out from noise: global analytic variational Bayesian matrix factorisation.

Paper: Nakajima, Sugiyama, Babacan, Tomioka, "Global Analytic Solution of Fully-observed Variational Bayesian Matrix
Factorization", JMLR 14 (2013): a matrix is a product of two with Gaussian priors whose widths are learned, plus noise.
A component survives where its singular value is above `threshold`, and the variance of the noise is where the free
energy of all components, a function of one variable, is least. Kim et al. 2016, 1511.06530 take the ranks of Tucker-2
from the two unfoldings of a kernel; so do we, and those of the other forms from their own cuts.

Rank 0, nothing but noise, is possible; a layer keeps its dense matrix then.
"""

import math

import torch
from torch import Tensor

from featherweight.methods.forms import full

FORMS = ("rows", "cols", "spatial", "tucker", "tt")  # a ring and CP have ranks that belong to no cut
SCAN = 400  # noise variances tried before the best is refined


def rank(matrix: Tensor) -> int:
    """Of the empirical variational Bayes solution, with the noise variance estimated."""
    rows, cols = sorted(matrix.shape)
    gamma = torch.linalg.svdvals(matrix.double())
    if not gamma.any():
        return 0
    return int((gamma > threshold(rows, cols, noise(gamma, rows, cols))).sum())


def threshold(rows: int, cols: int, variance: float) -> float:
    """The smallest singular value of a component of a (rows, cols) matrix, rows <= cols, under this noise."""
    return math.sqrt(variance * cols * _edge(rows / cols))


def noise(gamma: Tensor, rows: int, cols: int) -> float:
    """The variance of least free energy. gamma: all singular values, falling."""
    alpha, edge = rows / cols, _edge(rows / cols)
    squares = gamma.double() ** 2 / cols
    most = float(squares.sum()) / rows
    kept = min(math.ceil(rows / (1 + alpha)) - 1, rows)
    tail = squares[kept:]
    least = max(float(squares[kept]) / edge, float(tail.mean()), most * 1e-12)
    tried = torch.logspace(math.log10(least), math.log10(max(most, least)), SCAN, dtype=torch.float64)
    for _ in range(4):
        at = int(free_energy(squares, tried, alpha, edge).argmin())
        tried = torch.linspace(float(tried[max(at - 1, 0)]), float(tried[min(at + 1, SCAN - 1)]), SCAN).double()
    return float(tried[free_energy(squares, tried, alpha, edge).argmin()])


def free_energy(squares: Tensor, variances: Tensor, alpha: float, edge: float) -> Tensor:
    """Up to a factor and a constant, for each of the noise variances. squares: singular values squared, by columns."""
    x = squares / variances[:, None]
    clear = (x > edge) & (x > 1 + alpha)
    safe = torch.where(clear, x, edge + 1 + alpha)
    tau = (safe - (1 + alpha) + ((safe - (1 + alpha)) ** 2 - 4 * alpha).clamp(min=0).sqrt()) / 2
    gain = (tau + 1).log() + alpha * (tau / alpha + 1).log() - tau
    return (x - x.clamp(min=1e-300).log() + torch.where(clear, gain, 0.0)).sum(dim=1)


def ranks_of(form: str, w: Tensor, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """The ranks of a form (one of FORMS) for w (rows, cols), each from the matrix that its cut makes of w."""
    most = full(form, (w.shape[0], w.shape[1]), kernel)
    own = ["".join(x for x in term if x in most.axes) for term in most.terms]
    found = []
    for k in range(1, len(own)):
        left = "".join(own[:k])
        moved = torch.einsum(f"{most.axes}->{''.join(own)}", w.reshape(most.modes))
        found.append(rank(moved.reshape(math.prod(most.sizes[x] for x in left), -1)))
    return tuple(found)


def _edge(alpha: float) -> float:
    """(1 + tau)(1 + alpha / tau) at the tau where log(z + 1) / z - 1/2, at z = tau and at z = tau / alpha, add to 0."""
    low, high = 1e-9, 1e3

    def phi(z: float) -> float:
        return math.log1p(z) / z - 0.5

    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if phi(middle) + phi(middle / alpha) > 0 else (low, middle)
    return (1 + low) * (1 + alpha / low)
