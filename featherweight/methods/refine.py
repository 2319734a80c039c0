"""Alternating least squares: one factor after another gets the values that lose least beside the others.

The loss is the sum over rows of share_r d_r H d_rᵀ, d = w - the contraction of the factors, so with H the second moment
of a layer's inputs it is the error of its outputs. A contraction is linear in each of its factors, so each of them is a
least-squares problem; it is solved by conjugate gradients, the operator being a few contractions and one product with
H, never a matrix of its own. Preconditioner: the Gram matrix of what the factor multiplies, in the metric of H where
that is small, which is the exact inverse; else over its ranks alone, times the part of H over its own columns. Every
step starts from what is there, so the loss never rises.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import final

import torch
from torch import Tensor

from featherweight._linalg import damped_cholesky
from featherweight.methods.forms import Form
from featherweight.weights.factors import contracted

INNER = 8  # steps of conjugate gradients for a factor
NEAR = 1e-9  # of the first residual: no need to go on
LARGE = 2**24  # entries of what a factor multiplies: more are not formed
EXACT = 1024  # unknowns of a row, up to which a preconditioner sees all of the inputs' moments
RIDGE = 1e-12  # of a preconditioner
ROWS, COLS = "omnp", "ijkltyxc"


@final
@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """A form for w (rows, cols), float64. hessian: (cols, cols), None for the identity. share: (rows,), above 0, what a
    row's error counts, None for 1. penalty: times the squares of all factors, added to the loss."""

    form: Form
    w: Tensor
    hessian: Tensor | None = None
    share: Tensor | None = None
    penalty: float = 0.0

    def matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        """What the factors give, (rows, cols)."""
        return contracted(list(zip(self.form.terms, tensors, strict=True)), self.form.axes).reshape(self.w.shape)

    def weighed(self, d: Tensor) -> Tensor:
        """share_r d_r H."""
        d = d if self.share is None else d * self.share[:, None]
        return d if self.hessian is None else d @ self.hessian

    def loss(self, tensors: Sequence[Tensor]) -> float:
        d = self.w - self.matrix(tensors)
        return float((self.weighed(d) * d).sum()) + self.penalty * sum(float(t.square().sum()) for t in tensors)

    def gradient(self, tensors: Sequence[Tensor], k: int, d: Tensor) -> Tensor:
        """The adjoint of the contraction as a function of factor k: d (rows, cols) to the letters of its term."""
        others = [(t, x) for n, (t, x) in enumerate(zip(self.form.terms, tensors, strict=True)) if n != k]
        return contracted([(self.form.axes, d.reshape(self.form.modes)), *others], self.form.terms[k])


def refined(
    problem: Problem, tensors: Sequence[Tensor], sweeps: int, settled: float, free: Sequence[int] | None = None
) -> tuple[list[Tensor], list[float]]:
    """Better factors, and the loss at the start and after every sweep.

    Args:
        settled: share of the loss; a sweep that gains less is the last. free: positions of the factors that may change.
    """
    found, losses = list(tensors), [problem.loss(tensors)]
    for _ in range(sweeps):
        for k in range(len(found)) if free is None else free:
            found[k] = step(problem, found, k)
        losses.append(problem.loss(found))
        if losses[-2] - losses[-1] <= settled * losses[-2]:
            break
    return found, losses


def step(problem: Problem, tensors: Sequence[Tensor], k: int, iterations: int = INNER) -> Tensor:
    """Factor k, moved towards its least-squares solution beside the others by conjugate gradients."""
    at, solve = tensors[k], _preconditioner(problem, tensors, k)

    def with_(x: Tensor) -> list[Tensor]:
        return [*tensors[:k], x, *tensors[k + 1 :]]

    def operator(x: Tensor) -> Tensor:
        return problem.gradient(tensors, k, problem.weighed(problem.matrix(with_(x)))) + problem.penalty * x

    missing = problem.weighed(problem.w - problem.matrix(tensors))
    residual = problem.gradient(tensors, k, missing) - problem.penalty * at
    z = solve(residual)
    direction, energy = z, float((residual * z).sum())
    start = energy
    for _ in range(iterations):
        if energy <= NEAR**2 * start or energy <= 0:
            break
        image = operator(direction)
        curvature = float((direction * image).sum())
        if curvature <= 0:
            break
        length = energy / curvature
        at, residual = at + length * direction, residual - length * image
        z = solve(residual)
        before, energy = energy, float((residual * z).sum())
        direction = z + energy / before * direction
    return at


