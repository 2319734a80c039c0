"""Round every weight to the nearest point of its grid; the grid is chosen by a search over ranges. Needs no data."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from featherweight.methods.base import Solution, status_of
from featherweight.methods.grids import SEARCH, GridSpec, choose
from featherweight.stats import LayerStats


@final
@dataclass(frozen=True, slots=True)
class Rtn:
    """Round to nearest. The baseline of every other quantizer."""

    name: ClassVar[str] = "rtn"
    grid: GridSpec

    @property
    def label(self) -> str:
        return f"rtn {self.grid.label}"

    def solve(self, w: Tensor, stats: LayerStats) -> Solution:
        points = choose(w.double(), self.grid)
        return Solution.of(points.grid(points.round(w.double())), w, stats, status_of(stats))

    def storage(self, shape: tuple[int, int], taps: int = 1, groups: int = 1) -> int:
        return self.grid.storage(shape)

    def work(self, shape: tuple[int, int], blocks: int) -> float:
        return SEARCH * shape[0] * shape[1]
