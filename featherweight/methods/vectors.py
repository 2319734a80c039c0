"""Rows of a matrix as scaled sums of words: choosing the words for given books.

The objective is that of all methods here, sum over rows of (v - w) H (v - w)ᵀ. A row is cut into vectors of d entries;
words are chosen vector after vector, each error moved onto the entries behind it by the recursion of GPTQ (2210.17323)
with a vector in place of a column; then by coordinate descent over the vectors, in turns with the rows' scales.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from featherweight._linalg import damped_cholesky, inverse_factor
from featherweight.methods._vectors import descend_vectors, feedback_vectors
from featherweight.weights.codebook import entry_order, nearest_words, places

SWEEPS = 4  # of coordinate descent between two fits of the scales
TURNS = 6  # fits of the scales, at most
SETTLED = 1e-3  # a turn that gains less than this share is the last
SEARCH = 4  # partial sums that the descent keeps, where a vector has words of several books
SURPLUS = 1e-6  # relative to the mean diagonal, what an error counts where a vector is longer than the row


@final
@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A matrix to encode. w: (rows, cols) float64. start: like w, what the first words are chosen for: w, or w as it
    was pruned. hessian: (blocks, cols, cols) float64, positive definite. place: (1
    or rows, n) int64, the column of every entry of the vectors, one for all rows or for each; -1 where there is
    none."""

    w: Tensor
    start: Tensor
    hessian: Tensor
    place: Tensor

    @classmethod
    def of(cls, w: Tensor, start: Tensor, hessian: Tensor, d: int, taps: int, keep: Tensor | None = None) -> "Layer":
        """taps: see `entry_order`. keep: (rows, cols) bool, the entries that are stored."""
        if keep is not None:
            return cls(w, start, hessian, places(keep, d, taps))
        order = entry_order(w.shape[1], taps)
        surplus = -len(order) % d
        return cls(w, start, hessian, torch.nn.functional.pad(order, (0, surplus), value=-1)[None])

    @property
    def blocks(self) -> int:
        """Row blocks with Hessians of their own."""
        return self.hessian.shape[0]

    def entries(self, matrix: Tensor) -> Tensor:
        """(rows, n) of (rows, cols): what the vectors hold, 0 where there is nothing."""
        padded = torch.nn.functional.pad(matrix, (0, 1))
        return padded.gather(1, self._columns(len(matrix)))

    def matrix(self, entries: Tensor) -> Tensor:
        """(rows, cols) of (rows, n), the transpose of `entries`."""
        out = entries.new_zeros(len(entries), self.w.shape[1] + 1)
        return out.scatter(1, self._columns(len(entries)), entries)[:, :-1]

    def _columns(self, rows: int) -> Tensor:
        return torch.where(self.place < 0, self.w.shape[1], self.place).expand(rows, -1)

    def bent(self, d: Tensor) -> Tensor:
        """d H, (rows, cols)."""
        return (d.reshape(self.blocks, -1, d.shape[1]) @ self.hessian).reshape(d.shape)

    def energy(self, d: Tensor) -> Tensor:
        """d_r H d_rᵀ, (rows,)."""
        return (self.bent(d) * d).sum(dim=1)

    def decoded(self, scale: Tensor, codes: Tensor, books: Sequence[Tensor]) -> Tensor:
        """(rows, cols) from scale (rows,) and codes (rows, vectors, books)."""
        words = sum((b.double()[codes[:, :, m].long()] for m, b in enumerate(books)), torch.zeros(()).double())
        return self.matrix(scale[:, None] * words.flatten(1))

    def errors(self, scale: Tensor, codes: Tensor, books: Sequence[Tensor]) -> Tensor:
        """(rows,)."""
        return self.energy(self.decoded(scale, codes, books) - self.w)


