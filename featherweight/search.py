"""From candidates to a policy: one candidate for every weight, judged as it will be used.

Stage one of the unified two-stage framework (Pattern Recognition 140, 2023; MPQCO, 2110.06554): a second-order score
of every candidate and a multiple-choice knapsack. Its prediction of a whole policy is checked, not trusted: the chosen
weights are put in place, statistics are corrected in order, and the distance to the dense outputs is measured on
samples that no solve has seen. Another policy takes its place only where that falls by more than chance. Where we
differ: (1) the knapsack is solved exactly; (2) removed weights may count for more than the score says, by the factor
whose policy measures best: their errors add up over the layers, those of grids less so; (3) the score is then
calibrated in place: for each unit, one step up is measured against what the score promised, and the knapsack is solved
again with the corrected promises (after the learned layer coefficients of SPDY, Frantar and Alistarh, 2201.13096, which
are found by random search); (4) at last moves between two units are tried, the most promising first. Only measured
policies are ever taken, so the best so far is valid at any time.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeAlias, final

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.activations import ActivationGrid, simulate
from featherweight.candidates import Candidate
from featherweight.errors import InfeasibleError, UsageError
from featherweight.knapsack import Menu, Policy, hull, optimum, within
from featherweight.layers import Unit
from featherweight.repair.correct import Reference

Choices: TypeAlias = tuple[int, ...]
PRUNED = (2.0, 4.0, 16.0)  # factors that are tried on the scores of removed weights
TRUST = 4.0  # a unit's score is corrected by at most this factor, up or down
TEMPERATURE = 4.0  # of the measured divergence: at 1, a few samples of a trained network carry most of it
SURE = 2.0  # standard errors: of a hundred measured policies the lowest is often so by chance
ENOUGH = 0.998  # of the distance: what falls less is not worth the change
TRIES = 1  # moves without success in a row, for each unit


@final
class Judge:
    """The measured distance to the dense outputs of any choice of candidates."""

    def __init__(
        self,
        net: nn.Module,
        reference: Reference,
        units: Sequence[Unit],
        candidates: Mapping[str, Sequence[Candidate]],
        grids: Mapping[str, ActivationGrid],
        correcting: bool = True,
    ) -> None:
        self._small = copy.deepcopy(net)
        simulate(self._small, grids)
        self._reference = reference
        self._units = units
        self._candidates = candidates
        self._correcting = correcting
        parameters = {n for u in units for n in u.names}
        state = self._small.state_dict()
        self._rest = {n: t.clone() for n, t in state.items() if isinstance(t, Tensor) and n not in parameters}
        self._placed: list[int | None] = [None] * len(units)

    def __call__(self, choices: Choices) -> np.ndarray:
        """Numbers whose mean is the distance at TEMPERATURE, see `DenseOutputs.parts`; infinity where outputs cannot be
        compared."""
        assert self._reference.outputs is not None
        parts = self._reference.outputs.parts(self.network(choices), TEMPERATURE)
        return np.array([np.inf]) if parts is None else np.nan_to_num(parts.numpy(), nan=np.inf, posinf=np.inf)

    def network(self, choices: Choices) -> nn.Module:
        """The network with these candidates in place, corrected: valid until the next call."""
        self._small.load_state_dict(self._rest, strict=False)
        with torch.no_grad():
            for i, (unit, choice) in enumerate(zip(self._units, choices, strict=True)):
                if self._placed[i] != choice:
                    weight = self._candidates[unit.name][choice].solution.weight
                    self._small.get_parameter(unit.name).copy_(unit.view.tensor(weight.dense()))
                    self._placed[i] = choice
        if self._correcting:
            self._reference.correct(self._small)
        return self._small


@final
@dataclass(frozen=True, slots=True)
class Found:
    """choices: the best policy that was measured, loss: its distance. first: the distance of the score's own policy.
    pruned: what the scores of removed weights, trust: what each unit's scores were multiplied with in the end.
    measured: how many policies were."""

    choices: Choices
    loss: float
    first: float
    pruned: float
    trust: tuple[float, ...]
    measured: int


@final
@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A knapsack to be solved: menus with a cost for each limit. pruned: for each menu, (candidates,) bool, which
    remove weights. meets: whether a policy truly stays within the limits, where the menus' costs are only about right;
    safe: one that does."""

    menus: tuple[Menu, ...]
    limits: tuple[int, ...]
    pruned: tuple[np.ndarray, ...] = ()
    meets: Callable[[Choices], bool] | None = None
    safe: Choices | None = None

    def weighted(self, factor: float) -> "Task":
        """The scores of removed weights multiplied."""
        if not self.pruned:
            return self
        own = zip(self.menus, self.pruned, strict=True)
        return replace(self, menus=tuple(Menu(m.costs, m.losses * np.where(p, factor, 1.0)) for m, p in own))

    def solve(self, trust: np.ndarray | None = None) -> Choices:
        """The best policy within the limits, each menu's losses multiplied with its trust.

        Raises:
            InfeasibleError: there is none.
        """
        menus = self.menus
        if trust is not None:
            menus = [Menu(m.costs, m.losses * t) for m, t in zip(menus, trust, strict=True)]
        if self.meets is None:
            return self._within(menus, self.limits)
        for percent in range(100, 49, -2):
            with suppress(InfeasibleError):
                choices = self._within(menus, tuple(limit * percent // 100 for limit in self.limits))
                if self.meets(choices):
                    return choices
        if self.safe is not None:
            return self.safe
        raise InfeasibleError("no policy that was found truly stays within the limits")

    @staticmethod
    def _within(menus: Sequence[Menu], limits: tuple[int, ...]) -> Choices:
        if len(limits) == 1:
            with suppress(UsageError):  # too many different sums for the exact table
                return optimum(menus, limits[0]).choices
        return within(menus, limits).choices

    def fits(self, choices: Choices) -> bool:
        if self.meets is not None:
            return self.meets(choices)
        costs = Policy.of(self.menus, choices).costs
        return all(c <= limit for c, limit in zip(costs, self.limits, strict=True))


def search(
    task: Task,
    judge: Callable[[Choices], np.ndarray],
    most: int,
    on_measured: Callable[[int, int], bool] = lambda *_: True,
) -> Found:
    """Improve the score's policy with at most `most` measured ones, or until nothing helps.

    Args:
        judge: the loss of a policy as numbers whose mean it is, the same samples behind each; one policy replaces
            another where the mean of their differences is SURE standard errors above zero.
        on_measured: told how many were measured, of how many; false ends the search.
    """
    measured: dict[Choices, np.ndarray] = {}
    over = False

    def parts_of(choices: Choices) -> np.ndarray:
        nonlocal over
        if choices not in measured:
            measured[choices] = judge(choices)
            over = not on_measured(len(measured), most) or len(measured) >= most
        return measured[choices]

    best = task.solve()
    task = replace(task, safe=best)
    first, pruned, own = float(parts_of(best).mean()), 1.0, task
    for factor in PRUNED:
        if over:
            break
        other = own.weighted(factor).solve()
        if _is_lower(parts_of(other), parts_of(best)):
            best, pruned, task = other, factor, own.weighted(factor)
    hulls = [hull(Menu(m.costs[:, :1], m.losses)) for m in task.menus]
    trust = np.ones(len(task.menus))
    while not over and len(measured) + len(hulls) < most:  # calibrate the score around the best policy, solve again
        for i, menu in enumerate(task.menus):
            up = _next(menu, hulls[i], best[i], +1)
            if up is not None and not over:
                promised = menu.losses[best[i]] - menu.losses[up]
                gain, error = _gain(parts_of(best), parts_of(_with(best, i, up)))
                known = promised**2 / (promised**2 + error**2)  # what cannot be told from chance counts little
                trust[i] = np.clip(1 + known * (gain / promised - 1), 1 / TRUST, TRUST)
        again = task.solve(trust)
        if over or not _is_lower(parts_of(again), parts_of(best)):
            break
        best = again
    failures = 0
    while not over and failures < TRIES * len(hulls):
        moves = [m for m in _moves(task, hulls, trust, best) if m not in measured]
        failures = failures if moves else TRIES * len(hulls)
        for move in moves:
            if _is_lower(parts_of(move), parts_of(best)):
                best, failures = move, 0
                break
            failures += 1
            if over or failures >= TRIES * len(hulls):
                break
    return Found(best, float(parts_of(best).mean()), first, pruned, tuple(trust.tolist()), len(measured))


def _gain(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """How much lower the mean is after, and the standard error of that."""
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        return 0.0, np.inf
    differences = before - after
    count = len(differences)
    return float(differences.mean()), float(differences.std(ddof=1) / np.sqrt(count)) if count > 1 else 0.0


def _is_lower(after: np.ndarray, before: np.ndarray) -> bool:
    if not np.isfinite(before).all():
        return bool(np.isfinite(after).all())
    gain, error = _gain(before, after)
    return gain > max(SURE * error, (1 - ENOUGH) * float(before.mean()))


def _with(choices: Choices, unit: int, choice: int) -> Choices:
    return (*choices[:unit], choice, *choices[unit + 1 :])


def _next(menu: Menu, corners: Sequence[int], current: int, direction: int) -> int | None:
    """The nearest candidate on the hull that costs more (+1) or less (-1) than the current one, None at the end."""
    own = menu.costs[current, 0]
    if direction > 0:
        return next((c for c in corners if menu.costs[c, 0] > own and menu.losses[c] < menu.losses[current]), None)
    return next((c for c in reversed(corners) if menu.costs[c, 0] < own), None)


def _moves(task: Task, hulls: Sequence[Sequence[int]], trust: np.ndarray, best: Choices) -> list[Choices]:
    """One unit up, and where the limits ask for it another one down; what is promised most comes first."""
    ups, downs = [], []
    for i, menu in enumerate(task.menus):
        for direction, steps in ((+1, ups), (-1, downs)):
            step = _next(menu, hulls[i], best[i], direction)
            if step is not None:
                steps.append((i, step, float(trust[i] * (menu.losses[best[i]] - menu.losses[step]))))
    found = [(gain, _with(best, i, up)) for i, up, gain in ups]
    found += [
        (gain + other, _with(_with(best, i, up), j, down)) for i, up, gain in ups for j, down, other in downs if i != j
    ]
    fitting = [(gain, move) for gain, move in found if task.fits(move)]
    return [move for _, move in sorted(fitting, key=lambda m: -m[0])]
