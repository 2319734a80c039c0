"""What a page says, gathered from the file, from results that other commands wrote, and from what was measured."""

import hashlib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, final

from featherweight.allocator import NAMES
from featherweight.artifact import Artifact
from featherweight.artifact.read import from_bytes
from featherweight.errors import FormatError, UsageError
from featherweight.layers import VECTOR, LeftAlone
from featherweight.lossless import MARK
from featherweight.page.given import Bench, Front, Given, Run
from featherweight.page.measure import Measured, plain_sizes
from featherweight.report import Row, allocation_lines, float_inputs_lines, repair_line, rows_of
from featherweight.target import Baselines, target_bytes

UNKNOWN = "the file does not say why"


@final
@dataclass(frozen=True, slots=True)
class Size:
    """One way to store the network. metrics: what it is worth so, empty where that was not measured. ours: the file
    itself."""

    what: str
    bytes: int
    metrics: dict[str, float]
    how: str
    ours: bool = False


@final
@dataclass(frozen=True, slots=True)
class Layer:
    """One weight. dense_bytes: in fp32. macs: multiply-adds for one sample, before and after, where they were
    counted."""

    row: Row
    dense_bytes: int
    macs: tuple[int, int] | None = None


@final
@dataclass(frozen=True, slots=True)
class Asked:
    """A limit that was asked for: in the user's words, in numbers, and what the file takes of it; the last two None
    where they are not known."""

    what: str
    words: str
    limit: int | None
    got: int | None


@final
@dataclass(frozen=True, slots=True)
class Alone:
    """Tensors that are stored as they were, by reason. numbers: in all of them."""

    reason: str
    names: tuple[str, ...]
    numbers: int


@final
@dataclass(frozen=True, slots=True)
class Group:
    """Weights of one method."""

    what: str
    weights: int
    numbers: int
    bytes: int


@final
@dataclass(frozen=True, slots=True)
class Facts:
    """All that a page says.

    name: of the file; bytes, sha256: its size and their fingerprint; digest: of what they decode to; said: by whom and
    with what it was made, as the file tells, empty texts where it does not; settings: what was asked for, by option;
    commands: the same as it was typed, none where the network was compressed in Python. before, after: metrics of the
    dense network and of the file; measured_by: where they come from, empty where there are none. rest_bytes: of the
    file, beside its weights. notes, seconds: of the run. macs: multiply-adds of one sample, before and after;
    macs_note: what is not counted, or why nothing is. latency: microseconds of one sample, before and after, as a
    target timed them.
    """

    name: str
    bytes: int
    sha256: str
    digest: str
    said: dict[str, str]
    settings: dict[str, str]
    commands: tuple[str, ...]
    baselines: Baselines
    sizes: tuple[Size, ...]
    before: dict[str, float]
    after: dict[str, float]
    measured_by: str
    layers: tuple[Layer, ...]
    rest_bytes: int
    alone: tuple[Alone, ...]
    asked: tuple[Asked, ...]
    notes: tuple[str, ...]
    seconds: dict[str, float]
    lossless: bool
    macs: tuple[int, int] | None = None
    macs_note: str = ""
    latency: tuple[int, int] | None = None
    front: Front | None = None
    bench: Bench | None = None

    @property
    def ratio(self) -> float:
        """How many times smaller than fp32 the file is."""
        return self.baselines.fp32 / self.bytes

    @property
    def metric(self) -> str:
        """The first one's name, empty where none is known."""
        return next(iter(self.after), "")

    @property
    def plain_measured(self) -> bool:
        """Whether it is known what the plain ways are worth."""
        return any(s.metrics for s in self.sizes if s.what == "int8")

    @property
    def methods(self) -> tuple[Group, ...]:
        """What was done to how many weights, the most bytes first."""
        found = []
        for method in dict.fromkeys(x.row.method for x in self.layers):
            rows = [x.row for x in self.layers if x.row.method == method]
            found.append(Group(method, len(rows), sum(r.params for r in rows), sum(r.bytes for r in rows)))
        return tuple(sorted(found, key=lambda g: -g.bytes))


