"""Stored weights as modules whose decoding torch can trace: plain buffers, and a few operations of torch on them.

Codes have a byte each, their zero point taken off: a program is a zip archive, whose deflate packs them about as well
as bits would, and reading them takes no operation. What is computed, and in which order, is as `Weight.dense` has it,
so that decoded weights are the same to the last bit.
"""

from typing import final

import torch
from torch import Tensor, nn

from featherweight.artifact import StoredUnit
from featherweight.layers import View
from featherweight.weights import Codebook, Dense, Factors, Grid, Sparse, Weight
from featherweight.weights.codebook import entry_order
from featherweight.weights.factors import contracted
from featherweight.weights.grid import symmetric_zero

Memory = dict[int, nn.Module]  # what weights share, by the identity of the book or factor


@final
class Decoder(nn.Module):
    """Decodes a parameter, to the type that it had. matrix: decodes its matrix."""

    def __init__(self, matrix: nn.Module, view: View, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix, self.view, self.dtype = matrix, view, dtype

    def forward(self) -> Tensor:
        tensor = self.view.tensor(self.matrix())
        return tensor if self.dtype == torch.float32 else tensor.to(self.dtype)


def decoder(unit: StoredUnit, like: Tensor, memory: Memory) -> Decoder | None:
    """A module that decodes a weight to the type of `like`, or None where the weight is not smaller than decoded.
    memory: of one network; it keeps what several of its weights have in common."""
    matrix = _matrix(unit.weight, memory)
    return None if matrix is None else Decoder(matrix, unit.view, like.dtype).to(like.device)


def _matrix(weight: Weight, memory: Memory) -> nn.Module | None:
    match weight:
        case Dense(values=values):
            return _Floats(values) if values.dtype == torch.float16 else None
        case Grid():
            return _Grid(weight)
        case Codebook():
            return _Vectors(weight, memory)
        case Sparse(values=Grid() as grid):
            return _Grid(grid, weight.mask)
        case Sparse(values=Dense() as kept):
            return _Kept(kept, weight.mask)
        case Sparse(values=Codebook() as vectors):
            return _Vectors(vectors, memory)
        case Factors():
            parts = [
                memory.setdefault(id(p), _part(p)) if k in weight.shared else _part(p)
                for k, p in enumerate(weight.parts)
            ]
            return _Contraction(weight, parts)
    return None


def _part(factor: Dense | Grid) -> nn.Module:
    return _Grid(factor) if isinstance(factor, Grid) else _Floats(factor.values)


@final
class _Floats(nn.Module):
    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values.clone())

    def forward(self) -> Tensor:
        return self.values.float()


@final
class _Grid(nn.Module):
    """levels: (rows, cols) int8, or int16 where zero points of 8 bits need it, cols filled up to whole groups."""

    levels: Tensor
    scale: Tensor

    def __init__(self, grid: Grid, mask: Tensor | None = None) -> None:
        super().__init__()
        rows, cols = grid.shape
        self.cols, self.group = cols, grid.group if 0 < grid.group < cols else 0
        zero = torch.full_like(grid.scale, symmetric_zero(grid.nbits)) if grid.zero is None else grid.zero
        double = 2 if grid.zero is None and grid.nbits == 1 else 1  # its zero point is a half
        pad = -cols % self.group if self.group else 0
        codes = (
            nn.functional.pad(grid.codes, (0, pad)).reshape(rows, grid.scale.shape[1], -1) if grid.group else grid.codes
        )
        offset = zero.float()[..., None] if grid.group else zero.float()
        levels = (codes.float() - offset).reshape(rows, -1)[:, : cols + pad] * double
        levels = levels if mask is None else levels * nn.functional.pad(mask, (0, pad))
        small = bool(levels.abs().max() < 128)
        self.register_buffer("levels", levels.to(torch.int8 if small else torch.int16))
        scale = grid.scale.float() / double
        half = grid.scale.dtype == torch.float16 and torch.equal(scale.half().float(), scale)
        self.register_buffer("scale", scale.half() if half else scale)

    def forward(self) -> Tensor:
        levels, scale = self.levels.float(), self.scale.float()
        if not self.group:
            return levels * scale
        rows = levels.shape[0]
        return (levels.reshape(rows, -1, self.group) * scale[..., None]).reshape(rows, -1)[:, : self.cols]


@final
class _Kept(nn.Module):
    """kept: uint8, 1 where an entry is kept; values: of these, row-major."""

    kept: Tensor
    values: Tensor

    def __init__(self, dense: Dense, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", mask.to(torch.uint8))
        self.register_buffer("values", dense.values[mask])

    def forward(self) -> Tensor:
        empty = torch.zeros(self.kept.shape, dtype=torch.float32, device=self.kept.device)
        return empty.masked_scatter(self.kept.bool(), self.values.float())


@final
class _Vectors(nn.Module):
    """codes0 ...: (rows, vectors), uint8 where a book has 256 words at most. books: modules that several weights share.
    kept: uint8 (rows, cols), 1 where an entry is kept, in the order of the vectors' entries, or None for all."""

    scale: Tensor

    def __init__(self, weight: Codebook, memory: Memory) -> None:
        super().__init__()
        self.cols, self.taps = weight.cols, weight.taps
        for m, book in enumerate(weight.books):
            codes = weight.codes[..., m]
            self.register_buffer(f"codes{m}", codes.to(torch.uint8) if len(book) <= 256 else codes.clone())
        self.books = nn.ModuleList(memory.setdefault(id(book), _Floats(book)) for book in weight.books)
        self.register_buffer("scale", weight.scale.clone())
        order = entry_order(weight.cols, weight.taps)
        self.kept: Tensor | None
        self.register_buffer("kept", None if weight.keep is None else weight.keep[:, order].to(torch.uint8))

    def forward(self) -> Tensor:
        total: Tensor | None = None
        for m, book in enumerate(self.books):
            words = nn.functional.embedding(self._buffers[f"codes{m}"].int(), book())  # pyright: ignore
            total = words if total is None else total + words
        assert total is not None
        rows = total.shape[0]
        entries = total.reshape(rows, -1)
        if self.kept is None:
            entries = entries[:, : self.cols]
        else:
            number = self.kept.int().cumsum(1) - 1  # of a kept entry among those of its row
            entries = entries.gather(1, number.clamp(min=0)) * self.kept
        if self.taps > 1:  # they are tap after tap
            entries = entries.reshape(rows, self.taps, -1).transpose(1, 2).reshape(rows, -1)
        return self.scale.float() * entries


@final
class _Contraction(nn.Module):
    def __init__(self, weight: Factors, parts: list[nn.Module]) -> None:
        super().__init__()
        self.shape, self.axes, self.terms = weight.shape, weight.axes, weight.terms
        self.sizes = dict(weight.sizes)
        self.parts = nn.ModuleList(parts)

    def forward(self) -> Tensor:
        operands = [
            (term, part().reshape([self.sizes[x] for x in term]).double())
            for term, part in zip(self.terms, self.parts, strict=True)
        ]
        return contracted(operands, self.axes).reshape(self.shape).float()
