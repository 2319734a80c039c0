"""Additive quantization with books of words that layers share, and error feedback.

After "Toward Compact Parameter Representations for Architecture-Agnostic Neural Network Compression" (Sun et al.,
2111.10320): vectors of all layers are sums of words of one set of books. Differences: (1) words are chosen for the
layers' outputs, not for their weights, and errors move onto the entries behind them (vectors.py); of the beginnings of
a row, the `width` best are kept instead of one; (2) every row has a scale; (3) the books are the least-squares answer
to all codes of all layers (books.py); (4) layers that are small, or narrower than a few vectors, get a grid.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from featherweight._linalg import damped_cholesky
from featherweight.errors import require
from featherweight.methods.base import Method, Solution, status_of, usable
from featherweight.methods.books import Books, Vectors, fit, vectors_of
from featherweight.methods.vectors import Layer, encode
from featherweight.stats import LayerStats
from featherweight.weights import Codebook, Sparse
from featherweight.weights.base import float_type
from featherweight.weights.codebook import LONGEST, MOST_BITS, MOST_BOOKS

WIDTH = 8  # beginnings of a row
NARROW = 4  # vectors that a row must have


@final
@dataclass(frozen=True, slots=True)
class Additive:
    """vectors: how rows are cut; or bits a weight, for the cut that suits the number of weights. share: weights with
    the same name here, and the same other settings, have the books in common: 'network' all of them, 'stage' those
    whose names begin alike, 'layer' none. damp: relative damping, as in Gptq. width: beginnings of a row that are kept.
    books: those to use; None fits some to the one matrix that is solved."""

    name: ClassVar[str] = "additive"
    vectors: Vectors | float
    share: str = "network"
    damp: float = 0.01
    width: int = WIDTH
    books: Books | None = None

    def __post_init__(self) -> None:
        v = self.vectors if isinstance(self.vectors, Vectors) else vectors_of(self.vectors, 0)
        require(1 <= v.d <= LONGEST, f"vectors must have 1 to {LONGEST} weights", v.d)
        require(1 <= len(v.bits) <= MOST_BOOKS, f"there must be 1 to {MOST_BOOKS} books", len(v.bits))
        require(all(1 <= b <= MOST_BITS for b in v.bits), f"codes must have 1 to {MOST_BITS} bits", v.bits)
        require(0 <= self.damp < math.inf, "damp must be at least 0", self.damp)
        require(self.width >= 1, "width must be at least 1", self.width)

    @property
    def rate(self) -> float:
        """Bits a weight."""
        return self.vectors.rate if isinstance(self.vectors, Vectors) else self.vectors

    @property
    def label(self) -> str:
        if not isinstance(self.vectors, Vectors):
            return f"additive {self.rate:g} bit"
        books = "+".join(str(b) for b in self.vectors.bits)
        return f"additive {self.rate:.3g} bit ({books} in {self.vectors.d})"

    def cut(self, weights: int) -> Vectors:
        """How the rows of so many weights are cut."""
        return self.vectors if isinstance(self.vectors, Vectors) else vectors_of(self.vectors, weights)

    def for_weights(self, weights: int) -> "Additive":
        return replace(self, vectors=self.cut(weights))

    def solve(self, w: Tensor, stats: LayerStats) -> Solution:
        return self.solve_kept(w, w, stats, None)

    def solve_kept(self, w: Tensor, start: Tensor, stats: LayerStats, keep: Tensor | None) -> Solution:
        """Like solve, from the pruned weights `start`, of which only the entries in `keep` are stored."""
        layer, damp = self.layer(w, start, stats, keep)
        vectors = self.cut(w.numel())
        books = self.books or fit([layer], vectors)
        dtype = float_type(start.double().square().mean(dim=1).sqrt())
        scale, codes = encode(layer, books.words, self.width, dtype)
        taps = stats.taps if vectors.channels else 1
        stored = codes.to(torch.int16), books.words, scale[:, None].to(dtype), w.shape[1], taps
        weight = Codebook(*stored, keep=keep)
        status = status_of(stats, damp > self.damp)
        return Solution.of(weight if keep is None else Sparse(keep, weight), w, stats, status, {"damp": damp})

    def layer(self, w: Tensor, start: Tensor, stats: LayerStats, keep: Tensor | None = None) -> tuple[Layer, float]:
        """The matrix as it is encoded, and the damping used."""
        hessian, _, damp = damped_cholesky(usable(stats).gram, self.damp)
        vectors = self.cut(w.numel())
        taps = stats.taps if vectors.channels else 1
        return Layer.of(w.double(), start.double(), hessian, vectors.d, taps, keep), damp

    def storage(self, shape: tuple[int, int], taps: int = 1, groups: int = 1, stored: int | None = None) -> int:
        """Without the books. stored: entries of a pruned matrix that are kept, alike in every row."""
        rows, cols = shape
        cut = self.cut(rows * cols)
        vectors = rows * -(-cols // cut.d) if stored is None else rows * -(-stored // (rows * cut.d))
        return sum(-(-vectors * b // 8) for b in cut.bits) + 2 * rows

    def work(self, shape: tuple[int, int], blocks: int) -> float:
        rows, cols = shape
        words = sum(2**b for b in self.cut(rows * cols).bits)
        return rows * cols * (words + cols) * (self.width + 12) + 2 * blocks * cols**3


def additive_of(method: Method) -> Additive | None:
    """What a method stores vectors with, None where it does not."""
    inner = getattr(method, "quantize", method)  # of a pruner that quantizes
    return inner if isinstance(inner, Additive) else None
