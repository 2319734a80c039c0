"""Optimal Brain Quantization: round one weight of a row at a time, always the one that costs least, and re-optimise
all the others of the row after each.

Paper: Frantar, Singh, Alistarh, "Optimal Brain Compression: A Framework for Accurate Post-Training Quantization and
Pruning", 2208.11580, section 5: the score is r² / [H^-1]_pp with r the rounding residual (eq. 7), the update
-r / [H^-1]_pp [H^-1]_:,p, and a weight further than half a step from the grid is rounded at once, the furthest first.
Differences: (1) the inverse Hessian is shared by all rows and corrected through a thin factor (see _kernels.py), the
same numbers in a fraction of the time; (2) damping is relative and recorded; (3) the greedy order is poor where a few
inputs carry most of the power, so every row is also solved in the order of falling input power (which is GPTQ), both
results are polished by coordinate descent on the codes, and the better one is kept; (4) then the scales are refitted
by least squares and the codes polished again, ROUNDS times, keeping what lowers the error of the row.
`greedy` alone is the paper's algorithm.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from featherweight._linalg import damped_cholesky
from featherweight.errors import require
from featherweight.methods import gptq
from featherweight.methods._kernels import quantize_kept_rows, quantize_steps
from featherweight.methods._rounding import polish_rows
from featherweight.methods.base import Solution, status_of, usable
from featherweight.methods.grids import GridSpec, Points, choose
from featherweight.methods.traces import integers, precision, stages
from featherweight.stats import LayerStats
from featherweight.weights import Sparse

SWEEPS = 50  # of coordinate descent, at most; it stops by itself much earlier
ROUNDS = 5  # scale refits


@final
@dataclass(frozen=True, slots=True)
class Obq:
    """damp: relative damping, added to the Hessian as damp * mean(diag) * I."""

    name: ClassVar[str] = "obq"
    grid: GridSpec
    damp: float = 0.01

    def __post_init__(self) -> None:
        require(0 <= self.damp < math.inf, "damp must be at least 0", self.damp)

    @property
    def label(self) -> str:
        return f"obq {self.grid.label}"

    def solve(self, w: Tensor, stats: LayerStats) -> Solution:
        return self.solve_kept(w, w, stats, None)

    def solve_kept(self, w: Tensor, start: Tensor, stats: LayerStats, keep: Tensor | None) -> Solution:
        """Like solve, from the pruned weights `start` whose entries outside `keep` stay zero."""
        seen = usable(stats)
        w, start = w.double(), start.double()
        points = choose(start, self.grid, gptq.input_power(seen, w.shape), keep)
        hessian, _, damp = damped_cholesky(seen.gram, self.damp)
        by_power, _ = gptq.quantize(start, hessian, points, 0.0, True, keep)
        dtype = precision(damp, w.shape[1])
        first = polish(w, hessian, points, greedy(start, hessian, points, keep, dtype), keep)
        second = polish(w, hessian, points, by_power, keep)
        better = row_errors(w, hessian, points, first, keep) <= row_errors(w, hessian, points, second, keep)
        codes = torch.where(better[:, None], first, second)
        for _ in range(ROUNDS):
            points, codes = _refitted(w, hessian, points, codes, keep, seen.row_share)
        status = status_of(stats, damp > self.damp)
        grid = points.grid(codes)
        return Solution.of(grid if keep is None else Sparse(keep, grid), w, stats, status, {"damp": damp})

    def storage(self, shape: tuple[int, int], taps: int = 1, groups: int = 1) -> int:
        return self.grid.storage(shape)

    def work(self, shape: tuple[int, int], blocks: int) -> float:
        rows, cols = shape
        return gptq.Gptq(self.grid).work(shape, blocks) + rows * cols**3 / 6 + 40 * rows * cols**2


def greedy(
    w: Tensor, hessian: Tensor, points: Points, keep: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The paper's algorithm: codes (rows, cols) uint8 for w (rows, cols) under hessian (blocks, cols, cols). Each row
    of a pruned layer is solved on its own support, with the inverse of the Hessian restricted to it, in float64; dtype
    is the precision of the others."""
    codes = torch.zeros(w.shape, dtype=torch.uint8)
    scale, zero = points.entries()
    top = float(2**points.spec.bits - 1)
    rows = w.shape[0] // hessian.shape[0]
    for b, h in enumerate(hessian):
        block = slice(b * rows, (b + 1) * rows)
        if keep is None:
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
            inverse *= h.diagonal().mean()  # far from the ends of float32
            w_rows, shared, scales, zeros = (
                _array(t.to(dtype)) for t in (w[block], inverse, scale[block], zero[block])
            )
            near, far, own = integers(w_rows), integers(w_rows), codes[block].numpy()
            scales, zeros = scales.copy(), zeros.copy()  # they change places
            for part, state, base, done, now in stages(w_rows, shared, w.shape[1]):
                grids = scales[part], zeros[part], near[part], far[part], w_rows.dtype.type(top)
                quantize_steps(base, *state.rows, *grids, done, now, own[part])
        else:
            w_rows, scales, zeros = (_array(t[block]) for t in (w, scale, zero))
            kept = _array(keep[block])
            codes[block] = torch.from_numpy(quantize_kept_rows(w_rows, _array(h), scales, zeros, kept, top))
    return codes


