"""Every error that featherweight raises on purpose.

FeatherweightError           one line for people; the command line prints it and exits with `exit_code`
├── UsageError               what was asked cannot be done as asked (exit 2)
├── FormatError              a file is not a featherweight file, or is damaged (exit 1)
├── SolveError               a layer has no numerical solution (exit 1)
└── InfeasibleError          the target is smaller than the smallest reachable size (exit 3)
"""


class FeatherweightError(Exception):
    """Base of all errors raised on purpose. The message says what was expected, what came, and what to try."""

    exit_code = 1


class UsageError(FeatherweightError):
    """The request itself is wrong: a pattern that matches nothing, data that does not fit the network, a bad value."""

    exit_code = 2


class FormatError(FeatherweightError):
    """The file is truncated, altered, from a newer version, or not a featherweight file at all."""


class SolveError(FeatherweightError):
    """A layer could not be solved: not even strong damping made its Hessian positive definite."""


class InfeasibleError(FeatherweightError):
    """No setting reaches the target. The message names the smallest reachable size."""

    exit_code = 3


def require(condition: bool, expected: str, got: object) -> None:
    """Raise UsageError unless `condition` holds. `expected` is a full phrase such as 'bits must be 1 to 8'."""
    if not condition:
        raise UsageError(f"{expected}, got {got!r}")