def read_file(path: Path) -> tuple[Artifact, bytes]:
    """A file and its bytes.

    Raises:
        FormatError: see `featherweight.artifact.read`.
    """
    try:
        data = path.read_bytes()
        return from_bytes(data), data
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


def collect(name: str, artifact: Artifact, data: bytes, given: Given, measured: Measured | None) -> Facts:
    """Everything about one file, of this name and these bytes, in one place. What was measured now takes the place of
    what a run measured.

    Raises:
        UsageError: the metrics of dense network and file have different names.
    """
    run, rows, plain = given.run, rows_of(artifact), plain_sizes(artifact)
    before = measured.before if measured else run.before if run else {}
    after = measured.after if measured else run.after if run else {}
    if before and set(before) != set(after):
        raise UsageError(f"the dense network has the metrics {sorted(before)}, the file {sorted(after)}")
    source = "now, the file in a fresh process" if measured else "when the file was made, in a fresh process"
    base, worth = plain.baselines, measured.plain if measured else {}
    counts = {} if measured is None else measured.macs
    rest = "the rest in fp32"
    sizes = (
        Size("fp32", base.fp32, before, "the dense network"),
        Size("half", base.half, worth.get("half", {}), "everything in fp16, `.half()`"),
        Size("int8", base.int8, worth.get("int8", {}), f"rounded to nearest, a scale a row, {rest}"),
        Size("int4", plain.int4, worth.get("int4", {}), f"rounded to nearest, a scale a row, {rest}"),
        Size("this file", len(data), after, "the whole of it", ours=True),
    )
    sizes = tuple(s for s in sizes if s.bytes)  # of a file without any number nothing is left to compare
    layers = tuple(
        Layer(row, 4 * row.params, counts.get(unit.names[0])) for row, unit in zip(rows, artifact.units, strict=True)
    )
    allocation = run.allocation if run else None
    macs, note = (None, "") if measured is None else (measured.total, measured.macs_note)
    if macs is None and allocation is not None and allocation.dense_macs:
        macs = allocation.dense_macs, allocation.macs
    return Facts(
        name,
        len(data),
        hashlib.sha256(data).hexdigest(),
        artifact.digest(),
        {k: _words(artifact.about.get(k)) or "" for k in ("model", "tool", "torch")},
        _settings(artifact.about),
        commands(name, artifact.about),
        base,
        sizes,
        before,
        after,
        source if after else "",
        layers,
        len(data) - sum(r.bytes for r in rows),
        _alone(artifact, run.left_alone if run else None),
        _asked(artifact.about, run, base, len(data), macs),
        _notes(run, len(data)),
        {} if run is None else run.seconds,
        MARK in artifact.about,
        macs,
        note,
        (allocation.dense_latency, allocation.latency) if allocation and allocation.dense_latency else None,
        given.front,
        given.bench,
    )


FIRST = ["weights", "train", "data", "input-shape", "recipe", "target", "method", "bits"]  # of a command, in this order
FLAGS = {"sequential": "independent", "symmetric": "asymmetric"}  # an option, and what its opposite is called


def commands(name: str, about: Mapping[str, Any]) -> tuple[str, ...]:
    """The command lines that make a file of this name, as far as it tells."""
    model, settings, tuned = about.get("model"), about.get("settings"), about.get("finetuned", [])
    if not isinstance(model, str) or not isinstance(settings, dict):
        return ()
    times = [t for t in tuned if isinstance(t, dict)] if isinstance(tuned, list) else []
    between = ["small.fw", *(f"tuned{k}.fw" for k in range(1, len(times)))]
    names = [*between[: len(times)], name]
    lines = [["compress", model, *_options(settings), "-o", names[0]]]
    for (before, after), options in zip(pairwise(names), times, strict=True):
        lines.append(["finetune", before, "--model", model, *_options(options), "-o", after])
    return tuple(shlex.join(["featherweight", *line]) for line in lines)


def _place(option: str) -> tuple[int, str]:
    return FIRST.index(option) if option in FIRST else len(FIRST), option


