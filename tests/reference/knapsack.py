"""The multiple-choice knapsack by trying every policy."""

from itertools import product

import numpy as np


def best(costs: list[np.ndarray], losses: list[np.ndarray], limits: list[int]) -> float:
    """The smallest sum of losses of any policy within all limits; inf where there is none. costs: (candidates,
    budgets) of each unit."""
    found = np.inf
    for choice in product(*(range(len(x)) for x in losses)):
        spent = sum(c[i] for c, i in zip(costs, choice, strict=True))
        if (np.asarray(spent) <= limits).all():
            found = min(found, sum(x[i] for x, i in zip(losses, choice, strict=True)))
    return float(found)
