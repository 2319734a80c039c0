"""How the solvers' inner loops are compiled."""

from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any, TypeVar

import numba
import torch

T = TypeVar("T")

# Sums may be reordered; NaN and infinity keep their meaning. A division that looks for zeros would not be vectorised.
compiled: Callable[..., Any] = partial(
    numba.njit, cache=True, fastmath={"contract", "reassoc", "nsz", "arcp"}, boundscheck=False, error_model="numpy"
)


def parallel() -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Compiled, with loops that run in parallel. For calls from Python."""

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        kernel = compiled(parallel=True)(function)

        @wraps(function)
        def call(*arguments: Any) -> T:
            start_threads()
            return kernel(*arguments)

        return call

    return decorate


@cache
def start_threads() -> None:
    """Start numba's threads, once, no more than torch has.

    numba starts them at its first parallel call otherwise, and resets torch's number of threads then (both use OpenMP),
    also where the caller had chosen one. Not on import: a process that has threads cannot be forked into some that use
    them.
    """
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.get_num_threads()))
    torch.set_num_threads(threads)