def marginal(hessian: Tensor, cols: str, sizes: Sequence[int], own: str) -> Tensor:
    """The mean over all other columns' letters of the Hessian between two entries of the letters `own`, as a matrix."""
    second = "".join(x.upper() if x in own else x for x in cols)
    part = torch.einsum(f"{cols}{second}->{own}{own.upper()}", hessian.reshape([*sizes, *sizes]))
    size = prod(n for x, n in zip(cols, sizes, strict=True) if x in own)
    return part.reshape(size, size) / (len(hessian) // size)


def _preconditioner(problem: Problem, tensors: Sequence[Tensor], k: int) -> Callable[[Tensor], Tensor]:
    """Nearly the inverse of `step`'s operator: a solve for each part that the factor's letters fall into."""
    form, term = problem.form, problem.form.terms[k]
    cols = "".join(x for x in form.axes if x in term and x in COLS)
    others = [(t, x) for n, (t, x) in enumerate(zip(form.terms, tensors, strict=True)) if n != k]
    parts = []
    every, seen = "".join(x for x in form.axes if x in COLS), False
    for apart in _apart(others, form.axes):
        bonds = "".join(x for x in term if x not in form.axes and any(x in t for t, _ in apart))
        gram = None if problem.hessian is None or seen else _seen(problem, problem.hessian, apart, cols, bonds)
        seen = seen or gram is not None
        letters, gram = (bonds, _gram(form, apart, bonds)) if gram is None else (cols + bonds, gram)
        gram.diagonal().add_(problem.penalty)
        parts.append((letters, damped_cholesky(gram, RIDGE)[1]))
    if cols and problem.hessian is not None and not seen:
        part = marginal(problem.hessian, every, [form.sizes[x] for x in every], cols)
        parts.append((cols, damped_cholesky(part, RIDGE)[1]))

    def solve(x: Tensor) -> Tensor:
        for own, factor in parts:
            order = own + "".join(a for a in term if a not in own)
            flat = torch.einsum(f"{term}->{order}", x).reshape(len(factor), -1)
            solved = torch.cholesky_solve(flat, factor).reshape([form.sizes[a] for a in order])
            x = torch.einsum(f"{order}->{term}", solved)
        return x

    return solve


def _apart(terms: Sequence[tuple[str, Tensor]], axes: str) -> list[list[tuple[str, Tensor]]]:
    """Terms that have no rank in common, in lists of their own: their Gram matrix is a Kronecker product."""
    found: list[list[tuple[str, Tensor]]] = []
    for term in terms:
        ranks = set(term[0]) - set(axes)
        joined = [part for part in found if any(ranks & set(letters) for letters, _ in part)]
        found = [p for p in found if not any(p is q for q in joined)] + [[*(t for p in joined for t in p), term]]
    return found


def _gram(form: Form, terms: Sequence[tuple[str, Tensor]], bonds: str) -> Tensor:
    """Inner products of what terms give together, over their ranks `bonds`."""
    count = prod(form.sizes[x] for x in bonds)
    copies = [("".join(x if x in form.axes else x.upper() for x in t), v) for t, v in terms]
    return contracted([*terms, *copies], bonds + bonds.upper()).reshape(count, count)


def _seen(
    problem: Problem, hessian: Tensor, terms: Sequence[tuple[str, Tensor]], own: str, bonds: str
) -> Tensor | None:
    """The same in the metric of the inputs, over a factor's own columns and ranks; None where the terms have not all
    other columns, or that would be large."""
    form = problem.form
    every = "".join(x for x in form.axes if x in COLS)
    rest = "".join(x for x in form.axes if any(x in t for t, _ in terms))
    count, entries = prod(form.sizes[x] for x in own + bonds), prod(form.sizes[x] for x in bonds + rest)
    if not set(every) <= set(rest + own) or count > EXACT or entries > LARGE:
        return None
    made = contracted(terms, bonds + rest)
    other = "".join(x if x in ROWS else x.upper() for x in rest)
    metric = hessian.reshape([form.sizes[x] for x in every] * 2)
    operands = [(bonds + rest, made), (bonds.upper() + other, made), (every + every.upper(), metric)]
    return contracted(operands, own + bonds + (own + bonds).upper()).reshape(count, count)
