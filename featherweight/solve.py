"""A solution for every weight, from the dense network's inputs or, layer by layer, from those of the compressed one."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, final

import torch
from torch import Tensor, nn

from featherweight.activations import ActivationGrid, simulate
from featherweight.data import Batch, stacked
from featherweight.database import Database
from featherweight.errors import SolveError, UsageError
from featherweight.layers import Unit
from featherweight.methods import DictionaryPairs, Factorize, Magnitude, Method, Plain, Rtn, Solution, Status
from featherweight.sequential import single_use, solve_in_order
from featherweight.stats import LayerStats

Progress: TypeAlias = Callable[[str, int, int], None]
"""Told of (stage, steps done, steps in all) as the work goes on."""


@final
@dataclass(slots=True)
class Work:
    """What solving needs beside the layers, and how far it is. reused: solutions that came from the database. blind:
    there are no samples that could reach a layer."""

    methods: Mapping[str, Method]
    store: Database | None
    progress: Progress
    total: int
    done: int = 0
    reused: int = 0
    blind: bool = False

    def solve(self, unit: Unit, w: Tensor, stats: LayerStats) -> Solution:
        method, known = self.methods[unit.name], False
        try:
            if self.store is None:
                solution = method.solve(w, stats)
            else:
                solution, known = self.store.solve(method, w, stats)
        except SolveError as error:
            raise SolveError(f"{unit.name}: {error}") from error
        self.done += 1
        self.reused += known
        self.progress("solve", self.done, self.total)
        if solution.status == Status.UNREACHED and (self.blind or not needs_inputs(method)):
            return replace(solution, status=Status.SOLVED)
        return solution


def needs_inputs(method: Method) -> bool:
    """Whether a method looks at the inputs of a layer at all."""
    if isinstance(method, Factorize):
        return method.whiten
    return not isinstance(method, Rtn | Magnitude | Plain | DictionaryPairs)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """The units that are solved on the inputs that the compressed network gives them, and the samples for that, in one
    batch. note: why they are not all, for people."""

    units: tuple[Unit, ...] = ()
    batch: Batch | None = None
    note: str = ""


def order(net: nn.Module, samples: Sequence[Batch], units: Sequence[Unit], methods: Mapping[str, Method]) -> Order:
    """What can be solved in order, with as many samples as fit into one pass."""
    if not samples:
        return Order(note="no data")
    try:
        batch, note = stacked(samples, net)
        chosen = tuple(u for u in single_use(net, batch, units) if needs_inputs(methods[u.name]))
    except (UsageError, RuntimeError) as error:  # a network that works on single batches may refuse a joined one
        return Order(note=f"the network does not accept joined batches: {error}"[:200])
    return Order(chosen, batch if chosen else None, note if chosen else "")


def solved(
    work: Work,
    net: nn.Module,
    units: Sequence[Unit],
    stats: Mapping[str, LayerStats],
    then: Order,
    grids: Mapping[str, ActivationGrid],
) -> dict[str, Solution]:
    """Solutions by unit name, in the order of `units`: first of those that have `stats`, then of those in order."""
    found: dict[str, Solution] = {}
    work.progress("solve", 0, work.total)
    for unit in units:
        if unit.name in stats:
            w = unit.view.matrix(net.get_parameter(unit.name).detach().cpu())
            found[unit.name] = work.solve(unit, w, stats[unit.name])
    if then.batch is not None:
        small = assembled(net, [u for u in units if u.name in found], found)
        simulate(small, grids)

        def solve(unit: Unit, w: Tensor, moments: LayerStats) -> Tensor:
            found[unit.name] = work.solve(unit, w, moments)
            return found[unit.name].weight.dense()

        solve_in_order(net, small, then.batch, then.units, solve)
    return {u.name: found[u.name] for u in units}


@torch.no_grad()
def assembled(net: nn.Module, units: Sequence[Unit], solutions: Mapping[str, Solution]) -> nn.Module:
    """A copy of the network with the decoded weights in place."""
    small = copy.deepcopy(net)
    for unit in units:
        small.get_parameter(unit.name).copy_(unit.view.tensor(solutions[unit.name].weight.dense()))
    return small
