"""One budget for the whole network: which method, at which ratio, for every weight.

    candidates + limits -> knapsack -> policy -> measured, improved -> methods

The second stage, solving the chosen methods well, is the ordinary line of `pipeline.compress`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, final

import numpy as np
from torch import nn

from featherweight.activations import ActivationGrid
from featherweight.artifact.write import to_bytes
from featherweight.candidates import (
    FLOAT,
    Candidate,
    channels_read,
    forms,
    live,
    solve_candidates,
    weight_bits,
)
from featherweight.coupling import couplings
from featherweight.data import Batch, cut, split
from featherweight.database import Database
from featherweight.errors import InfeasibleError, UsageError
from featherweight.knapsack import Menu, front
from featherweight.layers import Scan, Unit
from featherweight.methods import Method, Solution
from featherweight.packing import packed
from featherweight.repair.correct import Reference, Repair
from featherweight.search import Choices, Judge, Task, search
from featherweight.sensitivity import Sensitivity, sensitivity
from featherweight.stats import LayerStats
from featherweight.target import Baselines, Goal
from featherweight.weights import Weight

MARGIN = 64  # bytes that a file may vary by: layer errors are written in decimal
SETTLING = 4  # times that the size of everything but the weights is looked at again
EFFORT = 2e12  # multiply-adds that the search may spend on measuring policies
SECONDS = 60  # that this takes, about
MOST, LEAST = 80, 12  # policies that it measures
FAR = 2.0  # times the distance: less may be chance, as the network has been trained on such data
NAMES = {"bytes": "bytes", "macs": "MACs", "bops": "BOPs"}
POINTS = 8  # policies of the front that are measured
CORRECTING = 256  # samples that a measured policy is corrected on

Progress: TypeAlias = Callable[[str, int, int], None]


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
    """The outcome. limits, floor: by budget ('bytes' of the whole file, 'macs', 'bops'), the latter the smallest that
    is reachable. predicted: the sum of the scores; first: the measured distance of the score's own policy, measured: of
    the chosen one, both None where there was nothing to measure on; policies: how many were measured. score: what the
    scores are. front: of the first budget, from small to large. macs, bops: of the network as it was stored, counted
    again, for one sample; dense_macs: before."""

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


@final
@dataclass(frozen=True, slots=True, eq=False)
class Allocator:
    """The candidates of a network, and what the whole file costs with any choice of them. grids, about: see
    `packing.packed`. coupled: see `couplings`; positions: how often each unit's matrix is used for one sample;
    input_bits: see `solve_candidates`."""

    net: nn.Module
    found: Scan
    candidates: Mapping[str, tuple[Candidate, ...]]
    grids: dict[str, ActivationGrid]
    about: dict[str, Any]
    coupled: Mapping[str, str]
    positions: Mapping[str, float]
    input_bits: Mapping[str, int]

    def size(self, choices: Choices) -> int:
        """Bytes of the whole file, but for a few."""
        taken = self.taken(choices)
        solutions = {name: c.solution for name, c in taken.items()}
        methods = {name: c.final for name, c in taken.items()}
        artifact, _ = packed(self.net, self.found, methods, solutions, self.about, self.grids)
        return len(to_bytes(artifact))

    def costs(self, choices: Choices, budgets: Sequence[str]) -> dict[str, int]:
        """By budget, bytes being those of the weights alone, MACs and BOPs without the rows that nothing reads."""
        taken = self.taken(choices)
        computed = self.counted({name: c.solution.weight for name, c in taken.items()}) if self.coupled else None
        return {
            b: sum(getattr(c, b) for c in taken.values()) if b == "bytes" or computed is None else computed[b]
            for b in budgets
        }

    def counted(self, weights: Mapping[str, Weight]) -> dict[str, int]:
        """MACs and BOPs of the network with these weights, counted again."""
        own = [self._counted(u, weights) for u in self.found.units]
        return {"macs": sum(m for m, _ in own), "bops": sum(b for _, b in own)}

    def _counted(self, unit: Unit, weights: Mapping[str, Weight]) -> tuple[int, int]:
        units = {u.name: u for u in self.found.units}
        reader = self.coupled.get(unit.name)
        needed = None if reader is None else channels_read(weights[reader], units[reader])
        macs = round(self.positions[unit.name] * live(weights[unit.name], unit, needed))
        return macs, macs * weight_bits(weights[unit.name]) * (self.input_bits.get(unit.name, 0) or FLOAT)

    def taken(self, choices: Choices) -> dict[str, Candidate]:
        return {u.name: self.candidates[u.name][c] for u, c in zip(self.found.units, choices, strict=True)}

    def cheapest(self, budget: str) -> Choices:
        own = [self.candidates[u.name] for u in self.found.units]
        return tuple(min(range(len(rows)), key=lambda i: getattr(rows[i], budget)) for rows in own)

    def menus(self, budgets: Sequence[str]) -> tuple[Menu, ...]:
        """With a cost for each budget, each unit's alone: with couplings their sum is more than the true cost."""
        return tuple(
            Menu(
                np.array([[getattr(c, b) for b in budgets] for c in self.candidates[u.name]], np.int64),
                np.array([c.rise for c in self.candidates[u.name]], np.float64),
            )
            for u in self.found.units
        )

    def around(self, budgets: Sequence[str], now: Choices) -> tuple[Menu, ...]:
        """The menus linearised at a policy: what the whole network costs when one unit changes, so that they sum to the
        true cost there."""
        start = self.costs(now, budgets)
        own = [self._own(i, now, budgets) for i in range(len(now))]
        menus = []
        for i, (unit, menu) in enumerate(zip(self.found.units, self.menus(budgets), strict=True)):
            costs = menu.costs.copy()
            if unit.name in self.coupled or unit.name in self.coupled.values():
                for j in range(len(costs)):
                    there = self.costs((*now[:i], j, *now[i + 1 :]), budgets)
                    costs[j] = [own[i][b] + there[b] - start[b] for b in budgets]
            menus.append(Menu(np.maximum(costs, 0), menu.losses))
        return tuple(menus)

    def _own(self, i: int, now: Choices, budgets: Sequence[str]) -> dict[str, int]:
        unit = self.found.units[i]
        macs, bops = self._counted(unit, {n: c.solution.weight for n, c in self.taken(now).items()})
        own = {"bytes": self.candidates[unit.name][now[i]].bytes, "macs": macs, "bops": bops}
        return {b: own[b] for b in budgets}

    def floor(self, budgets: Sequence[str]) -> dict[str, int]:
        """The smallest reachable cost by each budget alone, bytes of the whole file."""
        least = {b: self.cheapest(b) for b in budgets}
        return {b: self.size(c) + MARGIN if b == "bytes" else self.costs(c, [b])[b] for b, c in least.items()}

    def task(self, limits: Mapping[str, int]) -> Task:
        """The knapsack for these limits, that of bytes lowered by what the rest of the file takes.

        Raises:
            InfeasibleError: a limit is below its floor, which is named; or no policy stays within all.
        """
        budgets = list(limits)
        menus = self.menus(budgets)
        for b, least in self.floor(budgets).items():
            if limits[b] < least:
                unit = NAMES[b]
                what = "file has" if b == "bytes" else f"number of {unit} is"
                least = f"{least:,} bytes" if b == "bytes" else f"{least:,}"
                raise InfeasibleError(f"the target is {limits[b]:,} {unit}; the smallest reachable {what} {least}")
        choices, task = self.cheapest(budgets[0]), None
        for _ in range(SETTLING):  # what the rest takes, and what a row is worth, depends on the choices
            over = self._rest(choices) + MARGIN if "bytes" in limits else 0
            inner = {b: limits[b] - (over if b == "bytes" else 0) for b in budgets}
            if self.coupled and task is not None and {"macs", "bops"} & set(budgets):
                menus = self.around(budgets, choices)
            task = Task(menus, tuple(inner.values()), self._meets(inner) if self.coupled else None)
            again = task.solve()
            if again == choices:
                break
            choices = again
        assert task is not None
        return task

    def _rest(self, choices: Choices) -> int:
        """Bytes of the file that are not the weights'."""
        return self.size(choices) - self.costs(choices, ["bytes"])["bytes"]

    def _meets(self, limits: Mapping[str, int]) -> Callable[[Choices], bool]:
        return lambda choices: all(c <= limits[b] for b, c in self.costs(choices, list(limits)).items())

    def front(self, budget: str) -> list[tuple[Choices, Point]]:
        """Every policy that is optimal for what it costs, by the score; from small to large."""
        policies = front(self.menus([budget]))
        least = policies[0].choices
        over = self._rest(least)
        return [(p.choices, Point(over + self.costs(p.choices, ["bytes"])["bytes"], p.loss)) for p in policies]


