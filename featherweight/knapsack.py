"""The best choice for every unit under a budget: the multiple-choice knapsack that a two-stage compression ends in.

Every unit has a menu of candidates, each with a loss and what it costs; one of each menu is taken, the sum of the costs
stays within the budget, and the sum of the losses is as small as can be. Three solvers, each for what it is best at:

    optimum  exact, one budget: a dynamic programme over every possible sum of costs
    front    all budgets at once: the lower convex hulls of the menus, merged (Sinha and Zoltners, "The Multiple-Choice
             Knapsack Problem", Operations Research 27, 1979); optimal at its own points, and close in between
    within   exact, several budgets together: an integer programme, solved by HiGHS
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from scipy.optimize import milp
from scipy.sparse import csr_array, vstack

from featherweight.errors import InfeasibleError, require

TABLE = 1 << 29  # bytes of the dynamic programme
GAP = 1e-6  # relative, within which HiGHS may stop
TIGHTER = (0.0, 3e-6, 3e-5)  # of a limit: HiGHS takes a sum for equal to it that is some millionths above


@final
@dataclass(frozen=True, slots=True, eq=False)
class Menu:
    """The candidates of one unit. costs: (candidates, budgets) int64, at least 0. losses: (candidates,) float64, any
    finite numbers, of which only differences count."""

    costs: np.ndarray
    losses: np.ndarray

    def __post_init__(self) -> None:
        fits = self.costs.ndim == 2 and self.costs.dtype == np.int64 and self.losses.shape == self.costs.shape[:1]
        require(fits and len(self.losses) > 0, "a menu needs int64 costs (candidates, budgets) and a loss each", self)
        require(bool((self.costs >= 0).all()), "costs must be at least 0", self.costs.min())
        require(bool(np.isfinite(self.losses).all()), "losses must be finite", self.losses)

    @classmethod
    def of(cls, costs: Sequence[int], losses: Sequence[float]) -> "Menu":
        """For one budget."""
        return cls(np.array(costs, np.int64).reshape(-1, 1), np.array(losses, np.float64))


@final
@dataclass(frozen=True, slots=True, eq=False)
class Policy:
    """choices: the candidate taken of each menu. costs: (budgets,) their sum. loss: their sum."""

    choices: tuple[int, ...]
    costs: tuple[int, ...]
    loss: float

    @classmethod
    def of(cls, menus: Sequence[Menu], choices: Sequence[int]) -> "Policy":
        taken = list(zip(menus, choices, strict=True))
        costs = np.sum([m.costs[c] for m, c in taken], axis=0).tolist()
        return cls(tuple(map(int, choices)), tuple(costs), float(sum(m.losses[c] for m, c in taken)))


def useful(menu: Menu) -> np.ndarray:
    """The candidates that no other one beats: in increasing order of the first cost, none costs as much or more by
    every budget and loses as much or more (of equal ones the first stays)."""
    columns = [menu.losses, *menu.costs.T[::-1]]
    order = np.lexsort(columns)  # by the first cost, then the others, then the loss
    kept: list[int] = []
    for i in order:
        beaten = any((menu.costs[k] <= menu.costs[i]).all() and menu.losses[k] <= menu.losses[i] for k in kept)
        if not beaten:
            kept.append(int(i))
    return np.array(kept)


def floor(menus: Sequence[Menu]) -> list[int]:
    """The smallest sum of costs by each budget alone, (budgets,)."""
    return np.sum([m.costs.min(axis=0) for m in menus], axis=0).tolist()


def optimum(menus: Sequence[Menu], budget: int) -> Policy:
    """The policy with the smallest loss whose (only) costs sum to at most `budget`.

    Time grows with units x candidates x (budget - floor) / g, g the greatest common divisor of all differences of
    costs in a menu; memory with (units + 32) x (budget - floor) / g bytes.

    Raises:
        InfeasibleError: the budget is below the floor.
        UsageError: the table would be too large: use `within`.
    """
    _one_budget(menus)
    least = [int(m.costs.min()) for m in menus]
    spare = budget - sum(least)
    if spare < 0:
        raise InfeasibleError(f"the smallest reachable cost is {sum(least)}, more than the budget of {budget}")
    kept = [useful(m) for m in menus]
    extra = [(m.costs[k, 0] - low) for m, k, low in zip(menus, kept, least, strict=True)]
    unit = int(np.gcd.reduce(np.concatenate(extra))) or 1
    room = min(spare, sum(int(e.max()) for e in extra)) // unit
    number = np.min_scalar_type(max(len(k) for k in kept))
    table = (len(menus) * number.itemsize + 32) * (room + 1)
    require(table <= TABLE, f"too many possible sums of costs: a table has {TABLE} bytes at most, use `within`", table)
    best = np.zeros(room + 1)  # of the menus so far, by what they may cost beyond their floor
    taken = np.zeros((len(menus), room + 1), number)
    for u, (menu, candidates, more) in enumerate(zip(menus, kept, extra, strict=True)):
        found = np.full(room + 1, np.inf)
        for n, (c, step) in enumerate(zip(candidates, more // unit, strict=True)):
            if step > room:
                continue
            reached = best[: room + 1 - step] + menu.losses[c]
            better = reached < found[step:]
            found[step:][better] = reached[better]
            taken[u, step:][better] = n
        best = found
    choices, at = [0] * len(menus), room
    for u in reversed(range(len(menus))):
        n = int(taken[u, at])
        choices[u] = int(kept[u][n])
        at -= int(extra[u][n]) // unit
    return Policy.of(menus, choices)


def front(menus: Sequence[Menu]) -> list[Policy]:
    """Policies from the cheapest to the one with the smallest loss, each optimal for the budget that it costs: costs
    rise, losses fall, and the loss falls ever more slowly. One step changes one unit."""
    _one_budget(menus)
    hulls = [hull(m) for m in menus]
    steps = []
    for u, (menu, corners) in enumerate(zip(menus, hulls, strict=True)):
        for n in range(1, len(corners)):
            before, after = corners[n - 1], corners[n]
            gained = menu.losses[before] - menu.losses[after]
            steps.append((-gained / (menu.costs[after, 0] - menu.costs[before, 0]), u, n))
    choices = [int(h[0]) for h in hulls]
    policies = [Policy.of(menus, choices)]
    for _, u, n in sorted(steps):
        choices[u] = int(hulls[u][n])
        policies.append(Policy.of(menus, choices))
    return policies


def within(menus: Sequence[Menu], limits: Sequence[int]) -> Policy:
    """The policy with the smallest loss whose costs stay within every limit, (budgets,). Where HiGHS takes a sum
    that is some millionths above a limit for equal to it, the best policy as far below the limit.

    Raises:
        InfeasibleError: no policy does.
    """
    for m in menus:
        require(m.costs.shape[1] == len(limits), f"each candidate needs {len(limits)} costs", m.costs.shape)
    kept = [k[(m.costs[k] <= limits).all(axis=1)] for m in menus for k in [useful(m)]]
    if any(len(k) == 0 for k in kept):
        raise InfeasibleError(f"no policy stays within {list(limits)}; each alone reaches {floor(menus)}")
    losses = np.concatenate([m.losses[k] - m.losses[k].min() for m, k in zip(menus, kept, strict=True)])
    costs = np.concatenate([m.costs[k] for m, k in zip(menus, kept, strict=True)]).T.astype(np.float64)
    owner = np.repeat(np.arange(len(menus)), [len(k) for k in kept])
    one_each = csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))))
    whole = np.maximum(np.asarray(limits, np.float64), 1.0)[:, None]  # limits of very different sizes, scaled to 1
    rules = vstack([one_each, csr_array(costs / whole)])
    lower = np.concatenate([np.ones(len(menus)), np.full(len(limits), -np.inf)])
    upper = np.concatenate([np.ones(len(menus)), np.asarray(limits, np.float64) / whole[:, 0]])
    for shrink in TIGHTER:
        bounds = np.where(np.arange(len(upper)) < len(menus), upper, upper * (1 - shrink))
        found = milp(
            losses / (losses.max() or 1.0),
            integrality=np.ones(len(owner)),
            bounds=(0, 1),
            constraints=(rules, lower, bounds),
            options={"mip_rel_gap": GAP},
        )
        if found.x is None:
            break
        policy = Policy.of(menus, [int(kept[u][np.argmax(found.x[owner == u])]) for u in range(len(menus))])
        if all(c <= limit for c, limit in zip(policy.costs, limits, strict=True)):
            return policy
    raise InfeasibleError(f"no policy stays within {list(limits)}; each alone reaches {floor(menus)}")


def hull(menu: Menu) -> list[int]:
    """The candidates on the lower convex hull, from the cheapest to the one with the smallest loss."""
    corners: list[int] = []
    for i in useful(menu):
        while len(corners) > 1 and _slope(menu, corners[-2], corners[-1]) >= _slope(menu, corners[-1], i):
            corners.pop()
        corners.append(int(i))
    return corners


def _slope(menu: Menu, a: int, b: int) -> float:
    return (menu.losses[b] - menu.losses[a]) / (menu.costs[b, 0] - menu.costs[a, 0])


def _one_budget(menus: Sequence[Menu]) -> None:
    require(len(menus) > 0, "there must be a menu at least", 0)
    for m in menus:
        require(m.costs.shape[1] == 1, "each candidate needs one cost", m.costs.shape)
