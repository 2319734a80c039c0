"""How a weight matrix is stored."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from featherweight.weights.base import Weight as Weight
from featherweight.weights.codebook import Codebook as Codebook
from featherweight.weights.dense import Dense as Dense
from featherweight.weights.factors import Factor as Factor
from featherweight.weights.factors import Factors as Factors
from featherweight.weights.grid import Grid as Grid
from featherweight.weights.sparse import Sparse as Sparse

KINDS: tuple[type[Weight], ...] = (Dense, Grid, Sparse, Codebook, Factors)


def vectors_of(weight: Weight) -> Codebook | None:
    """The weight, or the values of a sparse one, where they are made of vectors from books."""
    inner = weight.values if isinstance(weight, Sparse) else weight
    return inner if isinstance(inner, Codebook) else None


def coded_of(weight: Weight) -> Codebook | Grid | None:
    """The weight, or the values of a sparse one, where they have codes."""
    inner = weight.values if isinstance(weight, Sparse) else weight
    return inner if isinstance(inner, Codebook | Grid) else None


def books_of(weight: Weight) -> tuple[Tensor, ...]:
    """The tensors of a weight that other weights may share, which `tensors()` leaves out."""
    inner = vectors_of(weight)
    return () if inner is None else inner.books


def shared_factors(weight: Weight) -> tuple[Factor, ...]:
    """The factors of a weight that other weights may hold, too, which `tensors()` leaves out."""
    return tuple(weight.parts[k] for k in sorted(weight.shared)) if isinstance(weight, Factors) else ()


def united(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """The same weights, books of equal contents being the same tensors, shared factors the same objects."""
    known: dict[tuple[object, ...], Tensor] = {}
    factors: dict[tuple[object, ...], Factor] = {}

    def same(inner: Codebook) -> Codebook:
        keys = [(tuple(b.shape), b.dtype, b.contiguous().numpy().tobytes()) for b in inner.books]
        return replace(inner, books=tuple(known.setdefault(k, b) for k, b in zip(keys, inner.books, strict=True)))

    def one(part: Factor) -> Factor:
        key = (
            part.shape,
            part.kind,
            str(part.meta()),
            *(t.contiguous().numpy().tobytes() for t in part.tensors().values()),
        )
        return factors.setdefault(key, part)

    def put(weight: Weight) -> Weight:
        match weight:
            case Factors(shared=(_, *_)):
                parts = tuple(one(p) if k in weight.shared else p for k, p in enumerate(weight.parts))
                return replace(weight, parts=parts)
            case Codebook():
                return same(weight)
            case Sparse(values=Codebook() as inner):
                return replace(weight, values=same(inner))
        return weight

    return {name: put(weight) for name, weight in weights.items()}
