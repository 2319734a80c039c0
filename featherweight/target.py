"""What a size target means, and the sizes that a compressed file is compared with."""

import re
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn

from featherweight.errors import UsageError
from featherweight.layers import Unit

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_FORM = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(x|%|[kMG]B|[KMG]iB|B)\s*")


@final
@dataclass(frozen=True, slots=True)
class Baselines:
    """Bytes of the network's tensors as people would store them without this tool. fp32: every real number in 4
    bytes. half: `.half()`, in 2. int8: the compressible weights in 1 byte and 4 a row for a scale, the rest in 4."""

    fp32: int
    half: int
    int8: int


def baselines(model: nn.Module, units: tuple[Unit, ...]) -> Baselines:
    """Sizes of parameters and persistent buffers, tied ones counted once, training counters left out."""
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    real = sum(t.numel() for t in tensors.values() if t.is_floating_point())
    scales = sum(u.view.matrix_shape[0] for u in units)
    weights = sum(u.params for u in units)
    return Baselines(4 * real, 2 * real, 4 * (real - weights) + weights + 4 * scales)


def target_bytes(target: str | int, fp32: int) -> int:
    """Bytes that a target allows: `100kB` or `1.5MiB` of file, `10x` smaller than fp32, `12%` of fp32, or a number
    of bytes.

    >>> target_bytes("10x", 1_000_000), target_bytes("12%", 1_000_000), target_bytes("90kB", 1_000_000)
    (100000, 120000, 90000)

    Raises:
        UsageError: another form, or zero.
    """
    match = _FORM.fullmatch(f"{target}B" if isinstance(target, int) else str(target))
    if match is None:
        raise UsageError(
            f"a target is a size such as 100kB, a ratio such as 10x or a share such as 12%, got {target!r}"
        )
    value, unit = float(match[1]), match[2]
    if value <= 0:
        raise UsageError(f"a target must be more than zero, got {target!r}")
    return int(fp32 / value if unit == "x" else fp32 * value / 100 if unit == "%" else value * _UNITS[unit])
