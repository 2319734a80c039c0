"""The grid that a quantizer rounds to: chosen from the dense weights before any weight is rounded.

Scale search as in Optimal Brain Compression (2208.11580) and GPTQ: per group, shrink the range of the weights in steps
and keep the shrink with the smallest sum |round(w) - w|^p. Differences: (1) scales are rounded to the type they are
stored in before anything is rounded to them, so codes never compensate for a scale that is not in the file; (2) each
weight's error counts with the second moment of its input, the diagonal of the layer's Hessian.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from featherweight.errors import require
from featherweight.methods._rounding import best_grid
from featherweight.weights import Grid
from featherweight.weights.base import float_type
from featherweight.weights.grid import per_entry, scale_shape, symmetric_zero

STEPS = 80  # shrinks tried: 1.00, 0.99 ... 0.21
SEARCH = 15 * STEPS  # multiply-adds that the search takes for one weight, counted as the time it takes


@final
@dataclass(frozen=True, slots=True)
class GridSpec:
    """bits: 1 to 8. symmetric: no zero point. group: None for one scale a row, 0 for one scale a matrix, n for one
    scale per row and n columns."""

    bits: int
    symmetric: bool = False
    group: int | None = None

    def __post_init__(self) -> None:
        require(type(self.bits) is int and 1 <= self.bits <= 8, "bits must be a whole number from 1 to 8", self.bits)
        require(
            self.group is None or (type(self.group) is int and self.group >= 0),
            "group must be 0 (whole matrix) or a number of columns",
            self.group,
        )

    @property
    def label(self) -> str:
        group = "" if self.group is None else " per tensor" if self.group == 0 else f" group {self.group}"
        return f"{self.bits} bit{' sym' if self.symmetric else ''}{group}"

    def columns(self, cols: int) -> int:
        """The `group` of Grid for a matrix of `cols` columns."""
        return cols if self.group is None else min(self.group, cols)

    def storage(self, shape: tuple[int, int], stored: int | None = None) -> int:
        """Bytes of a (rows, cols) matrix on this grid, with fp16 scales, when `stored` of its codes are kept."""
        meta = {"bits": self.bits, "group": self.columns(shape[1]), "sym": int(self.symmetric), "type": "f16"}
        return sum(n * t.itemsize for t, n in Grid.layout(shape, meta, stored).values())


@final
@dataclass(frozen=True, slots=True, eq=False)
class Points:
    """A chosen grid for a (rows, cols) matrix: scale (scale_shape) in its stored type, zero likewise or None."""

    spec: GridSpec
    shape: tuple[int, int]
    scale: Tensor
    zero: Tensor | None

    def entries(self) -> tuple[Tensor, Tensor]:
        """Scale and zero of every entry, (rows, cols) float64."""
        group = self.spec.columns(self.shape[1])
        scale = per_entry(self.scale.double(), self.shape, group)
        if self.zero is None:
            return scale, torch.full_like(scale, symmetric_zero(self.spec.bits))
        return scale, per_entry(self.zero.double(), self.shape, group)

    def round(self, w: Tensor) -> Tensor:
        """Codes of the nearest points, uint8."""
        scale, zero = self.entries()
        return torch.clamp(torch.round(w / scale + zero), 0, 2**self.spec.bits - 1).to(torch.uint8)

    def grid(self, codes: Tensor) -> Grid:
        return Grid(codes, self.scale, self.zero, self.spec.bits, self.spec.columns(self.shape[1]))


def choose(w: Tensor, spec: GridSpec, importance: Tensor | None = None, keep: Tensor | None = None) -> Points:
    """The grid with the smallest weighted rounding error in every group.

    Args:
        w: (rows, cols). importance: (rows, cols) or (1, cols), what a squared error counts; None counts all equal.
        keep: (rows, cols) bool; entries that will not be stored do not count.
    """
    shape = (w.shape[0], w.shape[1])
    group = spec.columns(shape[1])
    weight = torch.ones_like(w) if importance is None else importance.to(w).expand_as(w).clone()
    weight += weight.mean() * 1e-6 + 1e-30  # a column without input still needs a sane scale
    if keep is not None:
        w, weight = torch.where(keep, w, 0.0), torch.where(keep, weight, 0.0)
    grouped, counts = _grouped(w, shape, group), _grouped(weight, shape, group)
    low, high = grouped.amin(dim=-1).clamp(max=0), grouped.amax(dim=-1).clamp(min=0)
    levels = 2**spec.bits - 1
    if spec.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    dtype = float_type(((high - low) / levels).reshape(-1))
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # what a group of zeros gets
    shrinks = 1 - torch.arange(STEPS, dtype=torch.float64) / 100
    scales = ((high - low)[:, None] * shrinks / levels).to(dtype).double().clamp(min=smallest)
    if spec.symmetric:
        zeros = torch.full_like(scales, symmetric_zero(spec.bits))
    else:
        zeros = torch.round(-low[:, None] * shrinks / scales).clamp(0, levels)
    values, importances, tried, offsets = (t.contiguous().numpy() for t in (grouped, counts, scales, zeros))
    best = torch.from_numpy(best_grid(values, importances, tried, offsets, float(levels)))[:, None]
    scale, zero = scales.gather(1, best), zeros.gather(1, best)
    return Points(
        spec,
        shape,
        scale.reshape(scale_shape(shape, group)).to(dtype),
        None if spec.symmetric else zero.reshape(scale_shape(shape, group)).to(torch.uint8),
    )


def _grouped(w: Tensor, shape: tuple[int, int], group: int) -> Tensor:
    """(groups, entries), short last groups filled with zeros (which lie on every grid)."""
    if group == 0:
        return w.reshape(1, -1)
    groups = scale_shape(shape, group)[1]
    return torch.nn.functional.pad(w, (0, groups * group - shape[1])).reshape(-1, group)
