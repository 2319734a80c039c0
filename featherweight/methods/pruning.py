"""Pruning of a layer: which weights to remove, and what the others become.

`Magnitude` removes the smallest weights and changes no other: the baseline. `Obs` is ExactOBS (Optimal Brain
Compression, 2208.11580, algorithm 1 and the global step of section 4): each row is pruned greedily to the end, one
weight at a time with all others re-optimised, keeping only the order and the loss of each step; then the cheapest next
removals over all rows are taken, never skipping within a row, until the sparsity is met. Differences from the paper:
(1) no weight traces: the weights of the chosen support are one exact least-squares solve, which OBS reaches anyway;
(2) the global choice is the paper's heap, not the sort over all losses of its released script; (3) the inverse Hessian
is shared by the rows (see _kernels.py); (4) damping is relative and recorded; (5) whole rows and whole input channels
go the same way, as pieces of one row; (6) rows and blocks that the channels do not fill are padded, never skipped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, final

import torch
from torch import Tensor

from featherweight._linalg import damped_cholesky
from featherweight.errors import require
from featherweight.methods import patterns, traces
from featherweight.methods._kernels import refit_rows
from featherweight.methods.additive import Additive
from featherweight.methods.base import Solution, status_of, usable
from featherweight.methods.gptq import Gptq
from featherweight.methods.obq import Obq
from featherweight.methods.patterns import NM, Blocks, Channels, Pattern, Rows, Unstructured, check
from featherweight.methods.traces import Trace
from featherweight.stats import LayerStats
from featherweight.weights import Dense, Sparse
from featherweight.weights.base import float_type
from featherweight.weights.masks import channel_groups, ungrouped

TRACE = 0.25  # time of a multiply-add of a trace, in those of other work
LAPACK = 400  # columns from which a row's refit is worth a call of its own


@final
@dataclass(frozen=True, slots=True, eq=False)
class Pruned:
    """weights: (rows, cols) float64, zero where keep, (rows, cols) bool, is false. damp: the relative damping used."""

    weights: Tensor
    keep: Tensor
    damp: float


class Pruner(Protocol):
    """Chooses a support and the weights on it."""

    @property
    def pattern(self) -> Pattern: ...

    @property
    def damp(self) -> float: ...

    @property
    def label(self) -> str: ...

    def prune(self, w: Tensor, stats: LayerStats, found: Trace | None = None) -> Pruned:
        """found: the trace of this layer, where it is known; pruners that need none ignore it."""
        ...

    def work(self, shape: tuple[int, int], blocks: int) -> float: ...


@final
@dataclass(frozen=True, slots=True)
class Magnitude:
    """Keep the largest weights of the layer as they are. Needs no data."""

    name: ClassVar[str] = "magnitude"
    pattern: Pattern

    def __post_init__(self) -> None:
        check(self.pattern)

    @property
    def damp(self) -> float:
        return 0.0

    @property
    def label(self) -> str:
        return f"magnitude {self.pattern.label}"

    def prune(self, w: Tensor, stats: LayerStats, found: Trace | None = None) -> Pruned:
        keep = patterns.keep_largest(w.double() ** 2, self.pattern, stats.taps, stats.blocks)
        return Pruned(torch.where(keep, w.double(), 0.0), keep, 0.0)

    def solve(self, w: Tensor, stats: LayerStats) -> Solution:
        return solved(self, w, stats)

    def storage(self, shape: tuple[int, int], taps: int = 1, groups: int = 1) -> int:
        return storage(self.pattern, shape, taps, groups)

    def work(self, shape: tuple[int, int], blocks: int) -> float:
        return 10.0 * shape[0] * shape[1]


@final
@dataclass(frozen=True, slots=True)
class Obs:
    """damp: relative damping, added to the Hessian as damp * mean(diag) * I."""

    name: ClassVar[str] = "obs"
    pattern: Pattern
    damp: float = 0.001

    def __post_init__(self) -> None:
        check(self.pattern)
        require(0 <= self.damp < math.inf, "damp must be at least 0", self.damp)

    @property
    def label(self) -> str:
        return f"obs {self.pattern.label}"

    def prune(self, w: Tensor, stats: LayerStats, found: Trace | None = None) -> Pruned:
        return self.levels(w, stats, [self.pattern], found)[0]

    def trace(self, w: Tensor, stats: LayerStats) -> Trace:
        """The whole trace of the pattern: all that is needed for any sparsity of it. Order and losses, 12 bytes a
        weight at most."""
        seen, w = usable(stats), w.double()
        hessian, factor, damp = damped_cholesky(seen.gram, self.damp)
        steps = _steps(self.pattern, (w.shape[0], w.shape[1]), seen.taps)
        return _traced(w, hessian, factor, self.pattern, seen, steps, damp)

    def levels(
        self, w: Tensor, stats: LayerStats, wanted: Sequence[Pattern], found: Trace | None = None
    ) -> list[Pruned]:
        """Several sparsities of one pattern, from the given trace, or from one that is as long as the highest needs.

        Raises:
            UsageError: a wanted pattern is of another kind or size.
        """
        for pattern in wanted:
            same = type(pattern) is type(self.pattern) and _piece(pattern) == _piece(self.pattern)
            require(same, f"all levels must have the pattern of {self.pattern}", pattern)
        seen, w = usable(stats), w.double()
        hessian, factor, damp = damped_cholesky(seen.gram, self.damp)
        shape = w.shape[0], w.shape[1]
        counts = [patterns.removals(p, shape, seen.taps, seen.blocks) for p in wanted]
        if found is None:
            total = _steps(self.pattern, shape, seen.taps)
            highest = max(p.sparsity for p in wanted) if isinstance(self.pattern, Unstructured | Blocks) else 1.0
            steps = math.ceil(total * (1 + highest) / 2)
            found = _traced(w, hessian, factor, self.pattern, seen, steps, damp)
            if steps < total and any((global_step(found.losses, c) == steps).any() for c in counts):
                found = _traced(w, hessian, factor, self.pattern, seen, total, damp)  # some row ends with its trace
        keeps = [_mask(found, self.pattern, seen, c, shape) for c in counts]
        return [Pruned(refit(w, hessian, keep), keep, damp) for keep in keeps]

    def solve(self, w: Tensor, stats: LayerStats, found: Trace | None = None) -> Solution:
        return solved(self, w, stats, found)

    def storage(self, shape: tuple[int, int], taps: int = 1, groups: int = 1) -> int:
        return storage(self.pattern, shape, taps, groups)

    def work(self, shape: tuple[int, int], blocks: int) -> float:
        rows, cols = shape
        match self.pattern:
            case Rows():
                return rows * cols**2
            case Channels():
                return 2 * rows * cols**2 + 4 * blocks * cols**3
        return rows * cols**3 / 6 * TRACE + refits(self.pattern, shape) + 2 * blocks * cols**3


@final
@dataclass(frozen=True, slots=True)
class PruneQuantize:
    """Prune, then quantize what is left on the same support, the quantizer's errors spread over the kept weights."""

    name: ClassVar[str] = "prune+quantize"
    prune: Pruner
    quantize: Gptq | Obq | Additive

    @property
    def label(self) -> str:
        return f"{self.prune.label} + {self.quantize.label}"

    def solve(self, w: Tensor, stats: LayerStats, found: Trace | None = None) -> Solution:
        return self.stored(self.prune.prune(w, stats, found), w, stats)

    def stored(self, pruned: Pruned, w: Tensor, stats: LayerStats) -> Solution:
        """The solution for weights that `prune` has pruned."""
        solution = self.quantize.solve_kept(w, pruned.weights, stats, pruned.keep)
        assert isinstance(solution.weight, Sparse)
        weight = replace(solution.weight, form=patterns.mask_of(self.prune.pattern, stats.taps, stats.blocks))
        damp = max(pruned.damp, solution.info["damp"])
        raised = pruned.damp > self.prune.damp or solution.info["damp"] > self.quantize.damp
        padded = patterns.is_padded(self.prune.pattern, w.shape[1], stats.taps)
        status = status_of(stats, raised)
        return Solution(weight, solution.error, solution.relative_error, status, {"damp": damp}, padded)

    def storage(self, shape: tuple[int, int], taps: int = 1, groups: int = 1) -> int:
        pattern = self.prune.pattern
        mask = patterns.mask_of(pattern, taps, groups).size(shape)
        kept = _kept(pattern, shape, taps, groups)
        if isinstance(self.quantize, Additive):
            return mask + self.quantize.storage(shape, taps, groups, kept)
        return mask + self.quantize.grid.storage(shape, kept)

    def work(self, shape: tuple[int, int], blocks: int) -> float:
        return self.prune.work(shape, blocks) + 2 * self.quantize.work(shape, blocks)


