"""What both files of compiled kernels share."""

import numba
import torch

FAST = {"contract", "reassoc", "nsz", "arcp"}  # sums may be reordered; NaN and infinity keep their meaning


def start_threads() -> None:
    """Start numba's threads, no more than torch has.

    numba starts them at its first parallel call otherwise, and resets torch's number of threads then (both use OpenMP),
    also where the caller had chosen one.
    """
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.get_num_threads()))
    torch.set_num_threads(threads)


start_threads()
