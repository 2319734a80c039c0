"""What every weight may become: candidates of several kinds, each solved, with what it costs and is predicted to lose.

Candidates are solved by the fast forms of the methods (GPTQ, ExactOBS): their differences decide, and what is chosen is
solved again by the best ones, see `refined`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import numpy as np
import torch
from torch import nn

from featherweight.database import Database
from featherweight.errors import SolveError
from featherweight.knapsack import Menu, useful
from featherweight.layers import Unit
from featherweight.methods import NM, Gptq, GridSpec, Method, Obq, Obs, Prune, PruneQuantize, Rtn, Solution, Unstructured
from featherweight.sensitivity import Sensitivity
from featherweight.stats import LayerStats
from featherweight.weights import Dense, Grid, Sparse, Weight

Among: TypeAlias = Literal["quantize", "prune", "both"]
"""The kinds of candidates: grids alone, sparse fp16 alone, or these and sparse grids."""

BITS = (1, 2, 3, 4, 5, 6, 7, 8)
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
JOINT = tuple((s, b) for s in (0.3, 0.5, 0.7, 0.85) for b in (2, 3, 4, 5))
SHARED = 64  # columns of a group, and the widest matrix for which a single scale is tried
FLOAT = 32  # bits that a multiplication counts where a factor is not on a grid


@final
@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A solved form of one weight. bytes: its payload. macs, bops: of the layer for one sample, rows and input channels
    without any weight left out; bops are multiplied by the bits of both factors, 32 for floats. rise: the predicted
    distance to the dense outputs, if no other weight were changed."""

    method: Method
    solution: Solution
    bytes: int
    macs: int
    bops: int
    rise: float


def forms(unit: Unit, among: Among) -> list[Method]:
    """The methods that are tried for a unit."""
    cols = unit.view.matrix_shape[1]
    groups = [None, 0] if cols <= SHARED else [None, SHARED] if cols >= 2 * SHARED else [None]
    grids = [Gptq(GridSpec(b, b == 8, g)) for b in BITS for g in groups]
    pruned = [Obs(Unstructured(s)) for s in SPARSITIES]
    pairs = [PruneQuantize(Obs(Unstructured(s)), Gptq(GridSpec(b))) for s, b in JOINT]
    hardware = [PruneQuantize(Obs(NM(2, 4)), Gptq(GridSpec(b))) for b in (3, 4, 5)] if cols // unit.taps >= 4 else []
    match among:
        case "quantize":
            return [*grids]
        case "prune":
            return [*pruned]
        case "both":
            return [*grids, *pruned, *pairs, *hardware]


def refined(method: Method) -> Method:
    """The best form of a candidate's method, which takes longer and stores as much."""
    match method:
        case Gptq():
            return Obq(method.grid)
        case Obs():
            return Prune(method.pattern)
        case PruneQuantize(prune=Obs() as prune, quantize=Gptq() as quantize):
            return PruneQuantize(Prune(prune.pattern), Obq(quantize.grid))
    return method


def solve_candidates(
    net: nn.Module,
    units: Sequence[Unit],
    stats: Mapping[str, LayerStats],
    sensitivity: Sensitivity | None,
    among: Among,
    input_bits: Mapping[str, int],
    samples: int,
    store: Database,
    progress: Callable[[str, int, int], None],
) -> dict[str, tuple[Candidate, ...]]:
    """Candidates by unit name, those left out that another one beats in bytes, MACs, BOPs and rise.

    Args:
        sensitivity: predicts the rises; None, or for a unit that it misses, the relative layer error stands for it.
        input_bits: of the units' inputs, missing or 0 for floats. samples: how many the statistics are of.
    """
    wanted = {u.name: forms(u, among) for u in units}
    total, done = sum(map(len, wanted.values())), 0
    found: dict[str, list[Candidate]] = {}
    progress("candidates", 0, total)
    for unit in units:
        w = unit.view.matrix(net.get_parameter(unit.name).detach().cpu())
        seen = stats[unit.name]
        positions = int(seen.samples.max()) / max(samples, 1)
        rows: list[Candidate] = []
        for method in wanted[unit.name]:
            try:
                solution, _ = store.solve(method, w, seen)
            except SolveError as error:
                raise SolveError(f"{unit.name}: {error}") from error
            if sensitivity is not None and unit.name in sensitivity.gradients:
                rise = sensitivity.rise(unit.name, solution.weight.dense() - w.float())
            else:
                rise = solution.relative_error
            macs = round(positions * live(solution.weight, unit))
            bops = macs * weight_bits(solution.weight) * (input_bits.get(unit.name, 0) or FLOAT)
            rows.append(Candidate(method, solution, solution.weight.bits() // 8, macs, bops, rise))
            done += 1
            progress("candidates", done, total)
        found[unit.name] = rows
    return {name: _useful(rows) for name, rows in found.items()}


def _useful(rows: list[Candidate]) -> tuple[Candidate, ...]:
    costs = np.array([(c.bytes, c.macs, c.bops) for c in rows], np.int64)
    return tuple(rows[i] for i in useful(Menu(costs, np.array([c.rise for c in rows], np.float64))))


def live(weight: Weight, unit: Unit) -> int:
    """Multiplications of one use of a matrix: rows without any weight and input channels without any are left out.
    Single zeros are not: no plain hardware skips them."""
    rows, cols = weight.shape
    if not isinstance(weight, Sparse):
        return rows * cols
    parts = weight.mask.reshape(unit.groups, rows // unit.groups, cols // unit.taps, unit.taps).any(dim=3)
    return int((parts.any(dim=2).sum(dim=1) * parts.any(dim=1).sum(dim=1)).sum()) * unit.taps


def weight_bits(weight: Weight) -> int:
    """Bits of one weight as a factor."""
    values = weight.values if isinstance(weight, Sparse) else weight
    return values.nbits if isinstance(values, Grid) else FLOAT
