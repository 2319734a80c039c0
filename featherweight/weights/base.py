"""What every stored form of a weight matrix offers, and the reading helpers they share."""

from typing import Any, ClassVar, Protocol, Self, TypeAlias

import torch
from torch import Tensor

from featherweight.errors import FormatError

Meta: TypeAlias = dict[str, Any]  # JSON values only
Layout: TypeAlias = dict[str, tuple[torch.dtype, int]]  # field -> element type and element count, in file order


class Weight(Protocol):
    """How one weight matrix (rows = outputs, cols = inputs) is stored. Immutable; not a tensor subclass."""

    kind: ClassVar[str]
    """The tag in the file. Never renamed, never reused."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the matrix."""
        ...

    def dense(self) -> Tensor:
        """Decode to float32 (rows, cols). This defines what the stored data mean."""
        ...

    def bits(self) -> int:
        """Exact payload in bits: 8 times the bytes that `tensors()` adds to a file."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The payload: flat vectors, in the order and with the sizes that `layout` gives."""
        ...

    def meta(self) -> Meta:
        """Everything else that decoding needs, as JSON values, without the shape."""
        ...

    def trainable(self) -> tuple[str, ...]:
        """Names of the continuous tensors: those among `tensors()`, and books, which several weights may share."""
        ...

    @classmethod
    def layout(cls, shape: tuple[int, int], meta: Meta) -> Layout:
        """Type and element count of every payload field, from the shape and the metadata alone.

        Raises:
            FormatError: the metadata are not valid for this kind.
        """
        ...

    @classmethod
    def load(cls, shape: tuple[int, int], meta: Meta, tensors: dict[str, Tensor]) -> Self:
        """Rebuild from a payload whose fields have the sizes of `layout`.

        Raises:
            FormatError: a field holds values that this kind cannot hold.
        """
        ...


def payload_bits(tensors: dict[str, Tensor]) -> int:
    return 8 * sum(t.numel() * t.element_size() for t in tensors.values())


FLOATS = {"f16": torch.float16, "f32": torch.float32}


def float_name(dtype: torch.dtype) -> str:
    return {torch.float16: "f16", torch.float32: "f32"}[dtype]


def field(meta: Meta, name: str, allowed: range | tuple[Any, ...]) -> Any:
    """A metadata field that must be one of `allowed` (a range of integers, or the values themselves)."""
    value = meta.get(name)
    if type(value) is not type(allowed[0]) or value not in allowed:  # 1.0 and True are equal to 1, but not integers
        what = f"{allowed.start} to {allowed.stop - 1}" if isinstance(allowed, range) else f"one of {list(allowed)}"
        raise FormatError(f"field '{name}' must be {what}, got {value!r}")
    return value


def only(meta: Meta, *names: str) -> None:
    """Refuse metadata fields that this kind does not know: a later version may mean something by them."""
    extra = sorted(set(meta) - set(names))
    if extra:
        raise FormatError(f"unknown metadata fields {extra}; expected only {sorted(names)}")


def finite(tensors: dict[str, Tensor], *names: str) -> None:
    for name in names:
        if name in tensors and not torch.isfinite(tensors[name]).all():
            raise FormatError(f"field '{name}' holds NaN or infinite values")


def float_type(values: Tensor) -> torch.dtype:
    """float16 where that is exact enough for every value: relative error at most 2**-11 (rounding), plus 2**-14 of the
    largest magnitude for the tiny ones. float32 elsewhere, so an overflow never passes."""
    if values.numel() == 0:
        return torch.float16
    exact = values.detach().double()
    lost = (exact.half().double() - exact).abs()
    allowed = exact.abs() * 2**-11 + exact.abs().amax() * 2**-14
    return torch.float16 if bool((lost <= allowed).all()) else torch.float32  # inf - x and NaN compare false
