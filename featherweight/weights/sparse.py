"""A matrix with zeros: a bitmask of the kept entries, and a Dense or Grid matrix of which only those are stored."""

from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from featherweight._pack import pack, packed_size, unpack
from featherweight.errors import FormatError, require
from featherweight.weights.base import Layout, Meta, field, payload_bits
from featherweight.weights.dense import Dense
from featherweight.weights.grid import Grid

_VALUES: dict[str, type[Dense] | type[Grid]] = {Dense.kind: Dense, Grid.kind: Grid}


@final
@dataclass(frozen=True, slots=True, eq=False)
class Sparse:
    """mask: (rows, cols) bool, true where an entry is kept. values: the kept entries; elsewhere it is ignored."""

    kind: ClassVar[str] = "sparse"
    mask: Tensor
    values: Dense | Grid

    def __post_init__(self) -> None:
        require(self.mask.dtype == torch.bool, "the mask must be bool", self.mask.dtype)
        require(tuple(self.mask.shape) == self.values.shape, f"the mask must be {self.values.shape}", self.mask.shape)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape

    def dense(self) -> Tensor:
        return torch.where(self.mask, self.values.dense(), 0.0)

    def bits(self) -> int:
        return payload_bits(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        return {"mask": pack(self.mask, 1)} | self.values.kept(self.mask)

    def meta(self) -> Meta:
        return {"kept": int(self.mask.sum()), "values": self.values.kind} | self.values.meta()

    def trainable(self) -> tuple[str, ...]:
        return self.values.trainable()

    @classmethod
    def layout(cls, shape: tuple[int, int], meta: Meta) -> Layout:
        kept = field(meta, "kept", range(shape[0] * shape[1] + 1))
        values = _VALUES[field(meta, "values", tuple(_VALUES))]
        inner = {k: v for k, v in meta.items() if k not in ("kept", "values")}
        return {"mask": (torch.uint8, packed_size(shape[0] * shape[1], 1))} | values.layout(shape, inner, stored=kept)

    @classmethod
    def load(cls, shape: tuple[int, int], meta: Meta, tensors: dict[str, Tensor]) -> Self:
        try:
            mask = unpack(tensors["mask"], 1, shape[0] * shape[1]).bool().reshape(shape)
        except ValueError as error:
            raise FormatError(str(error)) from None
        if int(mask.sum()) != meta["kept"]:
            raise FormatError(f"the mask keeps {int(mask.sum())} entries, the header says {meta['kept']}")
        inner = {k: v for k, v in meta.items() if k not in ("kept", "values")}
        return cls(mask, _VALUES[meta["values"]].load(shape, inner, tensors, keep=mask))
