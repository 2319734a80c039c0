import itertools
from dataclasses import replace

import numpy as np
import pytest

from featherweight.errors import InfeasibleError
from featherweight.knapsack import Menu
from featherweight.search import ENOUGH, Choices, Task, search


def task_of(seed: int, units: int = 4, candidates: int = 4, share: float = 0.5) -> Task:
    random = np.random.default_rng(seed)
    menus = []
    for _ in range(units):
        costs = np.cumsum(random.integers(1, 9, candidates))
        losses = np.cumsum(random.random(candidates))[::-1].copy()
        menus.append(Menu.of(costs.tolist(), losses.tolist()))
    low, high = (sum(int(f(m.costs)) for m in menus) for f in (np.min, np.max))
    return Task(tuple(menus), (int(low + share * (high - low)),))


def everything(task: Task) -> list[Choices]:
    return [c for c in itertools.product(*(range(len(m.losses)) for m in task.menus)) if task.fits(c)]


@pytest.mark.parametrize("seed", range(8))
def test_where_the_score_is_right_its_own_policy_stays(seed):
    task = task_of(seed)

    def judge(choices: Choices) -> float:
        return sum(float(m.losses[c]) for m, c in zip(task.menus, choices, strict=True))

    found = search(task, lambda c: np.array([judge(c)]), 100)
    assert found.loss == found.first == pytest.approx(min(judge(c) for c in everything(task)))


@pytest.mark.parametrize("seed", range(8))
def test_wrong_scales_of_the_score_are_found_out(seed):
    """Each unit's true loss is its score times something else: measuring gets most of the way to the best policy."""
    task = task_of(seed, units=5)
    factors = np.random.default_rng(seed + 100).choice([0.3, 1.0, 3.0], 5)

    def judge(choices: Choices) -> float:
        return sum(float(f * m.losses[c]) for f, m, c in zip(factors, task.menus, choices, strict=True))

    found = search(task, lambda c: np.array([judge(c)]), 300)
    best = min(judge(c) for c in everything(task))
    assert task.fits(found.choices)
    assert judge(found.choices) == found.loss <= found.first
    assert found.loss - best <= 0.35 * (found.first - best) + 1e-12


@pytest.mark.parametrize("most", [1, 3, 7, 40])
def test_no_more_is_measured_than_allowed_and_the_best_so_far_is_valid(most):
    task = task_of(3, units=6)
    seen: list[tuple[Choices, float]] = []
    random = np.random.default_rng(0)

    def judge(choices: Choices) -> np.ndarray:
        seen.append((choices, float(random.random())))
        return np.array([seen[-1][1]])

    found = search(task, judge, most)
    assert len(seen) == found.measured <= most
    assert len({c for c, _ in seen}) == len(seen), "measured twice"
    assert task.fits(found.choices)
    assert found.loss <= found.first
    assert dict(seen)[found.choices] == found.loss
    assert found.first == seen[0][1]


def test_a_caller_can_end_it():
    calls = []

    def told(done: int, total: int) -> bool:
        calls.append((done, total))
        return done < 5

    found = search(task_of(1, units=6), lambda c: np.array([float(sum(c) % 7)]), 50, told)
    assert found.measured == 5
    assert calls == [(i, 50) for i in range(1, 6)]


def test_several_limits_hold_together():
    random = np.random.default_rng(2)
    menus = tuple(Menu(random.integers(1, 20, (5, 2)), random.random(5)) for _ in range(4))
    task = Task(menus, (40, 35))
    found = search(task, lambda c: np.random.default_rng(sum(c)).random(3), 60)
    assert task.fits(found.choices)
    with pytest.raises(InfeasibleError):
        Task(menus, (1, 35)).solve()


def test_what_may_be_chance_changes_nothing():
    task = task_of(5, units=6)
    random = np.random.default_rng(1)
    found = search(task, lambda c: 1 + random.normal(size=200), 60)
    assert found.choices == task.solve()


@pytest.mark.parametrize("seed", range(8))
def test_removed_weights_count_for_what_they_measure(seed):
    """Every second candidate removes weights and truly loses four times its score."""
    plain = task_of(seed, units=6, candidates=6)
    task = replace(plain, pruned=tuple(np.arange(6) % 2 == 1 for _ in plain.menus))
    true = task.weighted(4.0)

    def judge(choices: Choices) -> float:
        return sum(float(m.losses[c]) for m, c in zip(true.menus, choices, strict=True))

    found = search(task, lambda c: np.array([judge(c)]), 4)  # no more than the factors take
    assert found.loss == pytest.approx(judge(true.solve()), rel=2 * (1 - ENOUGH))
    assert found.loss <= found.first
    assert (found.pruned == 1.0) == (found.loss == found.first)
