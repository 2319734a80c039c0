"""A pruning mask by ADMM, which moves all weights at once where ExactOBS removes one after another.

Paper: Meng, Behdin, Wang, Mazumder, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
Models", 2406.07831: split min (v - w) H (v - w)ᵀ over sparse v into a ridge problem and a projection,

    B = (H + rho I)^-1 (H w - V + rho D),   D = keep the largest of (B + V / rho),   V += rho (B - D),

with columns scaled to unit diagonal, and rho growing the faster the more the mask still changes. Differences: (1) the
projection is that of any of our patterns; (2) weights on the mask are the exact solve of pruning.py instead of ten
steps of conjugate gradients; (3) rho starts lower and is raised more slowly, by the share of the mask that changed
alone, without restarts; (4) products are in float32 where the layer is damped: they choose a mask, no weights; (5) at
the end kept weights are exchanged for removed ones while that helps (exchange.py).
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from featherweight._linalg import damped_cholesky
from featherweight.errors import require
from featherweight.methods import exchange as exchanges
from featherweight.methods import patterns
from featherweight.methods.base import Solution, output_energy, usable
from featherweight.methods.patterns import Pattern, Rows, check
from featherweight.methods.pruning import Obs, Pruned, refit, refits, solved, storage, without_dead
from featherweight.methods.traces import Trace, precision
from featherweight.stats import LayerStats

ITERATIONS = 400  # at most
START = 0.003  # rho, relative to a unit diagonal; the paper's 0.1 freezes the masks of ill-conditioned layers early
CHECK = 3  # iterations between two looks at the mask
SLOW = 120 * 4e9  # of `work`: some two minutes on two cores
FASTER = ((0.1, 1.1), (0.005, 1.05), (0.0, 1.03))  # (share of the kept entries that changed, factor for rho)


@final
@dataclass(frozen=True, slots=True)
class Admm:
    """damp: relative damping, added to the Hessian as damp * mean(diag) * I. exchange: whether single weights are
    exchanged at the end, where the pattern removes single weights."""

    name: ClassVar[str] = "admm"
    pattern: Pattern
    damp: float = 0.001
    exchange: bool = True

    def __post_init__(self) -> None:
        check(self.pattern)
        require(0 <= self.damp < math.inf, "damp must be at least 0", self.damp)
        coupled = not isinstance(self.pattern, Rows)
        require(
            coupled, "admm has no use for rows, which do not depend on each other: obs is exact there", self.pattern
        )

    @property
    def label(self) -> str:
        return f"admm{_suffix(self)} {self.pattern.label}"

    def for_layer(self, shape: tuple[int, int], blocks: int) -> "Admm":
        """Without exchanges where they would take long."""
        return replace(self, exchange=self.exchange and exchanges.work(shape) <= SLOW)

    def prune(self, w: Tensor, stats: LayerStats, found: Trace | None = None) -> Pruned:
        seen, w = usable(stats), w.double()
        hessian, _, damp = damped_cholesky(seen.gram, self.damp)
        keep = mask(without_dead(w, seen), hessian, self.pattern, seen, precision(damp, w.shape[1]))
        return _exchanged(self, w, stats, Pruned(refit(w, hessian, keep), keep, damp))

    def solve(self, w: Tensor, stats: LayerStats) -> Solution:
        return solved(self, w, stats)

    def storage(self, shape: tuple[int, int], taps: int = 1, groups: int = 1) -> int:
        return storage(self.pattern, shape, taps, groups)

    def work(self, shape: tuple[int, int], blocks: int) -> float:
        rows, cols = shape
        exchanged = exchanges.work(shape) if _suffix(self) else 0
        return ITERATIONS * rows * cols**2 / 8 + 2 * blocks * cols**3 + refits(self.pattern, shape) + exchanged


@final
@dataclass(frozen=True, slots=True)
class Prune:
    """Both, and of the two masks the one that loses less, then improved by exchanges; `Admm` alone where the trace
    would take long. Greedy removal looks at one weight at a time and ADMM at all, so neither is always better."""

    name: ClassVar[str] = "prune"
    pattern: Pattern
    damp: float = 0.001
    exchange: bool = True

    def __post_init__(self) -> None:
        check(self.pattern)
        require(0 <= self.damp < math.inf, "damp must be at least 0", self.damp)

    @property
    def label(self) -> str:
        return f"obs, admm{_suffix(self)} {self.pattern.label}"

    @property
    def _ways(self) -> "tuple[Obs, ...] | tuple[Obs, Admm]":
        """Rows do not depend on each other: there OBS finds the best."""
        exact = Obs(self.pattern, self.damp)
        return (exact,) if isinstance(self.pattern, Rows) else (exact, Admm(self.pattern, self.damp, exchange=False))

    def for_layer(self, shape: tuple[int, int], blocks: int) -> "Prune | Obs | Admm":
        """What to do with a (rows, cols) matrix: all ways, unless there is one, or the first is slow; exchanges unless
        they are slow."""
        exact, *others = self._ways
        if not others:
            return exact
        swift = self.exchange and exchanges.work(shape) <= SLOW
        return replace(others[0], exchange=swift) if exact.work(shape, blocks) > SLOW else replace(self, exchange=swift)

    def prune(self, w: Tensor, stats: LayerStats, found: Trace | None = None) -> Pruned:
        masks = [way.prune(w, stats, found) for way in self._ways]
        return _exchanged(self, w, stats, min(masks, key=lambda p: output_energy(p.weights - w.double(), stats)))

    def solve(self, w: Tensor, stats: LayerStats, found: Trace | None = None) -> Solution:
        return solved(self, w, stats, found)

    def storage(self, shape: tuple[int, int], taps: int = 1, groups: int = 1) -> int:
        return storage(self.pattern, shape, taps, groups)

    def work(self, shape: tuple[int, int], blocks: int) -> float:
        return sum(way.work(shape, blocks) for way in self._ways) + (exchanges.work(shape) if _suffix(self) else 0)


def _suffix(method: Admm | Prune) -> str:
    """Behind the names of the others, where the method exchanges."""
    return ", exchange" if method.exchange and exchanges.possible(method.pattern) else ""


def _exchanged(method: Admm | Prune, w: Tensor, stats: LayerStats, found: Pruned) -> Pruned:
    """The same after exchanges, where these lower the undamped loss, too; `found` where nothing is exchanged."""
    if not (method.exchange and exchanges.possible(method.pattern)):
        return found
    seen, w = usable(stats), w.double()
    hessian, _, damp = damped_cholesky(seen.gram, method.damp)
    keep = exchanges.exchange(without_dead(w, seen), hessian, found.keep, method.pattern, seen)
    after = Pruned(refit(w, hessian, keep), keep, damp)
    return min(found, after, key=lambda p: output_energy(p.weights - w, stats))


def mask(w: Tensor, hessian: Tensor, pattern: Pattern, stats: LayerStats, dtype: torch.dtype) -> Tensor:
    """keep (rows, cols) bool for w (rows, cols) under hessian (blocks, cols, cols), positive definite."""
    blocks, cols, _ = hessian.shape
    norm = hessian.diagonal(dim1=1, dim2=2).sqrt()
    unit = (hessian / norm[:, :, None] / norm[:, None, :]).to(dtype)
    values, vectors = torch.linalg.eigh(unit)
    share = torch.ones(len(w)) if stats.row_share is None else stats.row_share
    dense = w.reshape(blocks, -1, cols) * norm[:, None, :] * share.sqrt().reshape(blocks, -1, 1)
    dense = (dense / dense.abs().amax().clamp(min=1e-300)).to(dtype)

    def project(x: Tensor) -> Tensor:
        return patterns.keep_largest(x.reshape(w.shape) ** 2, pattern, stats.taps, stats.blocks).reshape(x.shape)

    pulled, rho = dense @ unit, START
    keep = project(dense)
    sparse, dual = torch.where(keep, dense, 0), torch.zeros_like(dense)
    seen = keep
    for i in range(1, ITERATIONS + 1):
        right = pulled - dual + rho * sparse
        ridge = (right @ vectors / (values + rho)[:, None, :]) @ vectors.mT
        moved = ridge + dual / rho
        keep = project(moved)
        sparse = torch.where(keep, moved, 0)
        dual = dual + rho * (ridge - sparse)
        if i % CHECK == 0:
            changed = int((keep ^ seen).sum()) / max(int(keep.sum()), 1)
            if changed == 0 and i > 10 * CHECK:
                break
            seen = keep
            rho *= next(factor for share_, factor in FASTER if changed > share_ or share_ == 0)
    return keep.reshape(w.shape)