def polish(w: Tensor, hessian: Tensor, points: Points, codes: Tensor, keep: Tensor | None = None) -> Tensor:
    """Coordinate descent on the codes; no row's error rises."""
    scale, zero = points.entries()
    stored = torch.ones(w.shape, dtype=torch.bool) if keep is None else keep
    out = codes.clone()
    rows = w.shape[0] // hessian.shape[0]
    top = float(2**points.spec.bits - 1)
    for b, h in enumerate(hessian):
        block = slice(b * rows, (b + 1) * rows)
        w_rows, scales, zeros, kept = (_array(t[block]) for t in (w, scale, zero, stored))
        polish_rows(w_rows, _array(h), scales, zeros, kept, out[block].numpy(), top, SWEEPS)
    return out


def row_errors(w: Tensor, hessian: Tensor, points: Points, codes: Tensor, keep: Tensor | None = None) -> Tensor:
    """d H dᵀ of every row, (rows,), d the difference to w."""
    scale, zero = points.entries()
    v = scale * (codes - zero)
    d = (v if keep is None else torch.where(keep, v, 0.0)) - w
    blocks = d.reshape(hessian.shape[0], -1, d.shape[1])
    return ((blocks @ hessian) * blocks).sum(dim=2).reshape(-1)


def _refitted(
    w: Tensor, hessian: Tensor, points: Points, codes: Tensor, keep: Tensor | None, row_share: Tensor | None = None
) -> tuple[Points, Tensor]:
    """Least-squares scales for the codes, then codes for the scales; rows that this made worse stay as they were.

    With s the scale of one group and c its codes less the zero point, the best change of s with all else fixed is
    -(c H d) / (c H c). Groups are taken in turn; a scale for the whole matrix sums both over the rows, as often as they
    are used.
    """
    used = torch.ones(w.shape[0], dtype=w.dtype) if row_share is None else row_share
    group = points.spec.columns(w.shape[1])
    _, zero = points.entries()
    c = codes - zero if keep is None else torch.where(keep, codes - zero, 0.0)
    blocks = hessian.shape[0]
    scale = points.scale.double()
    for g in range(scale.shape[1]):
        own = c.clone()
        if group:
            own[:, : g * group], own[:, (g + 1) * group :] = 0, 0
        entries = Points(points.spec, points.shape, scale, points.zero).entries()[0]
        pulled = (own.reshape(blocks, -1, own.shape[1]) @ hessian).reshape(own.shape)
        rise, curve = (pulled * (entries * c - w)).sum(dim=1), (pulled * own).sum(dim=1)
        if group == 0:
            rise, curve = used @ rise, used @ curve
        new = scale[:, g] - torch.where(curve > 0, rise / curve, 0.0)
        scale = scale.clone()
        scale[:, g] = torch.where(new > 0, new, scale[:, g])
    stored = scale.to(points.scale.dtype)
    stored = torch.where((stored > 0) & torch.isfinite(stored), stored, points.scale)
    fresh = Points(points.spec, points.shape, stored, points.zero)
    after = polish(w, hessian, fresh, codes, keep)
    old_error, new_error = row_errors(w, hessian, points, codes, keep), row_errors(w, hessian, fresh, after, keep)
    if group == 0:
        return (fresh, after) if used @ new_error < used @ old_error else (points, codes)
    better = (new_error < old_error)[:, None]
    kept = Points(points.spec, points.shape, torch.where(better, stored, points.scale), points.zero)
    return kept, torch.where(better, after, codes)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().numpy()
