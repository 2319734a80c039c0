"""A matrix stored as plain numbers, fp32 or fp16."""

from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from featherweight.errors import require
from featherweight.weights.base import FLOATS, Layout, Meta, field, float_name, only, payload_bits


@final
@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """values: (rows, cols), float16 or float32."""

    kind: ClassVar[str] = "dense"
    values: Tensor

    def __post_init__(self) -> None:
        require(self.values.dtype in FLOATS.values(), "dense values must be float16 or float32", self.values.dtype)
        require(self.values.ndim == 2, "dense values must be a matrix", tuple(self.values.shape))

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.values.shape
        return rows, cols

    def dense(self) -> Tensor:
        return self.values.float()

    def bits(self) -> int:
        return payload_bits(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values.reshape(-1)}

    def kept(self, keep: Tensor) -> dict[str, Tensor]:
        """The payload when only the entries where `keep` is true are stored (see Sparse)."""
        return {"values": self.values[keep]}

    def meta(self) -> Meta:
        return {"type": float_name(self.values.dtype)}

    def trainable(self) -> tuple[str, ...]:
        return ("values",)

    @classmethod
    def layout(cls, shape: tuple[int, int], meta: Meta, stored: int | None = None) -> Layout:
        only(meta, "type")
        dtype = FLOATS[field(meta, "type", tuple(FLOATS))]
        return {"values": (dtype, shape[0] * shape[1] if stored is None else stored)}

    @classmethod
    def load(cls, shape: tuple[int, int], meta: Meta, tensors: dict[str, Tensor], keep: Tensor | None = None) -> Self:
        values = tensors["values"]
        if keep is None:
            return cls(values.reshape(shape))
        full = torch.zeros(shape, dtype=values.dtype)
        full[keep] = values
        return cls(full)