def effort(macs: int, samples: int) -> int:
    """How many policies to measure, each with that many multiply-adds for a sample."""
    return int(min(max(EFFORT / max(3 * macs * samples, 1), LEAST), MOST))


def chosen(allocator: Allocator, choices: Choices) -> tuple[Chosen, ...]:
    return tuple(
        Chosen(name, c.final.label, c.bytes, c.macs, c.bops, c.rise) for name, c in allocator.taken(choices).items()
    )


def spread(points: Sequence[tuple[Choices, Point]], count: int = POINTS) -> list[int]:
    """Which points of a front to measure: evenly spread in the logarithm of their bytes."""
    sizes = np.log([p.bytes for _, p in points])
    wanted = np.linspace(sizes[0], sizes[-1], count)
    return sorted({int(np.abs(sizes - x).argmin()) for x in wanted})


# ---------------------------------------------------------------- the stage
@final
@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """What the stage works with. samples: none means without data. stats: of the samples that may be solved on. fixed:
    methods that are not for choice, by unit name. grids, input_bits: of the units' inputs. base: bytes of the dense
    network. evaluate: for the points of a front."""

    net: nn.Module
    found: Scan
    samples: Sequence[Batch]
    stats: Mapping[str, LayerStats]
    fixed: Mapping[str, Method]
    grids: dict[str, ActivationGrid]
    input_bits: Mapping[str, int]
    base: Baselines
    about: dict[str, Any]
    store: Database
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None