def solved(method: Pruner, w: Tensor, stats: LayerStats, found: Trace | None = None) -> Solution:
    """The solution of a pruner alone."""
    return stored(method, method.prune(w, stats, found), w, stats)


def stored(method: Pruner, pruned: Pruned, w: Tensor, stats: LayerStats) -> Solution:
    """The solution for weights that `method` has pruned: values in fp16 where that is exact enough."""
    values = Dense(pruned.weights.to(float_type(pruned.weights[pruned.keep])))
    weight = Sparse(pruned.keep, values, patterns.mask_of(method.pattern, stats.taps, stats.blocks))
    padded = patterns.is_padded(method.pattern, w.shape[1], stats.taps)
    info = {} if isinstance(method, Magnitude) else {"damp": pruned.damp}
    return Solution.of(weight, w, stats, status_of(stats, pruned.damp > method.damp), info, padded)


def _kept(pattern: Pattern, shape: tuple[int, int], taps: int, groups: int) -> int:
    """Entries that stay, exact but for blocks that are padded."""
    rows, cols = shape
    removed = patterns.removals(pattern, shape, taps, groups)
    return rows * cols - removed * (rows * cols) // max(patterns.parts(pattern, shape, taps, groups), 1)


def storage(pattern: Pattern, shape: tuple[int, int], taps: int, groups: int) -> int:
    """Bytes of a mask and fp16 values."""
    return patterns.mask_of(pattern, taps, groups).size(shape) + 2 * _kept(pattern, shape, taps, groups)


