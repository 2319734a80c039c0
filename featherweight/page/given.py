"""Results that other commands wrote as JSON: of `compress --json` and `--front`, and of `bench --json`. They come from
outside: every field that is used is checked, those that are not are left unread."""

import json
import math
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, final

from featherweight.activations import FloatInput
from featherweight.allocator import Allocation, Point
from featherweight.errors import UsageError
from featherweight.finetune import Trained
from featherweight.layers import LeftAlone
from featherweight.race import DENSE, OURS
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
    """One network in one runtime. ms: median of a call with `batch` samples; lowest, highest: of all rounds. faster:
    how many times, than the dense network in the same runtime; None where that was not timed."""

    runtime: str
    what: str
    batch: int
    ms: float
    lowest: float
    highest: float
    faster: float | None = None


@final
@dataclass(frozen=True, slots=True)
class Bench:
    """Of `bench --json`: times of one run, in which all took turns. bytes: of the file that was timed. left: what was
    not timed, and why. verdict: what came of it, in sentences. random_inputs: whether there were no data."""

    bytes: int
    threads: int
    times: tuple[Timing, ...]
    left: dict[str, str] = field(default_factory=dict)
    verdict: tuple[str, ...] = ()
    random_inputs: bool = False

    @property
    def best(self) -> tuple[Timing, Timing | None] | None:
        """The fastest of the file's own at the smallest batch, and the fastest of the dense ones there."""
        least = min(t.batch for t in self.times)
        own, dense = ([t for t in self.times if t.batch == least and t.what == w] for w in (OURS, DENSE))
        fastest = min(own, key=lambda t: t.ms, default=None)
        return None if fastest is None else (fastest, min(dense, key=lambda t: t.ms, default=None))


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
    if found.run is not None and found.run.digest != digest:
        raise UsageError(f"{run} is about another file: it decodes to {found.run.digest}, this one to {digest}")
    sizes = [(front, found.front and found.front.chosen.bytes), (bench, found.bench and found.bench.bytes)]
    for place, own in sizes:
        if own is not None and own != size:
            raise UsageError(f"{place} is about another file, of {own:,} bytes; this one has {size:,}")
    if found.bench is not None and not found.bench.times:
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
