"""Input channels that several layers read, removed from all of them together.

A tensor's channel need not be made only where none of its readers reads it, so what each of them would remove by itself
is of no use. `kept_in_common` is ExactOBS (see `pruning`) on one problem made of all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from featherweight._linalg import damped_cholesky
from featherweight.errors import require
from featherweight.methods.base import Solution, usable
from featherweight.methods.patterns import Channels, Pattern
from featherweight.methods.pruning import Obs, Pruned, refit, refits, solved, storage
from featherweight.methods.traces import Trace
from featherweight.stats import LayerStats


@final
@dataclass(frozen=True, slots=True)
class Given:
    """Keep these input channels of a layer without groups, in rising order; the weights on them are the exact
    least-squares solution. channels: how many there are. damp: as in `Obs`."""

    name: ClassVar[str] = "given"
    kept: tuple[int, ...]
    channels: int
    damp: float = 0.001

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.kept, self.kept[1:], strict=False))
        inside = bool(self.kept) and rising and self.kept[0] >= 0 and self.kept[-1] < self.channels
        require(inside, f"kept must be some numbers of the {self.channels} channels, in rising order", self.kept)
        require(0 <= self.damp < math.inf, "damp must be at least 0", self.damp)

    @property
    def pattern(self) -> Pattern:
        return Channels(1 - len(self.kept) / self.channels)

    @property
    def label(self) -> str:
        return f"obs {self.pattern.label} in common"

    def prune(self, w: Tensor, stats: LayerStats, found: Trace | None = None) -> Pruned:
        shape, taps = (w.shape[0], w.shape[1]), stats.taps
        fits = stats.blocks == 1 and shape[1] == self.channels * taps
        require(fits, f"the layer must have {self.channels} input channels and no groups", shape[1] // taps)
        hessian, _, damp = damped_cholesky(usable(stats).gram, self.damp)
        keep = torch.zeros(self.channels, dtype=torch.bool)
        keep[list(self.kept)] = True
        keep = keep.repeat_interleave(taps).expand(shape).contiguous()
        return Pruned(refit(w.double(), hessian, keep), keep, damp)

    def solve(self, w: Tensor, stats: LayerStats) -> Solution:
        return solved(self, w, stats)

    def storage(self, shape: tuple[int, int], taps: int = 1, groups: int = 1) -> int:
        return storage(self.pattern, shape, taps, groups)

    def work(self, shape: tuple[int, int], blocks: int) -> float:
        return refits(self.pattern, (1, shape[1])) + shape[0] * shape[1] ** 2


def kept_in_common(
    matrices: Sequence[Tensor], stats: Sequence[LayerStats], sparsities: Sequence[float], damp: float = 0.001
) -> list[Given]:
    """The channels that layers which read the same input keep together at each sparsity.

    One problem for `Obs`: the rows are those of all layers, a channel's columns those that it has in any of them. So
    that no layer counts for the size of its outputs, each is divided by their root mean square.

    Args:
        matrices: (rows, channels * taps) of every layer, without groups; stats: of their inputs.
    """
    taps = [s.taps for s in stats]
    channels, total = matrices[0].shape[1] // taps[0], sum(taps)
    rows = sum(len(w) for w in matrices)
    w = torch.zeros(rows, channels, total, dtype=torch.float64)
    gram = torch.zeros(channels, total, channels, total, dtype=torch.float64)
    row = column = 0
    for own, seen in zip(matrices, map(usable, stats), strict=True):
        h = seen.gram[0]
        energy = float(((own.double() @ h) * own).sum())
        scaled = own.double() / max(energy, 1e-300) ** 0.5
        place = slice(column, column + seen.taps)
        w[row : row + len(own), :, place] = scaled.reshape(len(own), channels, seen.taps)
        gram[:, place, :, place] = h.reshape(channels, seen.taps, channels, seen.taps)
        row, column = row + len(own), column + seen.taps
    gram = gram.reshape(1, channels * total, -1)
    together = LayerStats(gram, gram.new_zeros(1, len(gram[0])), stats[0].samples[:1], taps=total)
    levels = [Channels(s) for s in sparsities]
    found = Obs(levels[0], damp).levels(w.reshape(rows, -1), together, levels)
    kept = [p.keep[0].reshape(channels, total)[:, 0].nonzero()[:, 0].tolist() for p in found]
    return [Given(tuple(k), channels, damp) for k in kept]
