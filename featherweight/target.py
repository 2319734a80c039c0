"""What a size target means, and the sizes that a compressed file is compared with."""

import math
import re
from dataclasses import dataclass
from typing import Literal, TypeAlias, final, get_args

from torch import Tensor, nn

from featherweight.errors import UsageError
from featherweight.layers import Unit

Among: TypeAlias = Literal["quantize", "prune", "both", "additive", "factors", "all"]
"""What a goal may choose from: grids alone; sparse fp16 alone; these and sparse grids; grids and vectors from shared
books; products of factors, on grids where bytes are limited; or everything, of which factors where parameters, MACs or
latency are limited. Factors and removed channels are not mixed: one of them is taken; in int8, channels."""

Score: TypeAlias = Literal["outputs", "labels", "measured"]
"""How a candidate is scored: by second order towards the network's own outputs, or the labels' cross-entropy; or by the
distance that is measured with this weight alone replaced."""

Runtime: TypeAlias = Literal["torch", "int8"]
"""Where latency is measured: in torch; or in onnxruntime with weights and inputs in int8, as a share of its float32."""

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_FORM = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(x|%|[kMG]B|[KMG]iB|B)\s*")
_COUNTS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_TIMES = {"us": 1, "ms": 10**3, "s": 10**6}
_TIME = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(x|%|us|ms|s)\s*")
_SHARE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(x|%|[kMGT]?)\s*")


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


def share_of(target: str | int, dense: int | None, what: str) -> int:
    """What a target for MACs, BOPs or parameters allows: `0.5x` or `50%` of the dense network's, or `20M`. dense: None
    where it is not known yet; what is refused all the same is.

    >>> share_of("0.5x", 1000, "MACs"), share_of("12%", 1000, "MACs"), share_of("2k", 10_000, "MACs")
    (500, 120, 2000)

    Raises:
        UsageError: another form, zero, or more than the dense network has.
    """
    match = _SHARE.fullmatch(str(target))
    if match is None:
        form = "a share such as 0.5x or 50%, or a number such as 20M"
        raise UsageError(f"a target for {what} is {form}, got {target!r}")
    value, unit = float(match[1]), match[2]
    whole = {"x": 1.0, "%": 100.0}.get(unit)
    count = value * _COUNTS[unit] if whole is None else value / whole * (dense or 1)
    if not 0 < count <= (max(dense, 1) if dense is not None else 1 if whole else math.inf):
        most = "" if dense is None else f", {dense:,}"
        raise UsageError(
            f"a target for {what} must be above zero and at most the dense network's{most}, got {target!r}"
        )
    return int(count)


def microseconds(target: str, dense: int) -> int:
    """What a target for latency allows: `4ms`, `800us` or `0.5s`, or `0.7x` or `70%` of the dense network's.

    >>> microseconds("4ms", 9000), microseconds("0.5x", 9000)
    (4000, 4500)

    Raises:
        UsageError: another form, zero, or a share of more than the dense network.
    """
    match = _TIME.fullmatch(str(target))
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"a target for latency is a time such as 4ms, or a share such as 0.7x or 70%, got {target!r}")
    value, unit = float(match[1]), match[2]
    whole = {"x": 1.0, "%": 100.0}.get(unit)
    if whole is None:
        return int(value * _TIMES[unit])
    if value > whole:
        raise UsageError(f"a target for latency must be at most what the dense network takes, got {target!r}")
    return int(value / whole * dense)


