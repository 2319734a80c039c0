"""Unstructured pruning of a layer: which weights to remove, and what the others become.

`Magnitude` removes the smallest weights and changes no other: the baseline. `Obs` is ExactOBS (Optimal Brain
Compression, 2208.11580, algorithm 1 and the global step of section 4): each row is pruned greedily to the end, one
weight at a time with all others re-optimised, keeping only the order and the loss of each step; then the cheapest next
removals over all rows are taken, never skipping within a row, until the sparsity is met. Differences from the paper:
(1) no weight traces: the weights of the chosen support are one exact least-squares solve, which OBS reaches anyway;
(2) the global choice is the paper's heap, not the sort over all losses of its released script; (3) the inverse Hessian
is shared by the rows (see _kernels.py); (4) damping is relative and recorded.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol, final

import torch
from torch import Tensor

from featherweight._linalg import damped_cholesky
from featherweight._pack import packed_size
from featherweight.errors import require
from featherweight.methods._kernels import prune_trace, refit_rows
from featherweight.methods.base import Solution, Status, status_of, usable
from featherweight.methods.gptq import Gptq
from featherweight.methods.obq import Obq
from featherweight.stats import LayerStats
from featherweight.weights import Dense, Sparse
from featherweight.weights.base import float_type


class Pruner(Protocol):
    """Chooses a support and the weights on it."""

    @property
    def sparsity(self) -> float: ...

    @property
    def damp(self) -> float: ...

    @property
    def label(self) -> str: ...

    def prune(self, w: Tensor, stats: LayerStats) -> tuple[Tensor, Tensor, float]:
        """(weights (rows, cols) float64, keep (rows, cols) bool, damping used)."""
        ...

    def work(self, shape: tuple[int, int], blocks: int) -> float: ...


@final
@dataclass(frozen=True, slots=True)
class Magnitude:
    """Keep the largest weights of the layer as they are. Needs no data."""

    name: ClassVar[str] = "magnitude"
    sparsity: float

    def __post_init__(self) -> None:
        require(0 <= self.sparsity < 1, "sparsity must be at least 0 and below 1", self.sparsity)

    @property
    def damp(self) -> float:
        return 0.0

    @property
    def label(self) -> str:
        return f"magnitude {self.sparsity:.0%}"

    def prune(self, w: Tensor, stats: LayerStats) -> tuple[Tensor, Tensor, float]:
        keep = torch.ones(w.numel(), dtype=torch.bool)
        keep[w.abs().reshape(-1).argsort(stable=True)[: removals(w, self.sparsity)]] = False
        keep = keep.reshape(w.shape)
        return torch.where(keep, w.double(), 0.0), keep, 0.0

    def solve(self, w: Tensor, stats: LayerStats) -> Solution:
        weights, keep, _ = self.prune(w, stats)
        return Solution.of(_stored(weights, keep), w, stats, status_of(stats))

    def storage(self, shape: tuple[int, int]) -> int:
        return _storage(shape, self.sparsity)

    def work(self, shape: tuple[int, int], blocks: int) -> float:
        return 10.0 * shape[0] * shape[1]


@final
@dataclass(frozen=True, slots=True)
class Obs:
    """damp: relative damping, added to the Hessian as damp * mean(diag) * I."""

    name: ClassVar[str] = "obs"
    sparsity: float
    damp: float = 0.001

    def __post_init__(self) -> None:
        require(0 <= self.sparsity < 1, "sparsity must be at least 0 and below 1", self.sparsity)
        require(0 <= self.damp < math.inf, "damp must be at least 0", self.damp)

    @property
    def label(self) -> str:
        return f"obs {self.sparsity:.0%}"

    def prune(self, w: Tensor, stats: LayerStats) -> tuple[Tensor, Tensor, float]:
        seen = usable(stats)
        hessian, factor, damp = damped_cholesky(seen.gram, self.damp)
        rows = w.shape[0] // seen.blocks
        orders, losses = [], []
        for b in range(seen.blocks):
            block = w[b * rows : (b + 1) * rows].double().contiguous().numpy()
            order, loss = prune_trace(block, torch.cholesky_inverse(factor[b]).numpy(), w.shape[1])
            orders.append(torch.from_numpy(order).long())
            losses.append(torch.from_numpy(loss))
        order, loss = torch.cat(orders), torch.cat(losses)
        if seen.row_share is not None:
            loss *= seen.row_share[:, None]
        removed = global_step(loss, removals(w, self.sparsity))
        keep = support(order, removed)
        return refit(w.double(), hessian, keep), keep, damp

    def solve(self, w: Tensor, stats: LayerStats) -> Solution:
        weights, keep, damp = self.prune(w, stats)
        status = status_of(stats, damp > self.damp)
        return Solution.of(_stored(weights, keep), w, stats, status, {"damp": damp})

    def storage(self, shape: tuple[int, int]) -> int:
        return _storage(shape, self.sparsity)

    def work(self, shape: tuple[int, int], blocks: int) -> float:
        rows, cols = shape
        return rows * cols**3 / 6 * (1 + 2 * (1 - self.sparsity) ** 3) + 2 * blocks * cols**3


@final
@dataclass(frozen=True, slots=True)
class PruneQuantize:
    """Prune, then quantize what is left on the same support, the quantizer's errors spread over the kept weights."""

    name: ClassVar[str] = "prune+quantize"
    prune: Pruner
    quantize: Gptq | Obq

    @property
    def label(self) -> str:
        return f"{self.prune.label} + {self.quantize.label}"

    def solve(self, w: Tensor, stats: LayerStats) -> Solution:
        weights, keep, damp = self.prune.prune(w, stats)
        solution = self.quantize.solve_kept(w, weights, stats, keep)
        info = {"damp": max(damp, solution.info["damp"])}
        status = Status.DAMPED if damp > self.prune.damp and solution.status is Status.SOLVED else solution.status
        return Solution(solution.weight, solution.error, solution.relative_error, status, info)

    def storage(self, shape: tuple[int, int]) -> int:
        total = shape[0] * shape[1]
        kept = total - round(total * self.prune.sparsity)
        return packed_size(total, 1) + self.quantize.grid.storage(shape, kept)

    def work(self, shape: tuple[int, int], blocks: int) -> float:
        return self.prune.work(shape, blocks) + 2 * self.quantize.work(shape, blocks)


