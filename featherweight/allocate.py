"""One budget for the whole network: which method, at which ratio, for every weight.

    candidates + limits -> knapsack -> policy -> measured, improved -> methods

The second stage, solving the chosen methods well, is the ordinary line of `pipeline.compress`.
"""

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import nn

from featherweight.activations import ActivationGrid
from featherweight.allocator import MARGIN, Allocation, Allocator, Point, chosen, spread, with_margin
from featherweight.artifact.schema import Artifact, StoredUnit
from featherweight.candidates import (
    FLOAT,
    Candidate,
    solve_candidates,
    ties,
    tried,
    uses,
)
from featherweight.chains import as_chains, chains_of
from featherweight.counting import LAYERS, Place, places, single
from featherweight.coupling import couplings
from featherweight.data import Batch, cut, split
from featherweight.database import Database, fingerprint
from featherweight.errors import InfeasibleError, UsageError
from featherweight.joint import joined
from featherweight.latency import Timer
from featherweight.layers import Scan, Unit
from featherweight.methods import Method, Solution
from featherweight.packing import DIGITS, FULL
from featherweight.repair.correct import Reference
from featherweight.scores import CORRECTING, Scores, words
from featherweight.search import Choices, Judge, Task, search
from featherweight.sharing import fitted
from featherweight.stats import LayerStats
from featherweight.target import Baselines, Goal, Score
from featherweight.weights import Factors
from featherweight.weights.coded import stored_bytes

EFFORT = 4e12  # multiply-adds that the search may spend on measuring policies
SECONDS = 60  # that this takes, about
MOST, LEAST = 80, 24  # policies that it measures

Progress: TypeAlias = Callable[[str, int, int], None]


def effort(macs: int, samples: int) -> int:
    """How many policies to measure, each with that many multiply-adds for a sample."""
    return int(min(max(EFFORT / max(3 * macs * samples, 1), LEAST), MOST))


Clocks: TypeAlias = Callable[[Goal, nn.Module, Batch, Sequence[Unit], Mapping[str, tuple[str, ...]]], Timer]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """What the stage works with. samples: none means without data. stats: of the samples that may be solved on. fixed:
    methods that are not for choice, by unit name. grids, input_bits: of the units' inputs. base: bytes of the dense
    network. folder: empty, for gradients that are large. correcting: whether statistics will be. basis: a fingerprint
    of network and samples, None where nothing is kept. evaluate: for the points of a front. clock: makes the one that a
    limit of latency is about."""

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
    folder: Path
    clock: Clocks
    correcting: bool = True
    basis: str | None = None
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None


