"""Factored matrices the slow way: loops over indices, and general optimisation."""

import itertools
from collections.abc import Mapping, Sequence
from math import exp, inf, log, pi

import numpy as np
import torch
from scipy.optimize import minimize


def product(axes: str, terms: Sequence[str], sizes: Mapping[str, int], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of products, one entry after another."""
    letters = sorted(sizes)
    out = torch.zeros([sizes[x] for x in axes], dtype=torch.float64)
    for values in itertools.product(*(range(sizes[x]) for x in letters)):
        at = dict(zip(letters, values, strict=True))
        entry = 1.0
        for term, tensor in zip(terms, tensors, strict=True):
            entry *= float(tensor[tuple(at[x] for x in term)])
        out[tuple(at[x] for x in axes)] += entry
    return out


def design(axes: str, terms: Sequence[str], tensors: Sequence[torch.Tensor], k: int) -> torch.Tensor:
    """The matrix by which factor k, flattened, gives the flattened product."""
    columns = []
    for n in range(tensors[k].numel()):
        unit = torch.zeros(tensors[k].numel(), dtype=torch.float64)
        unit[n] = 1
        moved = [*tensors[:k], unit.reshape(tensors[k].shape), *tensors[k + 1 :]]
        columns.append(torch.einsum(f"{','.join(terms)}->{axes}", *moved).reshape(-1))
    return torch.stack(columns, dim=1)


def low_rank(w: torch.Tensor, hessian: torch.Tensor, rank: int, starts: int = 6) -> float:
    """The least sum over rows of d H d, d = w - a product of this rank, that quasi-Newton finds from several starts."""
    rows, cols = w.shape
    wanted, metric, make = w.numpy(), hessian.numpy(), np.random.default_rng(0)

    def loss(x):
        u, v = x[: rows * rank].reshape(rows, rank), x[rows * rank :].reshape(rank, cols)
        pulled = (u @ v - wanted) @ metric
        slope = np.concatenate([(2 * pulled @ v.T).ravel(), (2 * u.T @ pulled).ravel()])
        return float((pulled * (u @ v - wanted)).sum()), slope

    best = inf
    for _ in range(starts):
        start = make.standard_normal((rows + cols) * rank)
        best = min(best, minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-12, "maxiter": 5000}).fun)
    return best


def free_energy(gamma: Sequence[float], rows: int, cols: int, variance: float) -> tuple[float, int]:
    """Twice the least free energy of empirical variational Bayes with a given noise variance (Nakajima et al. 2013,
    section 2), found by searching means, variances and priors of every component, and how many components it has."""
    total, count = rows * cols * log(2 * pi * variance), 0
    for g in gamma:
        own = component(g, rows, cols, variance)
        total += g**2 / variance + min(own, 0.0)
        count += own < -1e-9
    return total, count


def component(g: float, rows: int, cols: int, variance: float) -> float:
    """Least over everything but the empty component, whose value is 0 in the limit."""

    def value(x):
        a, b = x[0], x[1]
        sa, sb, ca, cb = (exp(v) for v in x[2:])
        prior = cols * (log(ca) - log(sa)) + rows * (log(cb) - log(sb))
        means = (a * a + cols * sa) / ca + (b * b + rows * sb) / cb - (rows + cols)
        return prior + means + (-2 * a * b * g + (a * a + cols * sa) * (b * b + rows * sb)) / variance

    size = g**0.5
    start = [size, size, *(log(v) for v in (variance / (2 * g), variance / (2 * g), g / cols, g / rows))]
    found = minimize(value, start, method="Nelder-Mead", options={"maxiter": 6000, "xatol": 1e-9, "fatol": 1e-11})
    return float(found.fun) if abs(found.x[0] * found.x[1]) > 1e-3 * g else inf