def removals(w: Tensor, sparsity: float) -> int:
    """How many entries a sparsity removes."""
    return round(w.numel() * sparsity)


def global_step(losses: Tensor, count: int) -> Tensor:
    """Removals per row, (rows,), when the `count` cheapest next steps are taken over all rows (losses: (rows, steps)
    in the order of each row)."""
    # A row's step is taken when all before it are: when the largest loss up to it is among the smallest.
    cheapest = losses.cummax(dim=1).values.reshape(-1).argsort(stable=True)[:count]
    return torch.bincount(cheapest // max(losses.shape[1], 1), minlength=losses.shape[0])


def support(order: Tensor, removed: Tensor) -> Tensor:
    """keep (rows, cols) bool after the first removed[r] columns of order[r] are gone."""
    gone = torch.arange(order.shape[1])[None, :] < removed[:, None]
    return torch.ones_like(gone).scatter(1, order, ~gone)


def refit(w: Tensor, hessian: Tensor, keep: Tensor) -> Tensor:
    """The least-squares optimal weights on a support, (rows, cols) float64: argmin (v - w) H (v - w)ᵀ over v that are
    zero outside `keep`. hessian: (blocks, cols, cols), positive definite."""
    rows = w.shape[0] // hessian.shape[0]
    parts = []
    for b, h in enumerate(hessian):
        block = slice(b * rows, (b + 1) * rows)
        arrays = w[block].contiguous().numpy(), h.contiguous().numpy(), keep[block].contiguous().numpy()
        parts.append(torch.from_numpy(refit_rows(arrays[0], arrays[1], arrays[2])))
    return torch.cat(parts)


def _stored(weights: Tensor, keep: Tensor) -> Sparse:
    return Sparse(keep, Dense(weights.to(float_type(weights[keep]))))


def _storage(shape: tuple[int, int], sparsity: float) -> int:
    total = shape[0] * shape[1]
    return packed_size(total, 1) + 2 * (total - round(total * sparsity))
