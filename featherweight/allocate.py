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
from featherweight.candidates import FLOAT, Candidate, forms, solve_candidates
from featherweight.data import Batch, split
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
    scores are. front: of the first budget, from small to large."""

    chosen: tuple[Chosen, ...]
    limits: dict[str, int]
    floor: dict[str, int]
    predicted: float
    first: float | None
    measured: float | None
    policies: int
    score: str
    front: tuple[Point, ...] = ()


@final
@dataclass(frozen=True, slots=True, eq=False)
class Allocator:
    """The candidates of a network, and what the whole file costs with any choice of them. grids, about: see
    `packing.packed`."""

    net: nn.Module
    found: Scan
    candidates: Mapping[str, tuple[Candidate, ...]]
    grids: dict[str, ActivationGrid]
    about: dict[str, Any]

    def costs(self, choices: Choices) -> dict[str, int]:
        """By budget, bytes being those of the whole file but for a few."""
        taken = self.taken(choices)
        solutions = {name: c.solution for name, c in taken.items()}
        methods = {name: c.final for name, c in taken.items()}
        artifact, _ = packed(self.net, self.found, methods, solutions, self.about, self.grids)
        size = len(to_bytes(artifact))
        return {
            "bytes": size,
            "macs": sum(c.macs for c in taken.values()),
            "bops": sum(c.bops for c in taken.values()),
        }

    def taken(self, choices: Choices) -> dict[str, Candidate]:
        return {u.name: self.candidates[u.name][c] for u, c in zip(self.found.units, choices, strict=True)}

    def cheapest(self, budget: str) -> Choices:
        own = [self.candidates[u.name] for u in self.found.units]
        return tuple(min(range(len(rows)), key=lambda i: getattr(rows[i], budget)) for rows in own)

    def menus(self, budgets: Sequence[str]) -> tuple[Menu, ...]:
        """With a cost for each budget, bytes being those of the weights alone."""
        return tuple(
            Menu(
                np.array([[getattr(c, b) for b in budgets] for c in self.candidates[u.name]], np.int64),
                np.array([c.rise for c in self.candidates[u.name]], np.float64),
            )
            for u in self.found.units
        )

    def floor(self, budgets: Sequence[str]) -> dict[str, int]:
        """The smallest reachable cost by each budget alone."""
        return {b: self.costs(self.cheapest(b))[b] + (MARGIN if b == "bytes" else 0) for b in budgets}

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
        if "bytes" not in limits:
            return Task(menus, tuple(limits.values()))
        choices, task = self.cheapest("bytes"), None
        for _ in range(SETTLING):  # what the rest takes depends a little on the choices
            over = self.costs(choices)["bytes"] - sum(c.bytes for c in self.taken(choices).values())
            task = Task(menus, tuple(limits[b] - (over + MARGIN if b == "bytes" else 0) for b in budgets))
            again = task.solve()
            if again == choices:
                break
            choices = again
        assert task is not None
        return task

    def front(self, budget: str) -> list[tuple[Choices, Point]]:
        """Every policy that is optimal for what it costs, by the score; from small to large."""
        policies = front(self.menus([budget]))
        least = policies[0].choices
        over = self.costs(least)["bytes"] - sum(c.bytes for c in self.taken(least).values())
        return [
            (p.choices, Point(over + sum(c.bytes for c in self.taken(p.choices).values()), p.loss)) for p in policies
        ]


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
        return self.allocator.costs(self.choices)["bytes"] + MARGIN

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
        u.name: [setting.fixed[u.name]] if u.name in setting.fixed else forms(u, goal.among, bool(samples))
        for u in units
    }
    candidates = solve_candidates(
        net, units, setting.stats, scores, tried, setting.fixed, setting.input_bits, count, setting.store, progress
    )
    allocator = Allocator(net, setting.found, candidates, setting.grids, setting.about)
    macs = sum(_dense_macs(u, setting.stats[u.name], count) for u in units)
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


def _dense_macs(unit: Unit, stats: LayerStats, samples: int) -> int:
    rows, cols = unit.view.matrix_shape
    return round(int(stats.samples.max()) / max(samples, 1) * rows * cols)


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
