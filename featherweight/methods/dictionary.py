"""Dictionary pairs: columns in blocks, each block a product of a dictionary and its coefficients. Needs no data.

After Gao, Zhang, Zhang, Zhao, Yang and Wang (ICDM 2021; Knowledge and Information Systems 65(8):3435-3461, 2023,
10.1007/s10115-023-01846-1). A block X (columns x outputs) becomes D C with k atoms, the columns of D; the paper finds D
and C = P X by turns of updates with penalties (tests/reference/dictionary_pairs.py has them). Differences: (1) D C has
rank k at most, so truncated singular values are the optimum of that objective (Eckart and Young), and D = U_k, P = U_kᵀ
reach it within its constraint |d| <= 1: we compute these, of every block at once, from the smaller Gram matrix; (2) the
automatic rank holds the relative error of the whole layer, not the absolute one of its first block; (3) a block is
whole input channels, so that pairs run as a grouped and a pointwise convolution; blocks of a layer have one k;
(4) factors may lie on grids: one is rounded, the other refitted to it by least squares, and rounded; (5) a pair that
would take as many bytes as the matrix in the same type is not made; fp16 itself never counts as compression; (6) layers
share a dictionary only where that pays (common.py).
"""

from dataclasses import dataclass
from math import log2
from typing import ClassVar, final

import torch
from torch import Tensor

from featherweight.errors import require
from featherweight.methods.base import Solution, status_of
from featherweight.methods.grids import SEARCH, GridSpec, choose
from featherweight.stats import LayerStats
from featherweight.weights import Dense, Factor, Factors
from featherweight.weights.base import float_type

NOTHING = 1e-14  # of the largest eigenvalue: below this one is rounding
WHOLE = "stored whole: a dictionary pair would be no smaller"
ROUNDS = 2  # of rounding one factor and refitting the other


@final
@dataclass(frozen=True, slots=True)
class Common:
    """The dictionary that several layers have: of all their rows together. name: the same for these layers, of the
    first. cols, blocks: of their matrices. dictionary: None until it is fitted (`sharing.fitted`)."""

    name: str
    cols: int
    blocks: int
    rank: int
    dictionary: Factor | None = None


