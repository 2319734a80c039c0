"""A matrix of vectors from shared books of words (additive quantization: Babenko & Lempitsky, CVPR 2014): every row is
cut into vectors of d entries, and each vector is a scale times the sum of one word of every book.

The entries of a row are taken in the order of the columns, or tap after tap, the channels of a tap side by side. The
last vector of a row may be longer than what is left; its surplus entries mean nothing. Books belong to no matrix alone:
a file holds each once.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from featherweight._pack import pack, packed_size, unpack
from featherweight.errors import FormatError, require
from featherweight.weights.base import FLOATS, Layout, Meta, field, finite, float_name, only, payload_bits

MOST_BITS = 12  # of a code: 4,096 words
LONGEST = 64  # entries of a vector
MOST_BOOKS = 8
PIECE = 1 << 22  # distances that are held at a time


@lru_cache(maxsize=64)
def entry_order(cols: int, taps: int) -> Tensor:
    """(cols,) int64, the columns in the order in which vectors take them. Columns are channels times taps, a channel's
    taps side by side; taps 1 leaves them as they are.

    >>> entry_order(6, 3)
    tensor([0, 3, 1, 4, 2, 5])
    """
    return torch.arange(cols).reshape(cols // taps, taps).T.reshape(-1)


def places(keep: Tensor, d: int, taps: int) -> Tensor:
    """(rows, n) int64, the column of every entry of every vector of a row whose entries outside `keep` (rows, cols) are
    not stored: those that are, in order, then -1 up to whole vectors. n is that of the longest row."""
    order = entry_order(keep.shape[1], taps)
    stored = keep[:, order]
    most = max(-(-int(stored.sum(dim=1).max()) // d), 1) * d if stored.numel() else d
    first = torch.argsort(~stored, dim=1, stable=True)  # the stored ones first, in their order
    first = torch.nn.functional.pad(first, (0, max(most - first.shape[1], 0)))[:, :most]
    left = torch.arange(most) < stored.sum(dim=1, keepdim=True)
    return torch.where(left, order[first], -1)


def nearest_words(x: Tensor, words: Tensor) -> Tensor:
    """For each of (vectors, d) the number of the nearest of (words, d), int64; piece by piece."""
    offset, step = words.square().sum(dim=1), max(PIECE // len(words), 1)
    return torch.cat([(offset - 2 * part @ words.T).argmin(dim=1) for part in x.split(step)])


def vector_counts(keep: Tensor, d: int) -> Tensor:
    """(rows,) int64, the vectors that each row needs."""
    return -(-keep.sum(dim=1) // d)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Codebook:
    """codes: (rows, vectors, books) int16. books: (words, d) each, float16, words a power of two. scale: (rows, 1),
    float16 or float32. cols: of the matrix. taps: 1 for entries in the order of the columns, see `entry_order`. keep:
    (rows, cols) bool, the entries that are stored, or None for all (see Sparse)."""

    kind: ClassVar[str] = "codebook"
    codes: Tensor
    books: tuple[Tensor, ...]
    scale: Tensor
    cols: int
    taps: int = 1
    keep: Tensor | None = None

    def __post_init__(self) -> None:
        require(1 <= len(self.books) <= MOST_BOOKS, f"there must be 1 to {MOST_BOOKS} books", len(self.books))
        for book in self.books:
            same = book.ndim == 2 and book.shape[1] == self.books[0].shape[-1]
            require(same, "books must be (words, d), of one d", tuple(book.shape))
            require(book.dtype in FLOATS.values(), "books must be float16 or float32", book.dtype)
            words = book.shape[0]
            fits = words in [2**n for n in range(1, MOST_BITS + 1)]
            require(fits, f"words must be a power of two from 2 to {2**MOST_BITS}", words)
        require(1 <= self.d <= LONGEST, f"d must be 1 to {LONGEST}", self.d)
        require(self.taps >= 1 and self.cols % self.taps == 0, f"taps must divide {self.cols} columns", self.taps)
        require(self.scale.dtype in FLOATS.values(), "scales must be float16 or float32", self.scale.dtype)
        column = self.scale.ndim == 2 and self.scale.shape[1] == 1
        require(column, "scales must have shape (rows, 1)", tuple(self.scale.shape))
        if self.keep is not None:
            fits = self.keep.dtype == torch.bool and tuple(self.keep.shape) == self.shape
            require(fits, f"keep must be bool {self.shape}", (self.keep.dtype, tuple(self.keep.shape)))
        require(self.codes.dtype == torch.int16, "codes must be int16", self.codes.dtype)
        expected = (self.shape[0], self._vectors(), len(self.books))
        require(tuple(self.codes.shape) == expected, f"codes must have shape {expected}", tuple(self.codes.shape))
        for m, book in enumerate(self.books):
            least, most = (int(x) for x in self.codes[:, :, m].aminmax())
            require(least >= 0 and most < len(book), f"codes of book {m} must be 0 to {len(book) - 1}", (least, most))

    def _vectors(self) -> int:
        if self.keep is None:
            return -(-self.cols // self.d)
        return max(int(vector_counts(self.keep, self.d).max()), 1)

    @property
    def d(self) -> int:
        """Entries of a vector."""
        return self.books[0].shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.scale.shape[0], self.cols

    def dense(self) -> Tensor:
        entries = self.scale.float() * self._sums().flatten(1)
        if self.keep is None and self.taps == 1:
            return entries[:, : self.cols]
        order = entry_order(self.cols, self.taps).to(entries.device)
        if self.keep is None:
            return entries[:, : self.cols][:, order.argsort()]
        stored = self.keep.to(entries.device)[:, order]
        first = torch.arange(entries.shape[1], device=entries.device) < stored.sum(dim=1, keepdim=True)
        out = entries.new_zeros(self.shape).masked_scatter(stored, entries[first])
        return out[:, order.argsort()]

    def nearest(self, matrix: Tensor) -> Tensor:
        """Codes like `codes`, of words nearer to the vectors of a (rows, cols) matrix where there are some: book after
        book, each for what the books before it left."""
        scale = torch.where(self.scale == 0, 1.0, self.scale.float())
        order = entry_order(self.cols, self.taps)
        if self.keep is None:
            entries = torch.nn.functional.pad(matrix[:, order.to(matrix.device)], (0, -self.cols % self.d))
            real = torch.arange(entries.shape[1], device=matrix.device) < self.cols
        else:
            place = places(self.keep, self.d, self.taps).to(matrix.device)
            entries, real = matrix.gather(1, place.clamp(min=0)), place >= 0
        now = self._sums().to(matrix.device)
        wanted = torch.where(real, entries.float() / scale.to(matrix.device), now.flatten(1)).reshape(-1, self.d)
        left, found = wanted, []
        for book in self.books:
            words = book.float().to(matrix.device)
            found.append(nearest_words(left, words))
            left = left - words[found[-1]]
        codes = torch.stack(found, dim=-1).to(torch.int16).reshape(self.codes.shape)
        nearer = left.square().sum(dim=1) < (wanted - now.reshape(-1, self.d)).square().sum(dim=1)
        return torch.where(nearer.reshape(*codes.shape[:2], 1), codes, self.codes.to(codes.device))

    def _sums(self) -> Tensor:
        """(rows, vectors, d), the sums of the words."""
        codes = self.codes.int()
        parts = (torch.nn.functional.embedding(codes[:, :, m], b.float()) for m, b in enumerate(self.books))
        total = next(parts)
        for part in parts:  # in this order: float32 sums are rounded
            total = total + part
        return total

    def bits(self) -> int:
        return payload_bits(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """Codes book after book, each row after row; then the scales."""
        codes = self.codes.flatten(0, 1) if self.keep is None else self.codes[self.stored()]
        payload = {f"codes{m}": pack(codes[:, m], _width(book)) for m, book in enumerate(self.books)}
        return payload | {"scale": self.scale.reshape(-1)}

    def kept(self, keep: Tensor) -> dict[str, Tensor]:
        """The payload beside a mask (see Sparse)."""
        require(
            self.keep is not None and bool((self.keep == keep).all()), "the mask must be that of the codes", "another"
        )
        return self.tensors()

    def stored(self) -> Tensor:
        """(rows, vectors) bool: which codes mean something."""
        rows, vectors, _ = self.codes.shape
        if self.keep is None:
            return torch.ones(rows, vectors, dtype=torch.bool)
        return torch.arange(vectors) < vector_counts(self.keep, self.d)[:, None]

    def meta(self) -> Meta:
        widths = [_width(b) for b in self.books]
        vectors = {} if self.keep is None else {"vectors": int(self.stored().sum())}
        taps = {} if self.taps == 1 else {"taps": self.taps}
        return {"d": self.d, "bits": widths, "type": float_name(self.scale.dtype)} | taps | vectors

    def trainable(self) -> tuple[str, ...]:
        return ("scale", "books")

    @classmethod
    def layout(cls, shape: tuple[int, int], meta: Meta, stored: int | None = None) -> Layout:
        """stored: kept entries beside a mask; the number of vectors is then a field of the metadata."""
        rows, cols = shape
        only(meta, "d", "bits", "taps", "type", *(() if stored is None else ("vectors",)))
        d = field(meta, "d", range(1, LONGEST + 1))
        widths = meta.get("bits")
        if not isinstance(widths, list) or not 1 <= len(widths) <= MOST_BOOKS:
            raise FormatError(f"field 'bits' must be a list of 1 to {MOST_BOOKS} numbers, got {widths!r}")
        for width in widths:
            field({"bits": width}, "bits", range(1, MOST_BITS + 1))
        taps = field({"taps": 1} | meta, "taps", range(1, max(cols, 1) + 1))
        if cols % taps:
            raise FormatError(f"field 'taps' must divide the {cols} columns, got {taps}")
        dtype = FLOATS[field(meta, "type", tuple(FLOATS))]
        least, most = (rows * -(-cols // d),) * 2 if stored is None else (-(-stored // d), stored)
        vectors = least if stored is None else field(meta, "vectors", range(least, most + 1))
        codes: Layout = {f"codes{m}": (torch.uint8, packed_size(vectors, width)) for m, width in enumerate(widths)}
        return codes | {"scale": (dtype, rows)}

    @classmethod
    def load(
        cls,
        shape: tuple[int, int],
        meta: Meta,
        tensors: dict[str, Tensor],
        keep: Tensor | None = None,
    ) -> Self:
        """The books are among the tensors, as book0, book1 and so on."""
        rows, cols = shape
        d, widths = meta["d"], meta["bits"]
        finite(tensors, "scale")
        expected = [(2**width, d) for width in widths]
        books = tuple(tensors[f"book{m}"] for m in range(len(widths)) if f"book{m}" in tensors)
        if [tuple(t.shape) for t in books] != expected:
            raise FormatError(f"it needs books of (words, d) {expected}, got {[tuple(t.shape) for t in books]}")
        finite(tensors, *(f"book{m}" for m in range(len(widths))))
        counts = torch.full((rows,), -(-cols // d)) if keep is None else vector_counts(keep, d)
        if keep is not None and int(counts.sum()) != meta["vectors"]:
            raise FormatError(f"the mask needs {int(counts.sum())} vectors, the header says {meta['vectors']}")
        try:
            flat = [unpack(tensors[f"codes{m}"], w, int(counts.sum())).to(torch.int16) for m, w in enumerate(widths)]
        except ValueError as error:
            raise FormatError(str(error)) from None
        if keep is None:
            codes = torch.stack(flat, dim=-1).reshape(rows, -1, len(widths))
        else:
            stored = torch.arange(max(int(counts.max()), 1)) < counts[:, None]
            codes = torch.zeros(*stored.shape, len(widths), dtype=torch.int16)
            for m, own in enumerate(flat):
                codes[:, :, m][stored] = own
        return cls(codes, books, tensors["scale"].reshape(rows, 1), cols, meta.get("taps", 1), keep)


def _width(book: Tensor) -> int:
    """Bits of a code of this book."""
    return (book.shape[0] - 1).bit_length()
