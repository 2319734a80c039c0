"""How a weight matrix is stored."""

from featherweight.weights.base import Weight as Weight
from featherweight.weights.dense import Dense as Dense
from featherweight.weights.grid import Grid as Grid
from featherweight.weights.sparse import Sparse as Sparse

KINDS: tuple[type[Weight], ...] = (Dense, Grid, Sparse)