@final
@dataclass(frozen=True, slots=True)
class DictionaryPairs:
    """How many atoms a block gets: `keep`, the share of the dense numbers that may be stored; or `error`, the largest
    relative error |W - V| / |W| before factors are rounded; or `rank`, which goes before both. grid: of the factors,
    None stores fp16; without a group, coefficients have a scale a row, atoms one each. block: input channels with a
    dictionary of their own, 0 for all of them; a layer takes the divisor of its channels that is nearest. share: which
    layers may have a dictionary in common: 'network', 'stage' (names that begin alike) or 'layer', none. common: what
    was decided, None for a dictionary of its own."""

    name: ClassVar[str] = "dictionary"
    keep: float | None = None
    error: float | None = None
    rank: int | None = None
    grid: GridSpec | None = None
    block: int = 0
    share: str = "layer"
    common: Common | None = None

    def __post_init__(self) -> None:
        given = self.keep, self.error, self.rank
        require(any(x is not None for x in given), "dictionary pairs need keep, error or rank", None)
        require(self.keep is None or self.error is None, "keep and error exclude each other", (self.keep, self.error))
        require(self.keep is None or 0 < self.keep <= 1, "keep must be above 0 and at most 1", self.keep)
        require(self.error is None or 0 <= self.error < 1, "error must be at least 0 and below 1", self.error)
        ranks = self.rank is None or (type(self.rank) is int and self.rank >= 1)
        require(ranks, "rank must be a whole number above 0", self.rank)
        require(type(self.block) is int and self.block >= 0, "block must be a number of channels, or 0", self.block)

    @property
    def label(self) -> str:
        asked = f"rank {self.rank}" if self.keep is None and self.error is None else ""
        asked = asked or (f"error {self.error:g}" if self.keep is None else f"{self.keep:.4g}")
        grid = "" if self.grid is None else f" {self.grid.label}"
        return f"dictionary {asked}{grid}" + (f" blocks of {self.block}" if self.block else "")

    def blocks(self, shape: tuple[int, int], taps: int = 1) -> int:
        """How many a (rows, cols) matrix has."""
        channels = shape[1] // taps
        if not 0 < self.block < channels:
            return 1
        sizes = (n for n in range(1, channels + 1) if channels % n == 0)
        return channels // min(sizes, key=lambda n: abs(log2(n / self.block)))

    def rank_of(self, shape: tuple[int, int], taps: int = 1) -> int:
        """Atoms of every block, as far as the shape decides: of an error that nobody measured yet, all."""
        if self.common is not None:
            return self.common.rank
        (rows, cols), blocks = shape, self.blocks(shape, taps)
        most = min(rows, cols // blocks)
        if self.rank is not None:
            return min(self.rank, most)
        if self.keep is None:
            return most
        return max(min(int(self.keep * rows * cols / (rows * blocks + cols)), most), 1)

    def solve(self, w: Tensor, stats: LayerStats) -> Solution:
        shape = w.shape[0], w.shape[1]
        x = in_blocks(w.double(), self.blocks(shape, stats.taps))
        if self.error is not None and self.rank is None:
            rank = rank_within(tails(spectrum(x)), self.error)
        else:
            rank = self.rank_of(shape, stats.taps)
        if self.common is None and self.is_plain(shape, len(x), rank):
            return Solution.of(self._rounded(w.double()), w, stats, status_of(stats), remark=WHOLE)
        if self.common is not None and self.common.dictionary is not None:
            second = self.common.dictionary
            d = second.dense().double().reshape(rank, len(x), -1).transpose(0, 1)
            first = self.coefficients(coefficients_of(x, d), d)
        else:
            first, second = self.factors(*pair(x, rank))
        if len(x) == 1:
            said = "oc", ("or", "rc"), {"o": shape[0], "r": rank, "c": shape[1]}
        else:
            sizes = {"o": shape[0], "b": len(x), "r": rank, "c": shape[1] // len(x)}
            said = "obc", ("obr", "rbc"), sizes
        weight = Factors(shape, *said, (first, second), () if self.common is None else (1,))
        return Solution.of(weight, w, stats, status_of(stats))

    def factors(self, c: Tensor, d: Tensor) -> tuple[Factor, Factor]:
        """Coefficients (blocks, rows, rank) with orthonormal columns and dictionary (blocks, rank, columns), stored."""
        if self.grid is None:
            even = 2.0 ** round(log2(float(d.abs().max()) or 1.0) / 2)  # fp16 holds neither the tiny nor the huge
            return self.coefficients(c * even, d), self.dictionary(d / even)
        x, found = c @ d, []
        for _ in range(ROUNDS):
            first = self.coefficients(c, d)
            c = first.dense().double().reshape(c.shape[1], len(c), -1).transpose(0, 1)
            second = self.dictionary(coefficients_of(x.mT, c.mT).mT, c)
            d = second.dense().double().reshape(d.shape[1], len(d), -1).transpose(0, 1)
            found.append((float((x - c @ d).square().sum()), len(found), first, second))
            c = coefficients_of(x, d)
        return min(found)[2:]

    def coefficients(self, c: Tensor, d: Tensor) -> Factor:
        """(rows, blocks * rank). What an error costs is the length of its atom."""
        costs = d.square().sum(dim=2).reshape(1, -1)
        return self._rounded(c.transpose(0, 1).reshape(c.shape[1], -1), costs)

    def dictionary(self, d: Tensor, c: Tensor | None = None) -> Factor:
        """(rank, blocks * columns)."""
        matrix = d.transpose(0, 1).reshape(d.shape[1], -1)
        costs = None if c is None else c.square().sum(dim=1).T.repeat_interleave(d.shape[2], dim=1)
        return self._rounded(matrix, costs, d.shape[2])

    def _rounded(self, matrix: Tensor, costs: Tensor | None = None, group: int | None = None) -> Factor:
        grid = self._grid(group)
        if grid is None:
            return Dense(matrix.to(float_type(matrix)))
        points = choose(matrix, grid, costs)
        return points.grid(points.round(matrix))

    def _grid(self, group: int | None) -> GridSpec | None:
        """With a group where it has none."""
        if self.grid is None or self.grid.group is not None:
            return self.grid
        return GridSpec(self.grid.bits, self.grid.symmetric, group)

    def _bytes(self, shape: tuple[int, int], group: int | None = None) -> int:
        grid = self._grid(group)
        return 2 * shape[0] * shape[1] if grid is None else grid.storage(shape)

    def dictionary_bytes(self, cols: int, blocks: int, rank: int) -> int:
        return self._bytes((rank, cols), cols // blocks)

    def coefficient_bytes(self, rows: int, blocks: int, rank: int) -> int:
        return self._bytes((rows, blocks * rank))

    def is_plain(self, shape: tuple[int, int], blocks: int, rank: int) -> bool:
        """Whether a pair of its own would be no smaller than the matrix."""
        own = self.dictionary_bytes(shape[1], blocks, rank) + self.coefficient_bytes(shape[0], blocks, rank)
        return own >= self._bytes(shape)

    @property
    def common_bytes(self) -> int:
        """Of the dictionary that it has in common, 0 where it has none."""
        return (
            0 if self.common is None else self.dictionary_bytes(self.common.cols, self.common.blocks, self.common.rank)
        )

    def storage(self, shape: tuple[int, int], taps: int = 1, groups: int = 1) -> int:
        """Without a dictionary in common. Of an error that nobody measured yet, the most it can be."""
        blocks, rank = self.blocks(shape, taps), self.rank_of(shape, taps)
        if self.common is not None:
            return self.coefficient_bytes(shape[0], blocks, rank)
        if self.is_plain(shape, blocks, rank):
            return self._bytes(shape)
        return self.dictionary_bytes(shape[1], blocks, rank) + self.coefficient_bytes(shape[0], blocks, rank)

    def work(self, shape: tuple[int, int], blocks: int) -> float:
        rows, cols = shape
        smaller, rank = min(rows, cols), self.rank_of(shape)
        search = 0 if self.grid is None else ROUNDS * SEARCH * rank * (rows + cols)
        return rows * cols * (smaller + 2 * rank) + 10 * smaller**3 + search


def in_blocks(w: Tensor, blocks: int) -> Tensor:
    """(blocks, rows, columns of one) of a matrix."""
    return w.reshape(len(w), blocks, -1).transpose(0, 1)


def _gram(x: Tensor) -> Tensor:
    """The smaller one: of the columns where there are no more of them than rows, else of the rows."""
    return x.mT @ x if x.shape[2] <= x.shape[1] else x @ x.mT


def spectrum(x: Tensor) -> Tensor:
    """Squared singular values of every block of (blocks, rows, columns), falling: (blocks, the smaller of the two)."""
    return torch.linalg.eigvalsh(_gram(x)).flip(1).clamp(min=0)


def tails(values: Tensor) -> Tensor:
    """The squared errors of the optimum of rank 0, 1, ... all, summed over the blocks, from their `spectrum`."""
    left = values.sum(dim=0).flip(0).cumsum(0).flip(0)
    return torch.cat([left, left.new_zeros(1)])


def rank_within(left: Tensor, error: float) -> int:
    """The smallest rank, at least 1, whose squared error is at most error² of all.

    >>> rank_within(torch.tensor([16.0, 4.0, 1.0, 0.0]), 0.5)
    1
    """
    fits = torch.nonzero(left <= error**2 * left[0])
    return max(int(fits[0]), 1)


def pair(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The optimum of |x - c d| over all c (blocks, rows, rank) and d (blocks, rank, columns): c has orthonormal columns
    (of zeros, where x has a smaller rank); rows of d are orthogonal and fall in length."""
    values, vectors = torch.linalg.eigh(_gram(x))
    values, vectors = values[:, -rank:].flip(1), vectors[:, :, -rank:].flip(2)
    if x.shape[2] > x.shape[1]:
        return vectors, vectors.mT @ x
    c = x @ vectors
    length = c.norm(dim=1, keepdim=True)
    real = length[:, 0] ** 2 > NOTHING * values[:, :1]
    inverse = torch.where(real, 1 / length[:, 0], 0.0)
    return c * inverse[:, None, :], length.mT * vectors.mT


def coefficients_of(x: Tensor, d: Tensor) -> Tensor:
    """The c that is nearest to c d = x, by least squares; atoms that depend on others get what the ridge gives them."""
    gram = d @ d.mT
    level = gram.diagonal(dim1=1, dim2=2).amax(dim=1, keepdim=True)
    gram.diagonal(dim1=1, dim2=2).add_(torch.where(level > 0, level * NOTHING, 1.0))
    return torch.linalg.solve(gram, d @ x.mT).mT