@final
@dataclass(frozen=True, slots=True)
class Goal:
    """What the compressed network may cost, and how it is found.

    Args:
        target: of the file, see `target_bytes`. macs, bops, params: see `share_of`; BOPs are MACs times the bits of
            both factors, params are the numbers that are stored of all parameters, whatever their bits.
        latency: see `microseconds`; of one call on this machine, with the layers made smaller (`featherweight.slim`).
        samples: of such a call. runtime: what it runs in; with int8, all weights have 8 bits.
        among: what may be chosen from; with a limit of MACs or latency, pruning removes whole input channels.
        measurements: how many policies are measured, at most; by default as many as take about a minute or two.
        front: measure policies of other sizes, too, for a picture of accuracy against bytes.
        score: how candidates are scored. 'measured' runs the network once for each.
        tied: patterns over weight names; all that one pattern matches get the same method and ratio.
    """

    target: str | int | None = None
    macs: str | int | None = None
    bops: str | int | None = None
    among: Among = "all"
    measurements: int | None = None
    front: bool = False
    score: Score = "outputs"
    tied: tuple[str, ...] = ()
    latency: str | None = None
    params: str | int | None = None
    samples: int = 1
    runtime: Runtime = "torch"

    def __post_init__(self) -> None:
        if all(x is None for x in (self.target, self.macs, self.bops, self.latency, self.params)):
            raise UsageError("a goal needs a target for bytes, MACs, BOPs, latency or parameters")
        if self.among not in get_args(Among):
            raise UsageError(f"among must be one of {', '.join(get_args(Among))}, got {self.among!r}")
        if self.score not in get_args(Score):
            raise UsageError(f"score must be one of {', '.join(get_args(Score))}, got {self.score!r}")
        if self.runtime not in get_args(Runtime):
            raise UsageError(f"runtime must be one of {', '.join(get_args(Runtime))}, got {self.runtime!r}")
        if not (type(self.samples) is int and self.samples > 0):
            raise UsageError(f"samples must be a whole number above 0, got {self.samples!r}")
        if self.latency is None and (self.samples, self.runtime) != (1, "torch"):
            raise UsageError("samples and runtime are those of a call whose latency has a limit; give latency as well")
        if self.measurements is not None and not (type(self.measurements) is int and self.measurements > 0):
            raise UsageError(f"measurements must be a whole number above 0, got {self.measurements!r}")
        if not (isinstance(self.tied, tuple) and all(isinstance(p, str) for p in self.tied)):
            raise UsageError(f"tied must be a tuple of patterns, got {self.tied!r}")
        if self.structured and self.among in ("quantize", "additive"):
            what = "grids and books leave all multiplications in place"
            raise UsageError(f"{what}: for a target of MACs or latency choose among prune, both, factors or all")
        if self.params is not None and self.among in ("quantize", "additive"):
            what = "grids and books leave all weights in place"
            raise UsageError(f"{what}: for a target of parameters choose among prune, both, factors or all")
        if self.target is not None:
            target_bytes(self.target, 1 << 40)
        for value, what in ((self.macs, "MACs"), (self.bops, "BOPs"), (self.params, "parameters")):
            if value is not None:
                share_of(value, None, what)
        if self.latency is not None:
            microseconds(self.latency, 1)

    def words(self) -> dict[str, str | int]:
        """The limits as they were given, by the option of the command line that says the same."""
        given = {
            "target": self.target,
            "target-macs": self.macs,
            "target-bops": self.bops,
            "target-latency": self.latency,
            "target-params": self.params,
        }
        return {option: value for option, value in given.items() if value is not None}

    @property
    def structured(self) -> bool:
        """Whether only whole channels count."""
        return self.macs is not None or self.latency is not None

    def limits(self, fp32: int, macs: int, bops: int, latency: int, params: int) -> dict[str, int]:
        """By budget, for a dense network of so many bytes, MACs, BOPs, microseconds and parameters."""
        found = {} if self.target is None else {"bytes": target_bytes(self.target, fp32)}
        found |= {} if self.macs is None else {"macs": share_of(self.macs, macs, "MACs")}
        found |= {} if self.bops is None else {"bops": share_of(self.bops, bops, "BOPs")}
        found |= {} if self.latency is None else {"latency": microseconds(self.latency, latency)}
        return found | ({} if self.params is None else {"params": share_of(self.params, params, "parameters")})
