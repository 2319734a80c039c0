"""Round the columns of a matrix one after another, moving each rounding error onto the columns still to come.

Paper: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2210.17323, algorithm 1. Differences: (1) everything in float64; (2) the grid of every group is fixed
beforehand from the dense weights ("static groups"), so columns can go in any order; (3) damping starts at `damp` and is
raised only where the Cholesky factorisation fails, and the value used is recorded; (4) all row blocks
of a grouped convolution go at once; (5) entries that a pruning step removed are rounded to zero.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, final

import torch
from torch import Tensor

from featherweight._linalg import damped_cholesky, inverse_factor
from featherweight.errors import require
from featherweight.methods._rounding import feedback_rows
from featherweight.methods.base import Solution, status_of, usable
from featherweight.methods.grids import SEARCH, GridSpec, Points, choose
from featherweight.stats import LayerStats
from featherweight.weights import Sparse

BLOCK = 128  # columns between two updates of all the columns behind them


@final
@dataclass(frozen=True, slots=True)
class Gptq:
    """damp: relative damping, added to the Hessian as damp * mean(diag) * I. act_order: columns in descending order
    of their input power instead of left to right."""

    name: ClassVar[str] = "gptq"
    grid: GridSpec
    damp: float = 0.01
    act_order: bool = True

    def __post_init__(self) -> None:
        require(0 <= self.damp < math.inf, "damp must be at least 0", self.damp)

    @property
    def label(self) -> str:
        return f"gptq {self.grid.label}"

    def solve(self, w: Tensor, stats: LayerStats) -> Solution:
        return self.solve_kept(w, w, stats, None)

    def solve_kept(self, w: Tensor, start: Tensor, stats: LayerStats, keep: Tensor | None) -> Solution:
        """Like solve, from the pruned weights `start` whose entries outside `keep` stay zero."""
        seen = usable(stats)
        points = choose(start.double(), self.grid, input_power(seen, w.shape), keep)
        codes, damp = quantize(start, seen.gram, points, self.damp, self.act_order, keep)
        status = status_of(stats, damp > self.damp)
        grid = points.grid(codes)
        return Solution.of(grid if keep is None else Sparse(keep, grid), w, stats, status, {"damp": damp})

    def storage(self, shape: tuple[int, int], taps: int = 1, groups: int = 1) -> int:
        return self.grid.storage(shape)

    def work(self, shape: tuple[int, int], blocks: int) -> float:
        rows, cols = shape
        return SEARCH * rows * cols + rows * cols**2 / 2 + 2 * blocks * cols**3


def input_power(stats: LayerStats, shape: tuple[int, ...]) -> Tensor:
    """The mean square of the input behind each entry, times how often its row is used, (rows, cols)."""
    power = stats.gram.diagonal(dim1=1, dim2=2).repeat_interleave(shape[0] // stats.blocks, dim=0)
    return power if stats.row_share is None else power * stats.row_share[:, None]


def quantize(
    w: Tensor, gram: Tensor, points: Points, damp: float, act_order: bool, keep: Tensor | None
) -> tuple[Tensor, float]:
    """(codes (rows, cols) uint8, damping used) for w (rows, cols) under gram (blocks, cols, cols)."""
    blocks, cols, _ = gram.shape
    order, upper, used = factored(gram, damp, act_order)

    def arranged(matrix: Tensor) -> Tensor:  # (blocks, rows, cols) in the order of solving
        return matrix.reshape(blocks, -1, cols).gather(2, order[:, None, :].expand(-1, matrix.shape[0] // blocks, -1))

    scale, zero = (arranged(t) for t in points.entries())
    kept = torch.ones_like(scale, dtype=torch.bool) if keep is None else arranged(keep)
    codes = _feedback(arranged(w.double()), upper, scale, zero, kept, float(2**points.spec.bits - 1))
    back = order.argsort(dim=1)[:, None, :].expand_as(codes)
    return codes.gather(2, back).reshape(w.shape), used


@lru_cache(maxsize=1)  # a layer is often solved on several grids, one after another
def factored(gram: Tensor, damp: float, act_order: bool) -> tuple[Tensor, Tensor, float]:
    """(order of the columns (blocks, cols), upper Cholesky factor of the inverse in that order, damping used)."""
    blocks, cols, _ = gram.shape
    power = gram.diagonal(dim1=1, dim2=2)
    order = power.argsort(dim=1, descending=True, stable=True) if act_order else torch.arange(cols).expand(blocks, -1)
    shuffled = gram.gather(1, order[:, :, None].expand_as(gram)).gather(2, order[:, None, :].expand_as(gram))
    _, factor, used = damped_cholesky(shuffled, damp)
    _, upper = inverse_factor(factor)
    return order, upper, used


def _feedback(w: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, kept: Tensor, top: float) -> Tensor:
    """Algorithm 1: (blocks, rows, cols) codes. Inside a block of columns errors move at once, in the kernel; onto all
    the columns behind it they move together, as one product. w is overwritten (it is a copy)."""
    codes = []
    for first in range(0, w.shape[2], BLOCK):
        here, behind = slice(first, first + BLOCK), slice(first + BLOCK, None)
        part, factor, scales, zeros, keeps = (
            t.contiguous().numpy()
            for t in (w[:, :, here], upper[:, here, here], scale[:, :, here], zero[:, :, here], kept[:, :, here])
        )
        rounded, errors = feedback_rows(part, factor, scales, zeros, keeps, top)
        codes.append(torch.from_numpy(rounded))
        w[:, :, behind] -= torch.from_numpy(errors) @ upper[:, here, behind]
    return torch.cat(codes, dim=2)