def refits(pattern: Pattern, shape: tuple[int, int]) -> float:
    """Multiply-adds of the exact weights on a support that differs from row to row."""
    return shape[0] * (shape[1] * (1 - pattern.sparsity)) ** 3 / 3


# ---------------------------------------------------------------- ExactOBS
def _piece(pattern: Pattern) -> tuple[int, ...]:
    return (pattern.size,) if isinstance(pattern, Blocks) else (pattern.n, pattern.m) if isinstance(pattern, NM) else ()


def _steps(pattern: Pattern, shape: tuple[int, int], taps: int) -> int:
    """Removals in one row of a whole trace."""
    rows, cols = shape
    match pattern:
        case Unstructured():
            return cols
        case Blocks():
            return taps * math.ceil(cols // taps / pattern.size)
        case NM():
            return int(patterns.quota(pattern, cols, taps)[1].sum())
        case Rows():
            return rows
        case Channels():
            return cols // taps


def _traced(
    w: Tensor, hessian: Tensor, factor: Tensor, pattern: Pattern, stats: LayerStats, steps: int, damp: float
) -> Trace:
    """The trace of all row blocks; losses weighted with how often a row is used. Rows and channels make one row of
    trace for the matrix, or for each block. What no input reached goes first, whatever the damping says of it."""
    blocks, cols, _ = hessian.shape
    w = without_dead(w, stats)
    share = torch.ones(w.shape[0], dtype=w.dtype) if stats.row_share is None else stats.row_share
    if isinstance(pattern, Rows):
        parts = w.reshape(blocks, -1, cols)
        energy = ((parts @ hessian) * parts).sum(dim=2).reshape(-1) * share / 2
        order = energy.argsort(stable=True)
        return Trace(order[None].int(), energy[order][None])
    found = []
    rows = w.shape[0] // blocks
    for b in range(blocks):
        own, weight = w[b * rows : (b + 1) * rows], share[b * rows : (b + 1) * rows, None]
        inverse = torch.cholesky_inverse(factor[b])
        if isinstance(pattern, Channels):
            found.append(traces.channel_trace(own * weight.sqrt(), inverse, stats.taps))
            continue
        level, peak = hessian[b].diagonal().mean(), own.abs().amax().clamp(min=1e-300)
        dtype = traces.precision(damp, cols)
        scaled, inverse = (own / peak).to(dtype), (inverse * level).to(dtype)  # far from the ends of float32
        gpu = "cuda" if torch.cuda.is_available() else "cpu"
        match pattern:
            case Unstructured():
                part = traces.trace(scaled.to(gpu), inverse.to(gpu), steps)
            case NM():
                room = patterns.quota(pattern, cols, stats.taps)
                part = traces.trace(scaled.to(gpu), inverse.to(gpu), steps, *room)
            case Blocks():
                columns = channel_groups(cols, stats.taps, pattern.size).reshape(-1)
                part = traces.block_trace(*_arranged(scaled, inverse, columns), pattern.size, steps)
        found.append(Trace(part.order, part.losses * weight * (level * peak**2)))
    return Trace(torch.cat([t.order for t in found]), torch.cat([t.losses for t in found]))


def without_dead(w: Tensor, stats: LayerStats) -> Tensor:
    """w with zeros where the input never was anything else: such weights do nothing, as far as is known."""
    alive = (stats.gram.diagonal(dim1=1, dim2=2) != 0).repeat_interleave(len(w) // stats.blocks, dim=0)
    return torch.where(alive, w, 0.0)


def _arranged(w: Tensor, inverse: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Columns in another order; where it says -1, a column of zeros that depends on nothing."""
    real = columns >= 0
    w = torch.where(real, w[:, columns.clamp(min=0)], 0.0)
    taken = inverse[columns.clamp(min=0)][:, columns.clamp(min=0)]
    both = real[:, None] & real[None, :]
    return w.contiguous(), torch.where(both, taken, torch.eye(len(columns), dtype=w.dtype))


def _mask(found: Trace, pattern: Pattern, stats: LayerStats, count: int, shape: tuple[int, int]) -> Tensor:
    """keep (rows, cols) after the `count` cheapest next removals."""
    rows, cols = shape
    if isinstance(pattern, NM):
        order = found.order.long()
        return torch.ones(shape, dtype=torch.bool).scatter(1, order, torch.zeros(order.shape, dtype=torch.bool))
    pieces = support(found.order.long(), global_step(found.losses, count), _steps(pattern, shape, stats.taps))
    match pattern:
        case Unstructured():
            return pieces
        case Blocks():
            columns = channel_groups(cols, stats.taps, pattern.size)
            return ungrouped(pieces[:, :, None].expand(-1, -1, pattern.size), columns, cols)
        case Rows():
            return pieces.reshape(rows, 1).expand(rows, cols).contiguous()
        case Channels():
            whole = pieces.reshape(stats.blocks, 1, -1, 1)
            return whole.expand(stats.blocks, rows // stats.blocks, -1, stats.taps).reshape(rows, cols)


def global_step(losses: Tensor, count: int) -> Tensor:
    """Removals per row, (rows,), when the `count` cheapest next steps are taken over all rows (losses: (rows, steps)
    in the order of each row)."""
    # A row's step is taken when all before it are: when the largest loss up to it is among the smallest.
    cheapest = losses.cummax(dim=1).values.reshape(-1).argsort(stable=True)[:count]
    return torch.bincount(cheapest // max(losses.shape[1], 1), minlength=losses.shape[0])


def support(order: Tensor, removed: Tensor, pieces: int) -> Tensor:
    """keep (rows, pieces) bool after the first removed[r] of order[r] are gone."""
    gone = torch.arange(order.shape[1])[None, :] < removed[:, None]
    return torch.ones(len(order), pieces, dtype=torch.bool).scatter(1, order, ~gone)


# ---------------------------------------------------------------- the weights on a support
def refit(w: Tensor, hessian: Tensor, keep: Tensor) -> Tensor:
    """The least-squares optimal weights on a support, (rows, cols) float64: argmin (v - w) H (v - w)ᵀ over v that are
    zero outside `keep`. hessian: (blocks, cols, cols), positive definite."""
    rows = w.shape[0] // hessian.shape[0]
    found = []
    for b, h in enumerate(hessian):
        own, kept = w[b * rows : (b + 1) * rows].contiguous(), keep[b * rows : (b + 1) * rows].contiguous()
        together = torch.equal(kept[:1].expand_as(kept), kept)
        if together or w.shape[1] >= LAPACK:
            pulled = torch.where(kept, 0.0, own) @ h
            parts = [slice(None)] if together else [slice(r, r + 1) for r in range(rows)]
            found += [_refit_together(own[part], pulled[part], h, kept[part]) for part in parts]
        else:
            found.append(torch.from_numpy(refit_rows(own.numpy(), h.contiguous().numpy(), kept.numpy())))
    return torch.cat(found)


def _refit_together(w: Tensor, pulled: Tensor, h: Tensor, keep: Tensor) -> Tensor:
    """The same for rows that keep the same columns: v_K = w_K + w_P H_PK inv(H_KK), P the removed columns; pulled:
    w_P H_P, all columns."""
    kept = keep[0].nonzero()[:, 0]
    out = torch.zeros_like(w)
    if len(kept):
        factor = torch.linalg.cholesky(h[kept[:, None], kept])
        out[:, kept] = w[:, kept] + torch.cholesky_solve(pulled[:, kept].T, factor).T
    return out