@final
@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """What came of it: `choices`, in `allocator`, and what is needed to choose again under a tighter limit."""

    allocator: Allocator
    limits: dict[str, int]
    task: Task
    choices: Choices
    trust: np.ndarray
    outcome: Allocation

    @property
    def methods(self) -> dict[str, Method]:
        """The best forms of the chosen methods, by unit name."""
        return {name: c.final for name, c in self.allocator.taken(self.choices).items()}

    @property
    def first_methods(self) -> dict[str, Method]:
        """The methods of the candidates themselves, which `solutions` are of."""
        return {name: c.method for name, c in self.allocator.taken(self.choices).items()}

    @property
    def solutions(self) -> dict[str, Solution]:
        return {name: c.solution for name, c in self.allocator.taken(self.choices).items()}

    @property
    def bytes(self) -> int:
        """Predicted, of the whole file."""
        return self.allocator.size(self.choices) + MARGIN

    def recounted(self, solutions: Mapping[str, Solution]) -> Allocation:
        """The outcome, with MACs and BOPs of what was stored."""
        return replace(self.outcome, **self.allocator.counted({name: s.weight for name, s in solutions.items()}))

    def beats(self, outcome: Repair) -> bool:
        """Whether the candidates themselves were measured to be far closer to the dense outputs than what came of
        it."""
        after = outcome.after if outcome.applied else outcome.before
        return self.outcome.measured is not None and after is not None and FAR * self.outcome.measured < after

    def tighter(self, bytes_over: int) -> "Stage":
        """With so many bytes less for the file: by the score, nothing is measured again.

        Raises:
            InfeasibleError: nothing is that small.
        """
        limits = self.limits | {"bytes": self.limits["bytes"] - bytes_over}
        task = self.allocator.task(limits)
        choices = task.solve(self.trust)
        outcome = replace(self.outcome, chosen=chosen(self.allocator, choices), measured=None)
        return replace(self, limits=limits, task=task, choices=choices, outcome=outcome)


