from itertools import pairwise

import numpy as np
import pytest

from featherweight.errors import InfeasibleError, UsageError
from featherweight.knapsack import Menu, Policy, floor, front, optimum, useful, within
from tests.reference import knapsack as oracle


def menus(seed: int, units: int = 5, candidates: int = 4, budgets: int = 1, step: int = 1) -> list[Menu]:
    make = np.random.default_rng(seed)
    sizes = make.integers(1, candidates + 1, units)
    scales = 10.0 ** make.integers(-3, 3, units)
    costs = [make.integers(0, 30, (n, budgets)) * step for n in sizes]
    return [Menu(c, make.normal(size=len(c)) * scale) for c, scale in zip(costs, scales, strict=True)]


def tried(chosen: list[Menu], limits: list[int]) -> float:
    return oracle.best([m.costs for m in chosen], [m.losses for m in chosen], limits)


@pytest.mark.parametrize("step", [1, 7])
@pytest.mark.parametrize("seed", range(30))
def test_nothing_beats_the_optimum(seed, step):
    chosen = menus(seed, step=step)
    low = floor(chosen)[0]
    for budget in (low, low + 3 * step, low + 11 * step + 2, low + 40 * step, low + 1000 * step):
        found = optimum(chosen, budget)
        assert found.costs[0] <= budget
        assert found.loss == pytest.approx(tried(chosen, [budget]), rel=1e-12, abs=1e-12)
        assert within(chosen, [budget]).costs[0] <= budget
        assert within(chosen, [budget]).loss == pytest.approx(found.loss, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("seed", range(30))
def test_nothing_within_several_budgets_is_better(seed):
    chosen = menus(seed, budgets=3)
    middle = [int(np.mean([m.costs[:, b].mean() for m in chosen]) * len(chosen)) for b in range(3)]
    for limits in (middle, [2 * x for x in middle], [middle[0], 10_000, middle[2]]):
        expected = tried(chosen, limits)
        if np.isinf(expected):
            with pytest.raises(InfeasibleError, match="no policy stays within"):
                within(chosen, limits)
            continue
        found = within(chosen, limits)
        assert all(c <= limit for c, limit in zip(found.costs, limits, strict=True))
        largest = max(float(np.ptp(m.losses)) for m in chosen)
        assert found.loss == pytest.approx(expected, rel=1e-5, abs=1e-5 * largest)


@pytest.mark.parametrize("seed", range(30))
def test_the_front_is_monotone_and_optimal_at_its_points(seed):
    chosen = menus(seed)
    found = front(chosen)
    assert found[0].costs[0] == floor(chosen)[0]
    assert found[-1].loss == pytest.approx(sum(m.losses.min() for m in chosen))
    slopes = []
    for a, b in pairwise(found):
        assert b.costs[0] > a.costs[0]
        assert b.loss < a.loss
        assert sum(x != y for x, y in zip(a.choices, b.choices, strict=True)) == 1
        slopes.append((b.loss - a.loss) / (b.costs[0] - a.costs[0]))
    assert slopes == sorted(slopes)
    for policy in found:
        assert policy.loss == pytest.approx(tried(chosen, list(policy.costs)), rel=1e-12, abs=1e-12)


def test_many_units_and_bytes():
    """The optimum is never worse than the front's last policy that fits, and hardly better."""
    make = np.random.default_rng(0)
    bits = np.arange(1, 9)
    chosen = [
        Menu.of((bits * int(n) // 8).tolist(), (4.0**-bits * weight).tolist())
        for n, weight in zip(make.integers(432, 36_864, 60), 10.0 ** make.normal(size=60), strict=True)
    ]
    budget = sum(int(m.costs[3, 0]) for m in chosen)
    best, fits = optimum(chosen, budget), [p for p in front(chosen) if p.costs[0] <= budget][-1]
    assert 0.95 * budget < fits.costs[0] <= best.costs[0] <= budget
    assert best.loss <= fits.loss <= 1.03 * best.loss
    uniform = sum(m.losses[3] for m in chosen)
    assert best.loss < 0.8 * uniform


def test_beaten_candidates_are_dropped():
    menu = Menu.of([5, 3, 3, 9, 4, 3], [1.0, 2.0, 2.0, 0.5, 2.5, 3.0])
    assert useful(menu).tolist() == [1, 0, 3]
    several = Menu(np.array([[1, 9], [2, 1], [2, 9], [1, 9]]), np.array([1.0, 1.0, 1.0, 1.0]))
    assert useful(several).tolist() == [0, 1]


def test_a_budget_below_the_floor_names_the_floor():
    chosen = [Menu.of([4, 9], [1.0, 0.0]), Menu.of([6], [0.0])]
    assert floor(chosen) == [10]
    assert optimum(chosen, 10).choices == (0, 0)
    with pytest.raises(InfeasibleError, match="smallest reachable cost is 10"):
        optimum(chosen, 9)


def test_bad_menus_are_refused():
    for costs, losses, said in (
        ([], [], "needs int64 costs"),
        ([1, 2], [0.0], "needs int64 costs"),
        ([-1], [0.0], "at least 0"),
        ([1], [float("nan")], "finite"),
    ):
        with pytest.raises(UsageError, match=said):
            Menu.of(costs, losses)
    with pytest.raises(UsageError, match="a menu at least"):
        optimum([], 3)
    with pytest.raises(UsageError, match="one cost"):
        front([Menu(np.ones((1, 2), np.int64), np.zeros(1))])
    with pytest.raises(UsageError, match="2 costs"):
        within([Menu.of([1], [0.0])], [3, 4])
    with pytest.raises(UsageError, match="too many possible sums"):
        optimum([Menu.of([0, 1], [1.0, 0.0]), Menu.of([0, 1 << 40], [1.0, 0.0])], 1 << 41)


@pytest.mark.parametrize("seed", range(10))
def test_large_costs_stay_within_their_limits(seed):
    make = np.random.default_rng(seed)
    chosen = [Menu(make.integers(0, 10**8, (5, 2)), make.random(5)) for _ in range(5)]
    limits = [2 * 10**8, 2 * 10**8]
    while (expected := tried(chosen, limits)) < np.inf:
        found = within(chosen, limits)
        assert all(c <= limit for c, limit in zip(found.costs, limits, strict=True))
        assert found.loss == pytest.approx(expected, rel=1e-5)
        limits = [c - 1 for c in found.costs]
    with pytest.raises(InfeasibleError):
        within(chosen, limits)
    assert within([Menu.of([10_000_001, 1], [0.0, 1.0])], [10_000_000]).costs == (1,)


def test_a_policy_sums_up():
    chosen = menus(3, units=3, budgets=2)
    policy = Policy.of(chosen, [0, 0, 0])
    assert policy.costs == tuple(int(sum(m.costs[0, b] for m in chosen)) for b in range(2))
