"""Results that other commands wrote as JSON: of `compress --json` and `--front`, and of `bench --json`. They come from
outside: every field that is used is checked, those that are not are left unread."""

import json
import math
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, final

from featherweight.activations import FloatInput
from featherweight.allocator import Allocation, Point
from featherweight.errors import UsageError
from featherweight.finetune import Trained
from featherweight.layers import LeftAlone
from featherweight.repair import Repair

T = TypeVar("T")


@final
@dataclass(frozen=True, slots=True)
class Run:
    """Of `compress --json`, the fields that a page shows; see `featherweight.report.Report`. notes: what stood in for
    data."""

    digest: str
    file_bytes: int
    repair: Repair
    seconds: dict[str, float]
    left_alone: tuple[LeftAlone, ...]
    before: dict[str, float]
    after: dict[str, float]
    float_inputs: tuple[FloatInput, ...] = ()
    allocation: Allocation | None = None
    finetuned: Trained | None = None
    notes: tuple[str, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Dense:
    """The network before: bytes in fp32."""

    bytes: int
    metrics: dict[str, float]


@final
@dataclass(frozen=True, slots=True)
class Front:
    """Of `compress --front`: sizes that a target could have had, from small to large, and the one it has."""

    dense: Dense
    chosen: Point
    points: tuple[Point, ...]


@final
@dataclass(frozen=True, slots=True)
class Timing:
    """One program at one batch size. ms: median of one call, in milliseconds; low, high: the spread around it."""

    what: str
    runtime: str
    batch: int
    ms: float
    low: float
    high: float


@final
@dataclass(frozen=True, slots=True)
class Bench:
    """Of `bench --json`: times of one run, in which all programs took turns. digest: of the file that was timed.
    verdict: what came of it, in sentences."""

    digest: str
    rows: tuple[Timing, ...]
    machine: str = ""
    threads: int = 0
    verdict: tuple[str, ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Given:
    """All that was."""

    run: Run | None = None
    front: Front | None = None
    bench: Bench | None = None


def read_given(run: Path | None, front: Path | None, bench: Path | None, digest: str, size: int) -> Given:
    """The results in these files, all of them about the .fw file of this digest and size.

    Raises:
        UsageError: a file cannot be read, is no JSON of its kind, or is about another .fw file.
    """
    found = Given(
        None if run is None else _read(run, Run, "--run", "compress --json"),
        None if front is None else _read(front, Front, "--front", "compress --front"),
        None if bench is None else _read(bench, Bench, "--bench", "bench --json"),
    )
    for place, result in ((run, found.run), (bench, found.bench)):
        if result is not None and result.digest != digest:
            raise UsageError(f"{place} is about another file: it decodes to {result.digest}, this one to {digest}")
    if found.front is not None and found.front.chosen.bytes != size:
        raise UsageError(f"{front} is about a file of {found.front.chosen.bytes:,} bytes, this one has {size:,}")
    if found.bench is not None and not found.bench.rows:
        raise UsageError(f"{bench} holds no time; `bench --json` prints some")
    return found


def _read(path: Path, kind: type[T], option: str, source: str) -> T:
    try:
        value = json.loads(path.read_bytes(), parse_constant=_no_number)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{option} takes what `{source}` wrote; {path} is no JSON: {error}") from error
    try:
        return shaped(kind, value, kind.__name__.lower())
    except UsageError as error:
        raise UsageError(f"{option} takes what `{source}` wrote; in {path} {error}") from error


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def shaped(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as a dataclass, a tuple or a dict of plain values, whatever `kind` says. Fields that `kind` does not
    have are left out.

    Raises:
        UsageError: a field is missing or of another type; `where` says which.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else shaped(next(k for k in inner if k is not types.NoneType), value, where)
    if origin is tuple:
        _require(isinstance(value, list), where, "a list", value)
        return tuple(shaped(inner[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        _require(isinstance(value, dict), where, "an object", value)
        return {k: shaped(inner[1], v, f"{where}.{k}") for k, v in value.items()}
    if is_dataclass(kind):
        _require(isinstance(value, dict), where, "an object", value)
        hints = typing.get_type_hints(kind)
        needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
        for name in needed:
            _require(name in value, where, f"an object with '{name}'", sorted(value))
        own = {
            f.name: shaped(hints[f.name], value[f.name], f"{where}.{f.name}") for f in fields(kind) if f.name in value
        }
        make: Callable[..., Any] = kind  # pyright: ignore[reportAssignmentType] - a dataclass is a type
        return make(**own)
    if kind is float:
        _require(type(value) in (int, float) and _is_finite(value), where, "a number", value)
        return float(value)
    _require(
        type(value) is kind,
        where,
        "a whole number" if kind is int else "a text" if kind is str else "true or false",
        value,
    )
    return value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _require(holds: bool, where: str, expected: str, got: Any) -> None:
    if not holds:
        text = repr(got)
        raise UsageError(f"{where} must be {expected}, got {text if len(text) < 80 else f'{text[:77]}...'}")