def allocate(setting: Setting, goal: Goal, progress: Progress, measuring: bool = True) -> Stage:
    """Score, choose, and with `measuring` measure and improve.

    Raises:
        InfeasibleError: a limit is below its floor.
        UsageError: MACs or BOPs are limited and there are no data to count them on.
    """
    net, units, samples = setting.net, setting.found.units, setting.samples
    if not samples and (goal.macs is not None or goal.bops is not None):
        raise UsageError("a target for MACs or BOPs needs data: they depend on the size of the inputs")
    solving, judging = split(samples) if samples else ([], [])
    solving = solving if judging else list(samples)
    scores, what = _scores(net, solving, units, progress)
    count = sum(b.size for b in solving)
    tried = {
        u.name: [setting.fixed[u.name]] if u.name in setting.fixed else forms(u, goal, bool(samples)) for u in units
    }
    candidates = solve_candidates(
        net, units, setting.stats, scores, tried, setting.fixed, setting.input_bits, count, setting.store, progress
    )
    coupled = couplings(net, cut(solving[0], 8)[0], units) if goal.macs is not None else {}
    positions = {u.name: int(setting.stats[u.name].samples.max()) / max(count, 1) for u in units}
    allocator = Allocator(
        net, setting.found, candidates, setting.grids, setting.about, coupled, positions, setting.input_bits
    )
    macs = sum(round(positions[u.name] * u.params) for u in units)
    limits = goal.limits(setting.base.fp32, macs, macs * FLOAT**2)
    task = allocator.task(limits)
    judge = _judge(setting, candidates, judging) if measuring else None
    if judge is None:
        choices = task.solve()
        first, measured, policies, trust = None, None, 0, np.ones(len(units))
    else:
        most = goal.measurements or effort(macs, sum(b.size for b in judging) + CORRECTING)
        found = search(task, judge, most, lambda done, total: progress("search", done, total) is None)
        known = math.isfinite(found.loss)
        choices, first, measured = found.choices, found.first if known else None, found.loss if known else None
        policies, trust = found.measured, np.array(found.trust)
    if samples and measuring and measured is None:
        what += "; outputs cannot be compared, so no policy was measured"
    points = _front(allocator, judge, setting.evaluate, next(iter(limits))) if goal.front else ()
    outcome = Allocation(
        chosen(allocator, choices),
        limits,
        allocator.floor(list(limits)),
        sum(c.rise for c in allocator.taken(choices).values()),
        first,
        measured,
        policies,
        what,
        points,
        **allocator.counted({name: c.solution.weight for name, c in allocator.taken(choices).items()}),
        dense_macs=macs,
    )
    return Stage(allocator, limits, task, choices, trust, outcome)


def _scores(
    net: nn.Module, solving: Sequence[Batch], units: Sequence[Unit], progress: Progress
) -> tuple[Sensitivity | None, str]:
    """The sensitivity, and what the scores are, for people."""
    if not solving:
        return None, "relative change of each weight: there are no data"
    try:
        found = sensitivity(net, solving, units, on_pass=lambda done, total: progress("score", done, total))
    except (UsageError, RuntimeError) as error:  # a network may refuse gradients, or smaller batches
        return None, f"relative layer errors, as the network gives no gradients: {error}"[:200]
    missing = [u.name for u in units if u.name not in found.gradients]
    note = f"; relative layer errors for {len(missing)} weights that no gradient reaches" if missing else ""
    return found, f"second order{note}"


def _judge(setting: Setting, candidates: Mapping[str, tuple[Candidate, ...]], judging: Sequence[Batch]) -> Judge | None:
    """None where the network's outputs cannot be compared."""
    if not judging:
        return None
    reference = Reference.of(setting.net, setting.samples, setting.found.units, most=CORRECTING)
    assert reference.outputs is not None
    if not math.isfinite(reference.outputs.distance(setting.net)):
        return None
    return Judge(setting.net, reference, setting.found.units, candidates, setting.grids)


def _front(
    allocator: Allocator, judge: Judge | None, evaluate: Callable[[nn.Module], dict[str, float]] | None, budget: str
) -> tuple[Point, ...]:
    points = allocator.front(budget)
    if judge is not None:
        for i in spread(points):
            choices, point = points[i]
            measured = float(judge(choices).mean())
            metrics = None if evaluate is None else evaluate(judge.network(choices))
            points[i] = choices, replace(point, measured=measured, metrics=metrics)
    return tuple(point for _, point in points)
