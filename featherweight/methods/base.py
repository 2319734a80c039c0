"""What a method is, and what it gives back."""

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, Protocol, final

from torch import Tensor

from featherweight.stats import LayerStats
from featherweight.weights import Weight


class Status(Enum):
    """How a solve went. The value is the message for people."""

    SOLVED = "solved"
    DAMPED = "solved, with more damping than asked for: the inputs are nearly dependent"
    UNREACHED = "no calibration sample reached this weight: its inputs were taken as uncorrelated"
    NONFINITE = "the calibration inputs hold NaN or infinity: they were taken as uncorrelated"


PADDED = "its input channels do not fill the last group of the pattern, which counts as filled with zeros"


@final
@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """weight: the stored form. error: sum over rows of d H dᵀ, d the change of the row, H the mean of x xᵀ.
    relative_error: error divided by that of storing zeros. info: every damping or retry, by name. padded: whether the
    input channels do not fill the last group of the pattern. remark: what else people should know."""

    weight: Weight
    error: float
    relative_error: float
    status: Status = Status.SOLVED
    info: dict[str, float] = field(default_factory=dict)
    padded: bool = False
    remark: str = ""

    @property
    def note(self) -> str:
        """What people should know about it, empty where there is nothing."""
        status = [] if self.status is Status.SOLVED else [self.status.value]
        return "; ".join(status + [PADDED] * self.padded + [self.remark] * bool(self.remark))

    @classmethod
    def of(
        cls,
        weight: Weight,
        w: Tensor,
        stats: LayerStats,
        status: Status = Status.SOLVED,
        info: dict[str, float] | None = None,
        padded: bool = False,
        remark: str = "",
    ) -> "Solution":
        """Measure the error of `weight` against `w`, decoded as a reader would decode it."""
        lost = output_energy(w.double() - weight.dense().to(w.device).double(), stats)
        whole = output_energy(w.double(), stats)
        return cls(weight, lost, lost / whole if whole > 0 else 0.0, status, info or {}, padded, remark)


class Method(Protocol):
    """A frozen configuration that can solve one layer."""

    name: ClassVar[str]

    @property
    def label(self) -> str:
        """Method and settings in a few characters, for tables: 'gptq 4 bit'."""
        ...

    def solve(self, w: Tensor, stats: LayerStats) -> Solution:
        """Find the stored form of w, (rows, cols), whose rows come in `stats.blocks` blocks of equal size.

        Neither argument is changed. The same arguments give the same bytes.

        Raises:
            SolveError: the layer has no numerical solution.
        """
        ...

    def storage(self, shape: tuple[int, int], taps: int = 1, groups: int = 1) -> int:
        """Bytes that the solution of a (rows, cols) matrix will take, known before solving. taps: see LayerStats.
        groups: row blocks with inputs of their own."""
        ...

    def work(self, shape: tuple[int, int], blocks: int) -> float:
        """Rough number of multiply-adds of `solve`, for time estimates."""
        ...


def output_energy(d: Tensor, stats: LayerStats) -> float:
    """Sum over rows of d_r H d_rᵀ with the row block's H, rows weighted by how often they are used."""
    blocks = d.reshape(stats.blocks, -1, d.shape[1])
    per_row = ((blocks @ usable(stats).gram.to(d.device)) * blocks).sum(dim=2).reshape(-1)
    return float(per_row.sum() if stats.row_share is None else per_row @ stats.row_share.to(d.device))


def usable(stats: LayerStats) -> LayerStats:
    """`stats`, or uncorrelated inputs where nothing finite was seen."""
    if stats.finite and (stats.reached or stats.row_share is not None):
        return stats
    return LayerStats.white(stats.gram.shape[1], stats.blocks, stats.taps)


def status_of(stats: LayerStats, damped: bool = False) -> Status:
    """The status of a solved layer. damped: whether it took more damping than asked for."""
    if not stats.finite:
        return Status.NONFINITE
    if not stats.reached:
        return Status.UNREACHED
    return Status.DAMPED if damped else Status.SOLVED
