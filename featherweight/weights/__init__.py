"""How a weight matrix is stored."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from featherweight.weights.base import Weight as Weight
from featherweight.weights.codebook import Codebook as Codebook
from featherweight.weights.dense import Dense as Dense
from featherweight.weights.grid import Grid as Grid
from featherweight.weights.sparse import Sparse as Sparse

KINDS: tuple[type[Weight], ...] = (Dense, Grid, Sparse, Codebook)


def books_of(weight: Weight) -> tuple[Tensor, ...]:
    """The tensors of a weight that other weights may share, which `tensors()` leaves out."""
    inner = weight.values if isinstance(weight, Sparse) else weight
    return inner.books if isinstance(inner, Codebook) else ()


def united(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The same weights, books of equal contents being the same tensors."""
    known: dict[tuple[object, ...], Tensor] = {}

    def same(inner: Codebook) -> Codebook:
        keys = [(tuple(b.shape), b.dtype, b.contiguous().numpy().tobytes()) for b in inner.books]
        return replace(inner, books=tuple(known.setdefault(k, b) for k, b in zip(keys, inner.books, strict=True)))

    def put(weight: Weight) -> Weight:
        match weight:
            case Codebook():
                return same(weight)
            case Sparse(values=Codebook() as inner):
                return replace(weight, values=same(inner))
        return weight

    return {name: put(weight) for name, weight in weights.items()}
