"""Memory that is freed and wanted again."""

import ctypes
import sys

TRIM, MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
MOST = (1 << 31) - 1
LARGE = 1 << 30, 1 << 25  # what is large; older releases of glibc refuse more than the second


def reuse_memory() -> bool:
    """Have the C library keep large blocks of memory that are freed, for the next one that asks, instead of giving each
    back to the system and having its pages filled with zeros again: a network whose activations take many megabytes
    then runs faster on CPU (bench/memory.py). For the whole process, which keeps its largest size; the command line
    does this by itself.

    Returns whether it could be set: with glibc, that is, on most Linux systems; older releases keep no more than 32 MB
    a block.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(TRIM, MOST)) and any(mallopt(MMAP, size) for size in LARGE)
