"""From candidates to a policy: one candidate for every weight, judged as it will be used.

Stage one of the unified two-stage framework (Pattern Recognition 140, 2023; MPQCO, 2110.06554): a second-order score
of every candidate and a multiple-choice knapsack. Its prediction of a whole policy is checked, not trusted: the chosen
weights are put in place, statistics are corrected in order, and the distance to the dense outputs is measured on
samples that no solve has seen. Where we differ: (1) the knapsack is solved exactly; (2) the score is then calibrated in
place: for each unit, one step up is measured against what the score promised, and the knapsack is solved again with the
corrected promises (after the learned layer coefficients of SPDY, Frantar and Alistarh, 2201.13096, which are found by
random search); (3) at last moves between two units are tried, the most promising first, and kept where the measured
distance falls. Only measured policies are ever taken, so the best so far is valid at any time.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.activations import ActivationGrid, simulate
from featherweight.candidates import Candidate
from featherweight.errors import UsageError
from featherweight.knapsack import Menu, Policy, hull, optimum, within
from featherweight.layers import Unit
from featherweight.repair.correct import Reference

Choices: TypeAlias = tuple[int, ...]
TRUST = 4.0  # a unit's score is corrected by at most this factor, up or down
ENOUGH = 0.998  # of the distance: what falls less may be noise
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

    def __call__(self, choices: Choices) -> float:
        assert self._reference.outputs is not None
        lost = self._reference.outputs.distance(self.network(choices))
        return lost if np.isfinite(lost) else np.inf

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
    trust: what each unit's score was multiplied with in the end. measured: how many policies were."""

    choices: Choices
    loss: float
    first: float
    trust: tuple[float, ...]
    measured: int


@final
@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A knapsack to be solved: menus with a cost for each limit."""

    menus: tuple[Menu, ...]
    limits: tuple[int, ...]

    def solve(self, trust: np.ndarray | None = None) -> Choices:
        """The best policy within the limits, each menu's losses multiplied with its trust.

        Raises:
            InfeasibleError: there is none.
        """
        menus = self.menus
        if trust is not None:
            menus = [Menu(m.costs, m.losses * t) for m, t in zip(menus, trust, strict=True)]
        if len(self.limits) == 1:
            with suppress(UsageError):  # too many different sums for the exact table
                return optimum(menus, self.limits[0]).choices
        return within(menus, self.limits).choices

    def fits(self, choices: Choices) -> bool:
        costs = Policy.of(self.menus, choices).costs
        return all(c <= limit for c, limit in zip(costs, self.limits, strict=True))


def search(
    task: Task, judge: Callable[[Choices], float], most: int, on_measured: Callable[[int, int], bool] = lambda *_: True
) -> Found:
    """Improve the score's policy with at most `most` measured ones, or until nothing helps.

    Args:
        on_measured: told how many were measured, of how many; false ends the search.
    """
    measured: dict[Choices, float] = {}
    over = False

    def loss_of(choices: Choices) -> float:
        nonlocal over
        if choices not in measured:
            measured[choices] = judge(choices)
            over = not on_measured(len(measured), most) or len(measured) >= most
        return measured[choices]

    hulls = [hull(Menu(m.costs[:, :1], m.losses)) for m in task.menus]
    best = task.solve()
    first = loss = loss_of(best)
    trust = np.ones(len(task.menus))
    while not over and len(measured) + len(hulls) < most:  # calibrate the score around the best policy, solve again
        for i, menu in enumerate(task.menus):
            up = _next(menu, hulls[i], best[i], +1)
            if up is not None and not over:
                promised = menu.losses[best[i]] - menu.losses[up]
                kept = (loss - loss_of(_with(best, i, up))) / promised
                trust[i] = np.clip(kept, 1 / TRUST, TRUST)
        again = task.solve(trust)
        if over or loss_of(again) >= loss * ENOUGH:
            break
        best, loss = again, loss_of(again)
    failures = 0
    while not over and failures < TRIES * len(hulls):
        moves = [m for m in _moves(task, hulls, trust, best) if m not in measured]
        failures = failures if moves else TRIES * len(hulls)
        for move in moves:
            if loss_of(move) < loss * ENOUGH:
                best, loss, failures = move, loss_of(move), 0
                break
            failures += 1
            if over or failures >= TRIES * len(hulls):
                break
    for choices in measured:  # the probes for calibration go beyond the limits, but not all
        if measured[choices] < loss and task.fits(choices):
            best, loss = choices, measured[choices]
    return Found(best, loss, first, tuple(trust.tolist()), len(measured))


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
