"""How a weight matrix is stored."""

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