def encode(layer: Layer, books: Sequence[Tensor], width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(scale (rows,) exact in `dtype`, codes (rows, vectors, books) int32) of a matrix.

    Args:
        books: (words, d) each, for vectors of a mean square of about 1. width: beginnings of a row that are kept.
    """
    scale = power(layer).to(dtype).double()
    codes = first_codes(layer, scale, books, width)
    codes = descend(layer, scale, books, codes)
    errors = layer.errors(scale, codes, books)
    for _ in range(TURNS):
        new_scale = fitted(layer, scale, books, codes).to(dtype).double()
        new_codes = descend(layer, new_scale, books, codes)
        new_errors = layer.errors(new_scale, new_codes, books)
        better = new_errors < errors
        gained = float((errors - new_errors)[better].sum())
        scale = torch.where(better, new_scale, scale)
        codes = torch.where(better[:, None, None], new_codes, codes)
        whole, errors = float(errors.sum()), torch.where(better, new_errors, errors)
        if gained <= SETTLED * whole:
            break
    return scale, codes


def power(layer: Layer) -> Tensor:
    """The root mean square of what each row stores, (rows,)."""
    count = (layer.place >= 0).sum(dim=1).clamp(min=1)
    return (layer.entries(layer.start).square().sum(dim=1) / count).sqrt()


def fitted(layer: Layer, scale: Tensor, books: Sequence[Tensor], codes: Tensor) -> Tensor:
    """The best scale of every row for its codes, (rows,); the old one where there is no positive one."""
    x = layer.decoded(torch.ones_like(scale), codes, books)
    bent = layer.bent(x)
    own, pulled = (bent * x).sum(dim=1), (bent * layer.w).sum(dim=1)
    return torch.where((own > 0) & (pulled > 0), pulled / own.clamp(min=torch.finfo(own.dtype).tiny), scale)


def first_codes(layer: Layer, scale: Tensor, books: Sequence[Tensor], width: int) -> Tensor:
    """By error feedback; where rows store different entries, the nearest words."""
    rows, cols = layer.w.shape
    vectors = layer.place.shape[1] // books[0].shape[1]
    if len(layer.place) > 1 or (layer.place >= 0).sum() < cols:
        return nearest(layer, scale, books)
    words, starts = _joined(books)
    upper, metrics, inverses = _factored(layer.hessian, layer.place, books[0].shape[1])
    norms = torch.einsum("iw,bvij,jw->bvw", words, metrics, words).contiguous()
    w = layer.entries(layer.start).reshape(layer.blocks, rows // layer.blocks, -1).contiguous()
    parts = (t.numpy() for t in (w, upper, metrics, norms, inverses, _scales(layer, scale, vectors), words))
    codes = feedback_vectors(*parts, starts, width)
    return torch.from_numpy(codes).reshape(rows, vectors, len(books))


def nearest(layer: Layer, scale: Tensor, books: Sequence[Tensor]) -> Tensor:
    """The words nearest to every vector, book after book, each for what the books before it left."""
    rows, d = len(layer.w), books[0].shape[1]
    left = (layer.entries(layer.start) / _nonzero(scale)[:, None]).reshape(-1, d)
    codes = []
    for book in books:
        words = book.double()
        codes.append(nearest_words(left, words).int())
        left = left - words[codes[-1].long()]
    return torch.stack(codes, dim=1).reshape(rows, -1, len(books))


def descend(layer: Layer, scale: Tensor, books: Sequence[Tensor], codes: Tensor, sweeps: int = SWEEPS) -> Tensor:
    """Codes of an error that is not larger, (rows, vectors, books) int32."""
    rows, cols = layer.w.shape
    blocks, vectors = layer.blocks, codes.shape[1]
    words, starts = _joined(books)
    out = codes.reshape(blocks, rows // blocks, vectors, len(books)).clone().contiguous()
    place = layer.place.int()
    place = place.expand(blocks, 1, -1) if len(place) == 1 else place.reshape(blocks, rows // blocks, -1)
    parts = (layer.w.reshape(blocks, -1, cols), layer.hessian, place, _scales(layer, scale, vectors), words)
    w, hessian, columns, scales, entries = (t.contiguous().numpy() for t in parts)
    width = 1 if len(books) == 1 else SEARCH
    descend_vectors(w, hessian, columns, scales, entries, starts, out.numpy(), sweeps, width)
    return out.reshape(codes.shape)


def _joined(books: Sequence[Tensor]) -> tuple[Tensor, np.ndarray]:
    """(d, words) of all books side by side, and where each starts."""
    return torch.cat([b.double() for b in books]).T.contiguous(), np.cumsum([0, *(len(b) for b in books)])


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


def _scales(layer: Layer, scale: Tensor, vectors: int) -> Tensor:
    return _nonzero(scale).reshape(layer.blocks, -1, 1).expand(-1, -1, vectors).contiguous()


def _factored(hessian: Tensor, place: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U (blocks, n, n) with H^-1 = Uᵀ U in the order of the entries, and for every vector (U_bbᵀ U_bb)^-1 and U_bb^-1,
    (blocks, vectors, d, d))."""
    n = place.shape[1]
    order = place[0][place[0] >= 0]
    full = torch.eye(n, dtype=torch.float64).repeat(hessian.shape[0], 1, 1)
    full *= SURPLUS * hessian.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    full[:, : len(order), : len(order)] = hessian[:, order][:, :, order]
    _, factor, _ = damped_cholesky(full, 0.0)
    _, upper = inverse_factor(factor)
    corners = torch.stack([upper[:, i : i + d, i : i + d] for i in range(0, n, d)], dim=1)
    inverses = torch.linalg.inv(corners)
    return upper.contiguous(), (inverses @ inverses.mT).contiguous(), inverses.contiguous()
