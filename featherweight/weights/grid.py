"""A matrix on a uniform grid of 1 to 8 bits: w = scale * (code - zero).

Granularity by `group`: 0 is one scale for the whole matrix, cols is one scale per row, anything between is one scale
per row and group of that many columns (the last group may be shorter).
"""

from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from featherweight._pack import pack, packed_size, unpack
from featherweight.errors import FormatError, require
from featherweight.weights.base import FLOATS, Layout, Meta, field, finite, float_name, only, payload_bits


def scale_shape(shape: tuple[int, int], group: int) -> tuple[int, int]:
    """Shape of the scales of a (rows, cols) matrix.

    >>> scale_shape((16, 100), group=32)
    (16, 4)
    """
    rows, cols = shape
    return (1, 1) if group == 0 else (rows, -(-cols // group))


def per_entry(scales: Tensor, shape: tuple[int, int], group: int) -> Tensor:
    """Repeat per-group values (…, scale_shape) to one value per matrix entry, as a view where possible."""
    rows, cols = shape
    if scales.shape[1] == 1:
        return scales.expand(rows, cols)
    return scales.repeat_interleave(group, dim=1)[:, :cols]


def symmetric_zero(bits: int) -> float:
    """The zero point of a symmetric grid: the middle code, so that 0 is on the grid; between the two codes at 1 bit."""
    return 0.5 if bits == 1 else float(2 ** (bits - 1))


@final
@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """codes: (rows, cols) uint8 below 2**bits. scale: scale_shape, float16 or float32. zero: like scale, uint8 below
    2**bits, or None for a symmetric grid."""

    kind: ClassVar[str] = "grid"
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    nbits: int
    group: int

    def __post_init__(self) -> None:
        require(1 <= self.nbits <= 8, "bits must be 1 to 8", self.nbits)
        require(0 <= self.group <= max(self.shape[1], 1), "group must be 0 to the number of columns", self.group)
        require(self.codes.dtype == torch.uint8, "codes must be uint8", self.codes.dtype)
        require(int(self.codes.max()) < 2**self.nbits, f"codes must be below {2**self.nbits}", int(self.codes.max()))
        require(self.scale.dtype in FLOATS.values(), "scales must be float16 or float32", self.scale.dtype)
        expected = scale_shape(self.shape, self.group)
        require(tuple(self.scale.shape) == expected, f"scales must have shape {expected}", tuple(self.scale.shape))
        if self.zero is not None:
            require(tuple(self.zero.shape) == expected, f"zeros must have shape {expected}", tuple(self.zero.shape))
            require(self.zero.dtype == torch.uint8, "zeros must be uint8", self.zero.dtype)
            require(int(self.zero.max()) < 2**self.nbits, f"zeros must be below {2**self.nbits}", int(self.zero.max()))

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.codes.shape
        return rows, cols

    def dense(self) -> Tensor:
        scale = per_entry(self.scale.float(), self.shape, self.group)
        if self.zero is None:
            return scale * (self.codes.float() - symmetric_zero(self.nbits))
        return scale * (self.codes.float() - per_entry(self.zero.float(), self.shape, self.group))

    def nearest(self, matrix: Tensor) -> Tensor:
        """Codes like `codes`, of the points nearest to the entries of a (rows, cols) matrix; where the scale is 0, the
        same as before."""
        scale = per_entry(self.scale.float(), self.shape, self.group).to(matrix.device)
        zero = symmetric_zero(self.nbits) if self.zero is None else per_entry(self.zero.float(), self.shape, self.group)
        zero = zero.to(matrix.device) if isinstance(zero, Tensor) else zero
        codes = (matrix.float() / torch.where(scale == 0, 1.0, scale) + zero).round().clamp(0, 2**self.nbits - 1)
        return torch.where(scale == 0, self.codes.to(matrix.device), codes.to(torch.uint8))

    def bits(self) -> int:
        return payload_bits(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        return self.kept(torch.ones(self.shape, dtype=torch.bool))

    def kept(self, keep: Tensor) -> dict[str, Tensor]:
        """The payload when only the codes where `keep` is true are stored (see Sparse)."""
        payload = {"codes": pack(self.codes[keep], self.nbits), "scale": self.scale.reshape(-1)}
        if self.zero is not None:
            payload["zero"] = pack(self.zero, self.nbits)
        return payload

    def meta(self) -> Meta:
        return {
            "bits": self.nbits,
            "group": self.group,
            "sym": int(self.zero is None),
            "type": float_name(self.scale.dtype),
        }

    def trainable(self) -> tuple[str, ...]:
        return ("scale",)

    @classmethod
    def layout(cls, shape: tuple[int, int], meta: Meta, stored: int | None = None) -> Layout:
        only(meta, "bits", "group", "sym", "type")
        bits = field(meta, "bits", range(1, 9))
        group = field(meta, "group", range(max(shape[1], 1) + 1))
        scales = scale_shape(shape, group)[0] * scale_shape(shape, group)[1]
        count = shape[0] * shape[1] if stored is None else stored
        fields: Layout = {
            "codes": (torch.uint8, packed_size(count, bits)),
            "scale": (FLOATS[field(meta, "type", tuple(FLOATS))], scales),
        }
        if not field(meta, "sym", (0, 1)):
            fields["zero"] = (torch.uint8, packed_size(scales, bits))
        return fields

    @classmethod
    def load(cls, shape: tuple[int, int], meta: Meta, tensors: dict[str, Tensor], keep: Tensor | None = None) -> Self:
        bits, group = meta["bits"], meta["group"]
        finite(tensors, "scale")
        scales = scale_shape(shape, group)
        count = shape[0] * shape[1] if keep is None else int(keep.sum())
        try:
            codes = unpack(tensors["codes"], bits, count)
            zero = unpack(tensors["zero"], bits, scales[0] * scales[1]).reshape(scales) if not meta["sym"] else None
        except ValueError as error:
            raise FormatError(str(error)) from None
        if keep is not None:
            codes = torch.zeros(shape, dtype=torch.uint8).masked_scatter_(keep, codes)
        return cls(codes.reshape(shape), tensors["scale"].reshape(scales), zero, bits, group)
