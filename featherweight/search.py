"""From candidates to a policy: one candidate for every weight, judged as it will be used.

Stage one of the unified two-stage framework (Pattern Recognition 140, 2023; MPQCO, 2110.06554): a second-order score of
every candidate and a multiple-choice knapsack. Its prediction of a whole policy is checked, not trusted: the chosen
weights are put in place, statistics are corrected in order, and the distance to the dense outputs is measured on samples
that no solve has seen. Where we differ: (1) the knapsack is solved exactly; (2) the score is then calibrated in place:
for each unit, one step up is measured against what the score promised, and the knapsack is solved again with the
corrected promises (after the learned layer coefficients of SPDY, Frantar and Alistarh, 2201.13096, which are found by
random search); (3) at last moves between two units are tried, the most promising first, and kept where the measured
distance falls. Only measured policies are ever taken, so the best so far is valid at any time.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, final

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.activations import ActivationGrid, simulate
from featherweight.candidates import Candidate
from featherweight.knapsack import Menu, Policy
from featherweight.layers import Unit
from featherweight.repair.correct import Reference

Choices: TypeAlias = tuple[int, ...]
TRUST = 4.0  # a unit's score is corrected by at most this factor, up or down
TRIES = 3  # moves in a row, without success, for each unit


@final
class Judge:
    """The measured distance to the dense outputs of any choice of candidates. Each choice is measured once."""

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
        self.known: dict[Choices, float] = {}

    def __call__(self, choices: Choices) -> float:
        if choices not in self.known:
            self.known[choices] = self._measured(choices)
        return self.known[choices]

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

    def _measured(self, choices: Choices) -> float:
        assert self._reference.outputs is not None
        lost = self._reference.outputs.distance(self.network(choices))
        return lost if np.isfinite(lost) else np.inf


@final
@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """choices: the best policy that was measured, loss: its distance. first: that of the score's own policy. trust: what
    each unit's score was multiplied with, 1 where it was not checked. measured: how many policies were."""

    choices: Choices
    loss: float
    first: float
    trust: tuple[float, ...] = field(default=())
    measured: int = 0


Solver: TypeAlias = Callable[[Sequence[Menu]], Policy]
"""The best policy within the budget for given menus."""


def search(
    menus: Sequence[Menu],
    solve: Solver,
    fits: Callable[[Choices], bool],
    judge: Callable[[Choices], float],
    seconds: float,
    progress: Callable[[str, int, int], None],
) -> Found:
    """Improve the score's policy until nothing helps or the time is over."""
    start = time.perf_counter()

    def spent() -> float:
        return time.perf_counter() - start

    def report() -> None:
        progress("search", min(int(spent()), int(seconds)), int(seconds))

    best = solve(menus).choices
    first = loss = judge(best)
    trust = np.ones(len(menus))
    while spent() < seconds:  # calibrate the score around the best policy, solve again
        measured = _checked(menus, best, loss, judge, lambda: spent() < seconds, report)
        trusted = _normal(trust * measured)
        again = solve(_scaled(menus, trusted)).choices
        lower = judge(again) < loss
        trust = trusted
        if not lower:
            break
        best, loss = again, judge(again)
    tried = 0
    while spent() < seconds and tried < TRIES * len(menus):
        moves = [m for m in _moves(_scaled(menus, trust), best) if fits(m) and m not in judge_known(judge)]
        if not moves:
            break
        for move in moves:
            report()
            if judge(move) < loss:
                best, loss, tried = move, judge(move), 0
                break
            tried += 1
            if spent() >= seconds or tried >= TRIES * len(menus):
                break
    progress("search", int(seconds), int(seconds))
    return Found(best, loss, first, tuple(trust.tolist()), len(judge_known(judge)))