@final
@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """What came of it: `choices`, in `allocator`, and what is needed to choose again under a tighter limit."""

    allocator: Allocator
    limits: dict[str, int]
    task: Task
    choices: Choices
    pruned: float
    trust: np.ndarray
    outcome: Allocation

    @property
    def methods(self) -> dict[str, Method]:
        """The best forms of the chosen methods, by unit name."""
        return {name: c.final for name, c in self.allocator.taken(self.choices).items()}

    @property
    def bytes(self) -> int:
        """Predicted, of the whole file."""
        return with_margin(self.allocator.size(self.choices))

    def recounted(self, solutions: Mapping[str, Solution], small: nn.Module) -> "Stage":
        """With MACs, BOPs and latency of what is stored, and of the network that it makes."""
        weights = {name: s.weight for name, s in solutions.items()}
        rows = tuple(replace(c, bytes=stored_bytes(weights[c.name])) for c in self.outcome.chosen)
        counted, clock, took = self.allocator.counted(weights), self.allocator.clock, {}
        if clock is not None:
            units = [StoredUnit(u.names, u.view, weights[u.name], "") for u in self.allocator.found.units]
            made = Artifact(tuple(u for u in units if isinstance(u.weight, Factors)), {}, ())
            quick = as_chains(copy.deepcopy(small), made, chains_of(small, made, example=clock.batch))
            took = {"latency": clock.network(quick)}
        return replace(self, outcome=replace(self.outcome, chosen=rows, **counted, **took))

    def over(self, size: int = 0) -> dict[str, int]:
        """By how much a file of `size` bytes, and the network as it was counted last, miss each limit, those that hold
        left out."""
        there = {"bytes": size} | {b: getattr(self.outcome, b) for b in ("macs", "bops", "latency", "params")}
        return {b: there[b] - limit for b, limit in self.outcome.limits.items() if there[b] > limit}

    def tighter(self, over: Mapping[str, int]) -> "Stage":
        """With so much less of each budget than now, of bytes a little more, as no two policies' headers are equally
        long: by the score, nothing is measured again.

        Raises:
            InfeasibleError: nothing is that small.
        """
        less = {b: n + (MARGIN // 2 if b == "bytes" else 0) for b, n in over.items()}
        now = self.limits | ({"bytes": min(self.limits["bytes"], self.bytes)} if "bytes" in less else {})
        limits = {b: limit - less.get(b, 0) for b, limit in now.items()}
        if "latency" in less:  # the table is only about right: its floor is worth a try
            limits["latency"] = max(limits["latency"], self.allocator.floor(["latency"])["latency"])
        task = self.allocator.task(limits).weighted(self.pruned)
        choices = task.solve(self.trust)
        rows = chosen(self.allocator, choices)
        outcome = replace(self.outcome, chosen=rows, predicted=sum(c.rise for c in rows), measured=None)
        return replace(self, limits=limits, task=task, choices=choices, outcome=outcome)


def allocate(setting: Setting, goal: Goal, progress: Progress, measuring: bool = True) -> Stage:
    """Score, choose, and with `measuring` measure and improve. Where MACs or latency are limited and everything may be
    chosen, channels are removed or layers become factors, whichever comes closer to the dense network: the two are not
    mixed, as a layer of factors reads every channel. In int8 channels are, as factors on grids take minutes to find.

    Raises:
        InfeasibleError: a limit is below its floor.
        UsageError: MACs, BOPs or latency are limited and there are no data to count them on; weights are tied that
            cannot be; the score cannot be had from these data.
    """
    if goal.among != "all" or not goal.structured or goal.runtime == "int8":
        return _allocated(setting, goal, progress, measuring)
    found: list[Stage] = []
    refused: list[InfeasibleError] = []
    for among in ("both", "factors"):
        folder = setting.folder / among
        folder.mkdir()
        try:
            found.append(_allocated(replace(setting, folder=folder), replace(goal, among=among), progress, measuring))
        except InfeasibleError as error:
            refused.append(error)
    if not found:
        raise refused[0]
    return min(found, key=lambda s: s.outcome.predicted if s.outcome.measured is None else s.outcome.measured)


def _allocated(setting: Setting, goal: Goal, progress: Progress, measuring: bool) -> Stage:
    """With one kind of candidates."""
    net, units, samples = setting.net, setting.found.units, setting.samples
    if not samples and (goal.structured or goal.bops is not None):
        raise UsageError("a target for MACs, BOPs or latency needs data: they depend on the size of the inputs")
    solving, judging = split(samples) if samples else ([], [])
    solving = solving if judging else list(samples)
    count = sum(b.size for b in solving)
    (tries, fixed), groups = tried(units, setting.fixed, goal, bool(samples)), ties(units, goal.tied)
    tries = fitted(net, units, setting.stats, tries, setting.store, progress)
    coupled = couplings(net, cut(solving[0], 8)[0], units) if goal.structured else {}
    tries, groups = joined(net, units, setting.stats, tries, groups, fixed, coupled)
    setting = replace(setting, fixed={name: tries[name][0] for name in fixed})
    positions = {u.name: uses(setting.stats[u.name], count) for u in units}
    macs = sum(round(positions[u.name] * u.params) for u in units if u.kind != "embedding")
    clock = None if goal.latency is None else setting.clock(goal, net, solving[0], units, coupled)
    params = sum(p.numel() for p in net.parameters())
    limits = goal.limits(setting.base.fp32, macs, macs * FLOAT**2, 0 if clock is None else clock.dense, params)
    calls = _calls(net, units, samples)
    candidates, what = _candidates(setting, tries, groups, goal.score, solving, judging, progress, clock, calls)
    known = setting.grids, setting.about, coupled, positions, setting.input_bits, clock, calls
    digits = DIGITS[-2] if judging and setting.correcting else FULL  # mostly enough: more would miss the target
    allocator = Allocator(net, setting.found, candidates, groups, *known, digits)
    task = allocator.task(limits)
    judge = _judge(setting, candidates, judging) if measuring else None
    if judge is None:
        choices = task.solve()
        first, measured, policies, pruned, trust = None, None, 0, 1.0, np.ones(len(groups))
    else:
        most = goal.measurements or effort(macs, sum(b.size for b in judging) + CORRECTING)

        def told(done: int, total: int) -> bool:
            progress("search", done, total)
            return True

        spare = 1 if allocator.cuts() and most > 1 else 0  # for what comes after
        found = search(task, lambda choices: judge(allocator.each(choices)), most - spare, told)
        known = math.isfinite(found.loss)
        choices, first, measured = found.choices, found.first if known else None, found.loss if known else None
        policies, pruned, trust = found.measured, found.pruned, np.array(found.trust)
        unused = frozenset(allocator.cuts()) - frozenset(allocator.cuts(choices))
        if unused and known and policies < most:  # the search kept bytes free for their books
            other = allocator.closed(limits, unused)
            again = other.weighted(pruned).solve(trust)
            loss = float(judge(allocator.each(again)).mean())
            policies += 1
            if loss < found.loss:
                task, choices, measured = other, again, loss
    if samples and measuring and measured is None:
        cause = "outputs cannot be compared" if judging else "the data cannot be cut to hold some samples back"
        what += f"; {cause}, so no policy was measured"
    points = _front(allocator, judge, setting.evaluate, next(iter(limits)), pruned, progress) if goal.front else ()
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
        **allocator.costs(choices, ["macs", "bops"]),
        dense_macs=macs,
        latency=0 if clock is None else allocator.overhead + allocator.costs(choices, ["latency"])["latency"],
        dense_latency=0 if clock is None else clock.dense,
        params=allocator.costs(choices, ["params"])["params"] + allocator.others,
        dense_params=params,
    )
    return Stage(allocator, limits, task, choices, pruned, trust, outcome)


def _candidates(
    setting: Setting,
    tries: Mapping[str, Sequence[Method]],
    groups: Sequence[Sequence[int]],
    how: Score,
    solving: Sequence[Batch],
    judging: Sequence[Batch],
    progress: Progress,
    clock: Timer | None,
    calls: Mapping[str, tuple[Place, ...]],
) -> tuple[dict[str, tuple[Candidate, ...]], str]:
    """Candidates by unit name, and what their scores are, for people: on samples that no candidate was solved on, where
    there are any. Scores are kept in the database, too."""
    units, basis = setting.found.units, setting.basis
    own = [[u.name, list(tries[u.name])] for u in units]
    key = None if basis is None else fingerprint("rises", basis, how, own, groups, setting.grids, setting.correcting)
    kept = None if key is None else setting.store.tensors(key)
    if kept is not None:
        order, missing = iter(kept["rises"].tolist()), [units[i].name for i in kept["missing"].tolist()]
        found = _solved(setting, tries, groups, solving, lambda *_: next(order), progress, clock, calls)
        return _on_one_scale(found, missing), words(how, len(missing))
    scores = Scores.of(
        how, setting.net, judging or solving, units, setting.folder, progress, setting.grids, setting.correcting
    )
    rises: list[float] = []

    def rise(unit: Unit, solution: Solution) -> float:
        rises.append(scores.rise(unit, solution))
        return rises[-1]

    found = _solved(setting, tries, groups, solving, rise, progress, clock, calls)
    if key is not None and scores.what == words(how, len(scores.missing)):
        missing = [i for i, u in enumerate(units) if u.name in scores.missing]
        tensors = {"rises": torch.tensor(rises, dtype=torch.float64), "missing": torch.tensor(missing).long()}
        setting.store.keep(key, tensors)
    return _on_one_scale(found, scores.missing), scores.what


def _on_one_scale(
    found: dict[str, tuple[Candidate, ...]], missing: Collection[str]
) -> dict[str, tuple[Candidate, ...]]:
    """Relative errors of the `missing` units brought to what such errors of the other units rise by, half of them less
    and half of them more."""
    known = [c for name, rows in found.items() if name not in missing for c in rows if c.solution.relative_error > 0]
    scale = float(np.median([c.rise / c.solution.relative_error for c in known])) if known else 1.0
    return found | {name: tuple(replace(c, rise=c.rise * scale) for c in found[name]) for name in missing}


def _solved(
    setting: Setting,
    tries: Mapping[str, Sequence[Method]],
    groups: Sequence[Sequence[int]],
    solving: Sequence[Batch],
    rise: Callable[[Unit, Solution], float],
    progress: Progress,
    clock: Timer | None,
    calls: Mapping[str, tuple[Place, ...]],
) -> dict[str, tuple[Candidate, ...]]:
    count = sum(b.size for b in solving)
    layers = setting.net, setting.found.units, setting.stats
    known = rise, tries, setting.fixed, setting.input_bits, count, setting.store, progress
    return solve_candidates(*layers, *known, groups, clock, calls)


def _calls(net: nn.Module, units: Sequence[Unit], samples: Sequence[Batch]) -> dict[str, tuple[Place, ...]]:
    """Where the units' layers are called for one sample, by unit name; nothing without data."""
    if not samples:
        return {}
    owners = {u.name: u.name.rpartition(".")[0] for u in units if u.kind not in ("attention", "embedding")}
    plain = {n: place for n, place in owners.items() if isinstance(net.get_submodule(place), LAYERS)}
    seen = places(net, single(samples[0]), sorted(set(plain.values())))
    return {n: seen[place] for n, place in plain.items()}


def _judge(setting: Setting, candidates: Mapping[str, tuple[Candidate, ...]], judging: Sequence[Batch]) -> Judge | None:
    """None where the network's outputs cannot be compared."""
    if not judging:
        return None
    reference = Reference.of(setting.net, setting.samples, setting.found.units, most=CORRECTING)
    assert reference.outputs is not None
    if not math.isfinite(reference.outputs.distance(setting.net)):
        return None
    return Judge(setting.net, reference, setting.found.units, candidates, setting.grids, setting.correcting)


def _front(
    allocator: Allocator,
    judge: Judge | None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None,
    budget: str,
    pruned: float,
    progress: Progress,
) -> tuple[Point, ...]:
    """From small to large files."""
    points = sorted(allocator.front(budget, pruned), key=lambda p: p[1].bytes)
    if judge is not None:
        for done, i in enumerate(known := spread(points)):
            progress("front", done, len(known))
            choices, point = points[i]
            measured = float(judge(allocator.each(choices)).mean())
            metrics = None if evaluate is None else evaluate(copy.deepcopy(judge.network(allocator.each(choices))))
            points[i] = choices, replace(point, measured=measured, metrics=metrics)
            progress("front", done + 1, len(known))
    return tuple(point for _, point in points)
