"""What the whole network costs with any choice of candidates, and the knapsack that follows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.activations import ActivationGrid
from featherweight.artifact.write import to_bytes
from featherweight.candidates import (
    Candidate,
    channels_read,
    menu_of,
    operations,
    without_rows,
)
from featherweight.counting import Place
from featherweight.errors import InfeasibleError
from featherweight.knapsack import Menu, Policy, front
from featherweight.latency import Timer
from featherweight.layers import Scan, Unit
from featherweight.methods import Solution, Vectors
from featherweight.methods.additive import additive_of
from featherweight.packing import FULL, packed, shortened
from featherweight.search import Choices, Task
from featherweight.weights import Sparse, Weight
from featherweight.weights.coded import stored_bytes

MARGIN, VARIES = 64, 400  # bytes that a file may vary by, and one in so many: what is chosen is solved and coded anew
SETTLING = 4  # times that the size of everything but the weights is looked at again
NAMES = {"bytes": "bytes", "macs": "MACs", "bops": "BOPs", "latency": "microseconds", "params": "parameters"}
BEYOND = 1 << 40  # more than any limit
POINTS = 8  # policies of the front that are measured

Cuts: TypeAlias = frozenset[Vectors]


@final
@dataclass(frozen=True, slots=True)
class Chosen:
    """What one weight becomes. rise: its share of the predicted distance to the dense outputs."""

    name: str
    method: str
    bytes: int
    macs: int
    bops: int
    rise: float


@final
@dataclass(frozen=True, slots=True)
class Point:
    """A policy of the front; bytes: of the whole file. predicted, measured: distance to the dense outputs, the latter
    None where it was not measured; metrics: of the network with the candidates in place, where they were measured."""

    bytes: int
    predicted: float
    measured: float | None = None
    metrics: dict[str, float] | None = None


@final
@dataclass(frozen=True, slots=True)
class Allocation:
    """The outcome. limits, floor: by budget ('bytes' of the whole file, 'macs', 'bops', 'latency' in microseconds,
    'params'), the latter the smallest that is reachable. predicted: the sum of the scores; first: the measured distance
    of the score's own policy, measured: of the chosen one, both None where there was nothing to measure on; policies:
    how many were measured. score: what the scores are. front: of the first budget, from small to large. macs, bops: of
    the network as it was stored, counted again, for one sample; dense_macs: before. latency, dense_latency: of all
    layers, made smaller, predicted before it is stored and then measured, and of the dense network; 0 where
    it has no limit. params, dense_params: numbers stored of all parameters, and before."""

    chosen: tuple[Chosen, ...]
    limits: dict[str, int]
    floor: dict[str, int]
    predicted: float
    first: float | None
    measured: float | None
    policies: int
    score: str
    front: tuple[Point, ...] = ()
    macs: int = 0
    dense_macs: int = 0
    bops: int = 0
    latency: int = 0
    dense_latency: int = 0
    params: int = 0
    dense_params: int = 0


@final
@dataclass(frozen=True, slots=True, eq=False)
class Allocator:
    """The candidates of a network, and what the whole file costs with any choice of them, one for each group of tied
    units. groups: see `ties`. grids, about: see `packing.packed`. coupled: see `couplings`; positions: how often each
    unit's matrix is used for one sample; input_bits: see `solve_candidates`. clock: where latency has a limit. calls:
    see `operations`. digits: see `shortened`. known: what was counted before."""

    net: nn.Module
    found: Scan
    candidates: Mapping[str, tuple[Candidate, ...]]
    groups: tuple[tuple[int, ...], ...]
    grids: dict[str, ActivationGrid]
    about: dict[str, Any]
    coupled: Mapping[str, tuple[str, ...]]
    positions: Mapping[str, float]
    input_bits: Mapping[str, int]
    clock: Timer | None = None
    calls: Mapping[str, tuple[Place, ...]] = field(default_factory=dict)
    digits: int = FULL
    known: dict[tuple[int, ...], dict[str, int]] = field(default_factory=dict)

    def size(self, choices: Choices) -> int:
        """Bytes of the whole file, but for a few."""
        taken = self.taken(choices)
        solutions = self.trimmed({name: c.solution for name, c in taken.items()})
        methods = {name: c.final for name, c in taken.items()}
        artifact, _ = packed(self.net, self.found, methods, solutions, self.about, self.grids)
        return len(to_bytes(shortened(artifact, self.digits)))

    def costs(self, choices: Choices, budgets: Sequence[str]) -> dict[str, int]:
        """By budget, bytes being those of the weights alone, latency that of the layers that could be smaller; all
        without the rows that nothing reads."""
        if not self.coupled:
            return {b: sum(getattr(c, b) for c in self.taken(choices).values()) for b in budgets}
        each = self.each(choices)
        own = [self._own(i, each) for i in range(len(each))]
        return {b: sum(x[b] for x in own) for b in budgets}

    def counted(self, weights: Mapping[str, Weight]) -> dict[str, int]:
        """MACs, BOPs and parameters of the network with these weights as they are stored, counted again."""
        own = [self._operations(u, weights[u.name]) for u in self.found.units]
        found = {b: sum(x[b] for x in own) for b in ("macs", "bops", "params")}
        return found | {"params": found["params"] + self.others}

    @property
    def others(self) -> int:
        """Parameters that are no units."""
        return sum(p.numel() for p in self.net.parameters()) - sum(u.params for u in self.found.units)

    def trimmed(self, solutions: Mapping[str, Solution]) -> dict[str, Solution]:
        """Without the rows that nothing reads."""
        units = {u.name: u for u in self.found.units}
        found = dict(solutions)
        for name, readers in self.coupled.items():
            needed = _read({r: solutions[r].weight for r in readers}, units)
            if not needed.all():
                weight = without_rows(solutions[name].weight, units[name], needed)
                found[name] = replace(solutions[name], weight=weight)
        return found

    @property
    def overhead(self) -> int:
        """Microseconds of everything but the layers that could be smaller."""
        if self.clock is None:
            return 0
        sizes = [(u.view.matrix_shape[0], u.view.matrix_shape[1] // u.taps) for u in self.found.units]
        whole = sum(self.clock.layer(u, *size) for u, size in zip(self.found.units, sizes, strict=True))
        return max(self.clock.whole - whole, 0)

    def _operations(self, unit: Unit, weight: Weight) -> dict[str, int]:
        known = self.positions[unit.name], self.input_bits.get(unit.name, 0), self.clock
        return operations(weight, unit, *known, self.calls.get(unit.name, ()))

    def _own(self, i: int, choices: Choices) -> dict[str, int]:
        """What one unit costs beside the others, each case counted once; choices: of every unit."""
        unit = self.found.units[i]
        units = {u.name: u for u in self.found.units}
        numbers = {u.name: k for k, u in enumerate(self.found.units)}
        readers = {name: choices[numbers[name]] for name in self.coupled.get(unit.name, ())}
        key = i, choices[i], *readers.values()
        if key not in self.known:
            weight = self.candidates[unit.name][choices[i]].solution.weight
            if readers:
                needed = _read({n: self.candidates[n][c].solution.weight for n, c in readers.items()}, units)
                weight = weight if needed.all() else without_rows(weight, unit, needed)
            self.known[key] = {"bytes": stored_bytes(weight)} | self._operations(unit, weight)
        return self.known[key]

    def each(self, choices: Choices) -> Choices:
        """The choice of every unit."""
        of = {i: c for group, c in zip(self.groups, choices, strict=True) for i in group}
        return tuple(of[i] for i in range(len(of)))

    def taken(self, choices: Choices) -> dict[str, Candidate]:
        return {u.name: self.candidates[u.name][c] for u, c in zip(self.found.units, self.each(choices), strict=True)}

    def cheapest(self, budget: str, without: Cuts = frozenset()) -> Choices:
        """The choices with the least costs, each for itself; of latency then one after another beside the others, as a
        layer may take longer with fewer rows."""
        found = tuple(int(menu.costs[:, 0].argmin()) for menu in self.menus([budget], without))
        return self._lowered(found, budget) if self.coupled and budget == "latency" else found

    def _lowered(self, now: Choices, budget: str) -> Choices:
        """Choices of which no single one lowers the cost of the whole."""
        least = self.costs(now, [budget])[budget]
        sizes = [len(self.candidates[self.found.units[group[0]].name]) for group in self.groups]
        better = True
        while better:
            better = False
            for g, size in enumerate(sizes):
                for j in range(size):
                    there = (*now[:g], j, *now[g + 1 :])
                    if (cost := self.costs(there, [budget])[budget]) < least:
                        now, least, better = there, cost, True
        return now

    def menus(self, budgets: Sequence[str], without: Cuts = frozenset()) -> tuple[Menu, ...]:
        """With a cost for each budget, each unit's alone: with couplings their sum is more than the true cost. without:
        vectors that nothing may use, so that their books need not be stored; such candidates cost BEYOND."""
        rows = [self.candidates[u.name] for u in self.found.units]
        menus = [menu_of([rows[i] for i in group], budgets) for group in self.groups]
        for group, menu in zip(self.groups, menus, strict=True):
            menu.costs[[_cut(c) in without for c in rows[group[0]]]] = BEYOND
        return tuple(menus)

    def removing(self) -> tuple[np.ndarray, ...]:
        """Which candidates of each menu remove weights, bool."""
        rows = [self.candidates[self.found.units[group[0]].name] for group in self.groups]
        return tuple(np.array([isinstance(c.solution.weight, Sparse) for c in own]) for own in rows)

    def around(self, budgets: Sequence[str], now: Choices, without: Cuts) -> tuple[Menu, ...]:
        """The menus linearised at a policy: what the whole network costs when one unit changes, so that they sum to the
        true cost there."""
        start = self.costs(now, budgets)
        own, menus = [self._own(i, each) for each in [self.each(now)] for i in range(len(each))], []
        for g, (group, menu) in enumerate(zip(self.groups, self.menus(budgets, without), strict=True)):
            costs, names = menu.costs.copy(), {self.found.units[i].name for i in group}
            if names & {*self.coupled, *chain.from_iterable(self.coupled.values())}:
                for j in range(len(costs)):
                    there = self.costs((*now[:g], j, *now[g + 1 :]), budgets)
                    costs[j] = [sum(own[i][b] for i in group) + there[b] - start[b] for b in budgets]
            menus.append(Menu(np.maximum(costs, 0), menu.losses))
        return tuple(menus)

    def floor(self, budgets: Sequence[str]) -> dict[str, int]:
        """The smallest reachable cost by each budget alone, bytes of the whole file."""
        found = {}
        for b in budgets:
            least = self.cheapest(b)
            found[b] = with_margin(self.size(least)) if b == "bytes" else self.costs(least, [b])[b]
        found |= {"latency": found["latency"] + self.overhead} if "latency" in found else {}
        return found | ({"params": found["params"] + self.others} if "params" in found else {})

    def task(self, limits: Mapping[str, int]) -> Task:
        """The knapsack for these limits, that of bytes lowered by what the rest of the file takes; with those books
        whose bytes come back, as the scores have it.

        Raises:
            InfeasibleError: a limit is below its floor, which is named; or no policy stays within all.
        """
        budgets = list(limits)
        for b, least in self.floor(budgets).items():
            if limits[b] < least:
                unit = NAMES[b]
                what = {"bytes": "file has", "latency": "latency, by the table of its layers, is"}
                said = f"{what.get(b, f'number of {unit} is')} {least:,}{f' {unit}' if b in what else ''}"
                raise InfeasibleError(f"the target is {limits[b]:,} {unit}; the smallest reachable {said}")
        cuts = self.cuts()
        found: list[tuple[float, Task]] = []
        for size in range(len(cuts), -1, -1):
            for without in combinations(cuts, size):
                try:
                    task = self.closed(limits, frozenset(without))
                    found.append((Policy.of(task.menus, task.solve()).loss, task))
                except InfeasibleError:
                    if not found and not without:
                        raise
        return min(found, key=lambda x: x[0])[1]

    def cuts(self, choices: Choices | None = None) -> list[Vectors]:
        """The vectors that candidates, or those of a policy, are made of, from few bits to many."""
        every = self.candidates.values() if choices is None else [[c] for c in self.taken(choices).values()]
        return sorted({c for rows in every for x in rows if (c := _cut(x))}, key=lambda c: c.rate)

    def closed(self, limits: Mapping[str, int], without: Cuts) -> Task:
        """Like `task`, without candidates of these vectors."""
        budgets = list(limits)
        menus = self.menus(budgets, without)
        opened = frozenset(self.cuts()) - without
        choices = self._made_of(opened) if opened else self.cheapest(budgets[0], without)
        plain = self.cheapest(budgets[0], frozenset(self.cuts()))  # a file without books has a larger header
        task, safe, over, largest = None, None, 0, 0
        linear, margin = bool(self.coupled), MARGIN + limits.get("bytes", 0) // VARIES
        for turn in range(SETTLING):  # what the rest takes, and what a row is worth, depends on the choices
            used = self.cuts(choices)
            if "bytes" in limits and (used or not opened):
                unused = sum(c.storage for c in opened - set(used))  # of books that another policy may need
                over = self._rest(choices) + unused + margin
            largest = max(largest, over)
            rest = {"bytes": over if turn < SETTLING - 1 else largest, "latency": self.overhead, "params": self.others}
            inner = {b: limits[b] - rest.get(b, 0) for b in budgets}
            meets = self._meets(inner) if linear else None
            if opened and "bytes" in limits:
                meets = self._meets(inner, max(self._rest(plain) + margin - over, 0))
            if meets is not None and meets(choices):
                safe = choices
            if linear and turn > 0:  # at first every unit pays for all its rows, which is more than the truth
                menus = self.around(budgets, choices, without)
            task = Task(menus, tuple(inner.values()), self.removing(), meets, safe)
            try:
                again = task.solve()
            except InfeasibleError as error:
                asked = ", ".join(f"{n:,} {NAMES[b]}" for b, n in limits.items())
                least = ", ".join(f"{n:,} {NAMES[b]}" for b, n in self.floor(budgets).items())
                what = "no policy was found within" if len(budgets) == 1 else "no policy was found that keeps together"
                raise InfeasibleError(f"{what} {asked}; each alone reaches {least}") from error
            if again == choices:
                break
            choices = again
        assert task is not None
        return task

    def _made_of(self, cuts: Cuts) -> Choices:
        """For every unit the smallest candidate that is made of such vectors, where there is one."""
        found = []
        for group in self.groups:
            rows = self.candidates[self.found.units[group[0]].name]
            made = [k for k, c in enumerate(rows) if _cut(c) in cuts] or range(len(rows))
            found.append(min(made, key=lambda k: rows[k].bytes))
        return tuple(found)

    def _rest(self, choices: Choices) -> int:
        """Bytes of the file that are not the weights'."""
        return self.size(choices) - self.costs(choices, ["bytes"])["bytes"]

    def _meets(self, limits: Mapping[str, int], bookless: int = 0) -> Callable[[Choices], bool]:
        """bookless: bytes that a policy without any book costs more."""

        def meets(choices: Choices) -> bool:
            more = 0 if not bookless or self.cuts(choices) else bookless
            costs = self.costs(choices, list(limits))
            return all(c + (more if b == "bytes" else 0) <= limits[b] for b, c in costs.items())

        return meets

    def front(self, budget: str, pruned: float = 1.0) -> list[tuple[Choices, Point]]:
        """Every policy that is optimal for what it costs, by the score, with that of removed weights multiplied; from
        small to large."""
        task = Task(self.menus([budget]), (), self.removing()).weighted(pruned)
        policies = front(task.menus)
        rests: dict[Cuts, int] = {}
        points = []
        for p in policies:
            used = frozenset(self.cuts(p.choices))
            if used not in rests:
                rests[used] = self._rest(p.choices)
            points.append((p.choices, Point(rests[used] + self.costs(p.choices, ["bytes"])["bytes"], p.loss)))
        points.sort(key=lambda x: (x[1].bytes, x[1].predicted))
        return [x for k, x in enumerate(points) if all(x[1].predicted < y[1].predicted for y in points[:k])]


def _read(weights: Mapping[str, Weight], units: Mapping[str, Unit]) -> Tensor:
    """Channels that at least one of these weights reads, (channels,) bool."""
    return torch.stack([channels_read(w, units[name]) for name, w in weights.items()]).any(dim=0)


def _cut(candidate: Candidate) -> Vectors | None:
    """The vectors from shared books that a candidate is made of."""
    own = additive_of(candidate.method)
    return None if own is None else own.cut(0)


def with_margin(size: int) -> int:
    """Bytes that a file of about `size` may have."""
    return size + MARGIN + size // VARIES


def chosen(allocator: Allocator, choices: Choices) -> tuple[Chosen, ...]:
    return tuple(
        Chosen(name, c.final.label, c.bytes, c.macs, c.bops, c.rise) for name, c in allocator.taken(choices).items()
    )


def spread(points: Sequence[tuple[Choices, Point]], count: int = POINTS) -> list[int]:
    """Which points of a front to measure: evenly spread in the logarithm of their bytes."""
    sizes = np.log([p.bytes for _, p in points])
    wanted = np.linspace(sizes[0], sizes[-1], count)
    return sorted({int(np.abs(sizes - x).argmin()) for x in wanted})