def _options(settings: Mapping[str, Any]) -> list[str]:
    words = []
    for option, value in sorted(settings.items(), key=lambda x: _place(x[0])):
        match value:
            case bool():
                words.append(f"--{option if value else FLAGS.get(option, f'no-{option}')}")
            case list():
                words += [w for v in value for w in (f"--{option}", str(v))]
            case _:
                words += [f"--{option}", _words(value) or ""]
    return words


def _settings(about: Mapping[str, Any]) -> dict[str, str]:
    """Options by name as the user gave them; a file may say anything here, so other shapes are left out."""
    found = about.get("settings")
    if not isinstance(found, dict):
        return {}
    return {k: text for k, v in found.items() if (text := _words(v)) is not None}


def _words(value: Any) -> str | None:
    match value:
        case bool():
            return "yes" if value else "no"
        case str():
            return value
        case int() | float():
            return f"{value:g}" if isinstance(value, float) else str(value)
        case list() if value and all(isinstance(v, str) for v in value):
            return ", ".join(value)
    return None


def _alone(artifact: Artifact, listed: tuple[LeftAlone, ...] | None) -> tuple[Alone, ...]:
    """By reason, those with the most numbers first. listed: by the run; otherwise the file says what it can: vectors
    are seen, and for others it keeps the reasons."""
    if listed is None:
        reasons = _reasons(artifact.about.get("left_alone"))
        rest = [(n, tuple(t.shape)) for n, t in artifact.rest.items() if t.is_floating_point()]
        rest += [(f"{x.name}.{part}", tuple(x.scale.shape)) for x in artifact.norms for part in ("weight", "bias")]
        listed = tuple(
            LeftAlone(n, prod(shape), VECTOR if len(shape) < 2 else reasons.get(n, UNKNOWN)) for n, shape in rest
        )
    found = []
    for reason in dict.fromkeys(x.reason for x in listed):
        same = [x for x in listed if x.reason == reason]
        found.append(Alone(reason, tuple(x.name for x in same), sum(x.params for x in same)))
    return tuple(sorted(found, key=lambda a: -a.numbers))


def _reasons(kept: Any) -> dict[str, str]:
    """By the name of the tensor, as far as the file has the form that it should have."""
    lists = {why: names for why, names in kept.items() if isinstance(names, list)} if isinstance(kept, dict) else {}
    return {name: why for why, names in lists.items() for name in names if isinstance(name, str)}


BUDGETS = {"bytes": "target", "macs": "target-macs", "bops": "target-bops"} | {
    b: f"target-{b}" for b in ("latency", "params")
}


def _asked(
    about: Mapping[str, Any], run: Run | None, base: Baselines, size: int, macs: tuple[int, int] | None
) -> tuple[Asked, ...]:
    """Every target of the file's settings and of the run."""
    words, allocation = _settings(about), run.allocation if run else None
    limits = {} if allocation is None else allocation.limits
    found = []
    for budget, option in BUDGETS.items():
        if budget not in limits and option not in words:
            continue
        got = {"bytes": size, "macs": macs[1] if macs else None}.get(budget)
        if allocation is not None and budget != "bytes":
            got = getattr(allocation, budget)
        limit = limits.get(budget)
        if limit is None and budget == "bytes":
            limit = _limit(words[option], base.fp32)
        found.append(Asked(NAMES[budget], words.get(option, ""), limit, got))
    return tuple(found)


def _limit(words: str, fp32: int) -> int | None:
    try:
        return target_bytes(words, fp32)
    except UsageError:  # a file may say anything here
        return None


def _notes(run: Run | None, size: int) -> tuple[str, ...]:
    """What the run says of itself, in the words of `compress`."""
    if run is None:
        return ()
    lines = [*run.notes, *(str(x) for x in float_inputs_lines(run.float_inputs)), repair_line(run.repair)]
    lines += [str(x) for x in allocation_lines(run.allocation, size)]
    if run.finetuned is not None:
        lines.append(f"finetuned: mean loss of each epoch {' -> '.join(f'{x:.3g}' for x in run.finetuned.losses)}")
    return tuple(lines)
