"""How the solvers' inner loops are compiled."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import torch

# Sums may be reordered; NaN and infinity keep their meaning. A division that looks for zeros would not be vectorised.
compiled: Callable[..., Any] = partial(
    numba.njit, cache=True, fastmath={"contract", "reassoc", "nsz", "arcp"}, boundscheck=False, error_model="numpy"
)
parallel: Callable[..., Any] = partial(compiled, parallel=True)


def start_threads() -> None:
    """Start numba's threads, no more than torch has.

    numba starts them at its first parallel call otherwise, and resets torch's number of threads then (both use OpenMP),
    also where the caller had chosen one.
    """
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.get_num_threads()))
    torch.set_num_threads(threads)


start_threads()
