"""A matrix with zeros: a mask of the kept entries, and a matrix of another kind of which only those are stored."""

from dataclasses import dataclass
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from featherweight.errors import FormatError, require
from featherweight.weights.base import Layout, Meta, field, only, payload_bits
from featherweight.weights.codebook import Codebook
from featherweight.weights.dense import Dense
from featherweight.weights.grid import Grid
from featherweight.weights.masks import MASKS, AnyMask, Bitmap

BITMAP = Bitmap()
_VALUES: dict[str, type[Dense] | type[Grid] | type[Codebook]] = {k.kind: k for k in (Dense, Grid, Codebook)}


@final
@dataclass(frozen=True, slots=True, eq=False)
class Sparse:
    """mask: (rows, cols) bool, true where an entry is kept. values: the kept entries; elsewhere it is ignored. form:
    how the mask is stored."""

    kind: ClassVar[str] = "sparse"
    mask: Tensor
    values: Dense | Grid | Codebook
    form: AnyMask = BITMAP

    def __post_init__(self) -> None:
        require(self.mask.dtype == torch.bool, "the mask must be bool", self.mask.dtype)
        require(tuple(self.mask.shape) == self.values.shape, f"the mask must be {self.values.shape}", self.mask.shape)
        if isinstance(self.values, Codebook):
            own = self.values.keep
            same = own is not None and torch.equal(own, self.mask)
            require(same, "codes of vectors must be those of the kept entries", "another or no mask")

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape

    def dense(self) -> Tensor:
        return torch.where(self.mask, self.values.dense(), 0.0)

    def bits(self) -> int:
        return payload_bits(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        return {"mask": self.form.encode(self.mask)} | self.values.kept(self.mask)

    def meta(self) -> Meta:
        form = {} if isinstance(self.form, Bitmap) else {"mask": {"kind": self.form.kind} | self.form.meta()}
        return {"kept": int(self.mask.sum())} | form | {"values": self.values.kind} | self.values.meta()

    def trainable(self) -> tuple[str, ...]:
        return self.values.trainable()

    @classmethod
    def layout(cls, shape: tuple[int, int], meta: Meta) -> Layout:
        kept = field(meta, "kept", range(shape[0] * shape[1] + 1))
        values = _VALUES[field(meta, "values", tuple(_VALUES))]
        size = _form(shape, meta).size(shape)
        return {"mask": (torch.uint8, size)} | values.layout(shape, inner(meta), stored=kept)

    @classmethod
    def load(cls, shape: tuple[int, int], meta: Meta, tensors: dict[str, Tensor]) -> Self:
        mask, form = cls.mask_of(shape, meta, tensors["mask"]), _form(shape, meta)
        return cls(mask, _VALUES[meta["values"]].load(shape, inner(meta), tensors, keep=mask), form)

    @staticmethod
    def mask_of(shape: tuple[int, int], meta: Meta, packed: Tensor) -> Tensor:
        """The mask.

        Raises:
            FormatError: no mask is packed like that, or it keeps another number of entries.
        """
        mask = _form(shape, meta).decode(packed, shape)
        if int(mask.sum()) != meta["kept"]:
            raise FormatError(f"the mask keeps {int(mask.sum())} entries, the header says {meta['kept']}")
        return mask


def inner(meta: Meta) -> Meta:
    """The fields of the values."""
    return {k: v for k, v in meta.items() if k not in ("kept", "mask", "values")}


def _form(shape: tuple[int, int], meta: Meta) -> AnyMask:
    """How the mask is stored; a bit an entry where nothing is said."""
    if "mask" not in meta:
        return BITMAP
    own = meta["mask"]
    if not isinstance(own, dict) or own.get("kind") not in tuple(MASKS):
        raise FormatError(f"field 'mask' must be an object with a kind of {list(MASKS)}, got {own!r}")
    try:
        form = MASKS[own["kind"]].load(own, shape)
        only(own, "kind", *form.meta())
    except FormatError as error:
        raise FormatError(f"field 'mask': {error}") from None
    return form
